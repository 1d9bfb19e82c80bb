"""The results of decoding prompts: of each one its tokens, counts, layer executions and seconds."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from specjax.decoding import loop
from specjax.decoding.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one prompt, complete or so far.

    Attributes:
      tokens: emitted ids, without the prompt.
      origins: the code of each emitted token in `DecodeState.origins`.
      statistics: its counts, as arrays of one row.
      executions: layer executions (one is one layer on one token) on the row's own tokens, by "target" and "draft",
        without prefill.
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
class BatchResult:
    """The result of decoding some prompts.

    Attributes:
      rows: the result of each prompt, in their order.
      padded: layer executions by "target" and "draft" on all columns of all rows of the compiled batch, without
        prefill: also on padding, and in rows that have ended.
      prefill_seconds: wall-clock seconds of the target's and the drafter's prefill.
      decode_seconds: wall-clock seconds of all blocks.
      iterations: number of blocks that ran.
      row_blocks: the sum over these blocks of the rows of the compiled batch. The sum of `statistics.target_calls` over
        it is the share of rows that were useful; others had ended or were padding.
      compile_seconds: wall-clock seconds of compiling, which are in no other seconds.
    """

    rows: list[Row]
    padded: dict[str, int]
    prefill_seconds: float
    decode_seconds: float
    iterations: int
    row_blocks: int
    compile_seconds: float = 0.0

    @property
    def tokens(self) -> list[list[int]]:
        """Emitted ids of each prompt, without the prompt."""
        return [row.tokens for row in self.rows]

    @property
    def origins(self) -> list[list[int]]:
        """The origin of each emitted token, as an index into `loop.ORIGINS`."""
        return [[code % len(loop.ORIGINS) for code in row.origins] for row in self.rows]

    @property
    def statistics(self) -> Statistics:
        """The counts of all prompts, as numpy arrays."""
        return joined(self.rows)

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds


def joined(rows: Sequence[Row]) -> Statistics:
    """The counts of several rows, in their order, as numpy arrays."""
    return jax.tree.map(lambda *values: np.concatenate(values), *(row.statistics for row in rows))


def counts_of(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Counts of each row, as the fields of `reporting.metrics.Counts`."""
    statistics = joined(rows)
    return {
        "emitted": np.asarray([len(row.tokens) for row in rows], np.int32),
        "target_calls": statistics.target_calls,
        "drafted": statistics.drafted,
        "accepted": statistics.accepted_at.sum(1, dtype=np.int32),
        "drafted_at": statistics.drafted_at,
        "accepted_at": statistics.accepted_at,
        "emitted_more_than": statistics.emitted_more_than,
    }


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
    rows = [row for result in results for row in result.rows]
    emitted, statistics = sum(len(row.tokens) for row in rows), joined(rows)
    per_token = lambda total: float(total) / emitted
    rates = {}
    for name in ("target", "draft"):
        rates[f"{name}_layers_per_token"] = per_token(sum(row.executions[name] for row in rows))
        rates[f"{name}_layers_per_token_padded"] = per_token(sum(result.padded[name] for result in results))
    tokens = statistics.target_calls.sum() + statistics.drafted.sum()
    return {**rates, "target_layers_per_token_once": per_token(layers * tokens)}
