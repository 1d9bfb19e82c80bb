"""The results of decoding prompts: of each one its tokens, counts, layer executions and seconds."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from specjax.decoding import loop
from specjax.decoding.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one prompt, complete or so far.

    Attributes:
      tokens: emitted ids, without the prompt.
      origins: the origin of each emitted token, as `DecodeState.origins` has it.
      statistics: its counts, as arrays of one row.
      executions: layer executions on the row's own tokens by "target" and "draft", without prefill.
      first_token_seconds: wall-clock seconds from the start of its prefill until the end of its first block.
      seconds: the same until its last block.
    """

    tokens: list[int]
    origins: list[int]
    statistics: Statistics
    executions: dict[str, int]
    first_token_seconds: float
    seconds: float

    @classmethod
    def empty(cls, gamma: int) -> "Row":
        """The result of a prompt that has not been decoded."""
        return cls([], [], Statistics.zeros(1, gamma), {"target": 0, "draft": 0}, 0.0, 0.0)

    def first(self, tokens: int, gamma: int) -> "Row":
        """The row cut to its first tokens, with the counts as if the last of these were an EOS."""
        codes, counts = np.asarray(self.origins), dict(vars(self.statistics))
        kinds, drafted = codes % len(loop.ORIGINS), codes // len(loop.ORIGINS)
        lasts = np.flatnonzero(kinds != loop.ACCEPTED)  # every block ends with such a token, but the text's last one
        lasts = lasts if len(lasts) and lasts[-1] == len(codes) - 1 else np.append(lasts, len(codes) - 1)
        emitted = np.diff(lasts, prepend=-1)
        accepted = emitted - (kinds[lasts] != loop.ACCEPTED)
        # A block that ends with a bonus token has accepted all that it drafted; of the last block the total is known.
        drafted = np.where(kinds[lasts] == loop.RECOVERED, drafted[lasts], accepted)
        drafted[-1] = counts["drafted"][0] - drafted[:-1].sum()
        inside = np.clip(tokens - (lasts + 1 - emitted), 0, emitted)  # how many tokens of each block are left
        accepted, inside, drafted = (each[inside > 0] for each in (accepted, inside, drafted))
        drafted[-1] = min(drafted[-1], inside[-1])
        numbers = (np.asarray(each, np.int32) for each in (accepted, inside, drafted))
        blocks = Statistics.zeros(len(drafted), gamma).after(*numbers)
        for name in counts.keys() - {"failed_drafts", "failed"}:
            counts[name] = getattr(blocks, name).sum(0, dtype=np.int32, keepdims=True)
        cut = {"tokens": self.tokens[:tokens], "origins": self.origins[:tokens], "statistics": Statistics(**counts)}
        return dataclasses.replace(self, **cut)


@dataclasses.dataclass(frozen=True)
class Executions:
    """Layer executions, where one execution is one layer running on one token of one row; without prefill.

    Attributes:
      own: those on each prompt's own tokens.
      padded: those on all columns of all rows of the compiled batch: also on padding, and in rows that have ended.
    """

    own: Int[np.ndarray, "N"]
    padded: int


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """The result of decoding some prompts, in their order.

    Attributes:
      tokens: emitted ids of each prompt, without the prompt.
      origins: the origin of each emitted token, as an index into `loop.ORIGINS`.
      statistics: counts as numpy arrays.
      executions: layer executions of "target" and "draft".
      prefill_seconds: wall-clock seconds of the target's and the drafter's prefill.
      decode_seconds: wall-clock seconds of all blocks.
      iterations: number of blocks that ran.
      row_blocks: the sum over these blocks of the rows of the compiled batch. The sum of `statistics.target_calls` over
        it is the share of rows that were useful; others had ended or were padding.
      first_token_seconds: of each prompt, the seconds from the start of its prefill until the end of its first block.
      row_seconds: the same until its last block.
      compile_seconds: wall-clock seconds of compiling, which are in no other seconds.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    statistics: Statistics
    executions: dict[str, Executions]
    prefill_seconds: float
    decode_seconds: float
    iterations: int
    row_blocks: int
    first_token_seconds: list[float]
    row_seconds: list[float]
    compile_seconds: float = 0.0

    @classmethod
    def of(cls, rows: Sequence[Row], padded: dict[str, int], **totals: float | int) -> "BatchResult":
        """The result of rows, with all executions of "target" and "draft", and the numbers of the whole batch."""
        own = lambda name: np.asarray([row.executions[name] for row in rows], np.int32)
        return cls(
            tokens=[row.tokens for row in rows],
            origins=[[code % len(loop.ORIGINS) for code in row.origins] for row in rows],
            statistics=jax.tree.map(lambda *values: np.concatenate(values), *(row.statistics for row in rows)),
            executions={name: Executions(own(name), total) for name, total in padded.items()},
            first_token_seconds=[row.first_token_seconds for row in rows],
            row_seconds=[row.seconds for row in rows],
            **totals,
        )

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    def counts(self) -> dict[str, np.ndarray]:
        """Counts of each prompt, as the fields of `reporting.metrics.Counts`."""
        statistics = self.statistics
        return {
            "emitted": np.asarray([len(row) for row in self.tokens], np.int32),
            "target_calls": statistics.target_calls,
            "drafted": statistics.drafted,
            "accepted": statistics.accepted_at.sum(1, dtype=np.int32),
            "drafted_at": statistics.drafted_at,
            "accepted_at": statistics.accepted_at,
            "emitted_more_than": statistics.emitted_more_than,
        }


def join_counts(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates the counts of several batches; prompts keep their order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def layers_per_token(results: Sequence[BatchResult], layers: int) -> dict[str, float]:
    """Layer executions per emitted token, without prefill.

    Args:
      results: the result of each batch.
      layers: number of layers of the target.

    Returns:
      `target_layers_per_token`: executions of target layers, drafting included, on pending and drafted tokens;
      `target_layers_per_token_padded`: the same on all columns of all rows, padding included: the work of the device;
      `draft_layers_per_token`, `draft_layers_per_token_padded`: the same for the layers of the draft model or adapter;
      `target_layers_per_token_once`: target executions if each layer ran once on every pending and drafted token:
      layers * (target calls + drafted) / emitted (arXiv 2404.18911: a self-draft's first layers are not run again).
    """
    emitted = sum(len(row) for result in results for row in result.tokens)
    per_token = lambda total: float(total) / emitted
    rates = {}
    for name in ("target", "draft"):
        executions = [result.executions[name] for result in results]
        rates[f"{name}_layers_per_token"] = per_token(sum(each.own.sum() for each in executions))
        rates[f"{name}_layers_per_token_padded"] = per_token(sum(each.padded for each in executions))
    tokens = sum(result.statistics.target_calls.sum() + result.statistics.drafted.sum() for result in results)
    return {**rates, "target_layers_per_token_once": per_token(layers * tokens)}
