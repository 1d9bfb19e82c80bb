"""Predicted beside measured: parts of a block timed at a run's mean context, and the speed-up they foretell."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.decoding import batch, loop
from specjax.decoding.sampling import Sampling, row_keys
from specjax.evaluation import latency, throughput
from specjax.reporting import metrics
from specjax.runtime import processes

_KEYS = (
    "draft_step_seconds",
    "target_step_seconds",
    "verify_seconds",
    "rule_seconds",
    "baseline_rule_seconds",
    "cost_ratio",
    "predicted_speedup",
    "mbsu",
)


def nothing() -> dict[str, None]:
    """The keys of a prediction where there is none."""
    return dict.fromkeys(_KEYS)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A way of decoding whose parts are to be timed.

    Attributes:
      plan: its plan.
      draft_params: of its drafter; None where that has none.
      sampling: temperature and the rest.
    """

    plan: loop.Plan
    draft_params: Any
    sampling: Sampling


def parts_meter(
    plain: Timed,
    speculative: Sequence[Timed],
    params: Any,
    prompts: Sequence[Sequence[int]],
    emitted: Sequence[Sequence[int]],
    *,
    batch_size: int,
    seed: int,
    put: batch.Placer,
) -> latency.PartsMeter:
    """What times the parts of each speculative plan and of plain decoding on rows as long as the run's mean context.

    Args:
      prompts: of the run.
      emitted: what plain decoding made of the first of them; half of that is behind a prompt on average.
    """
    apart = plain.plan.target.is_encoder_decoder
    half = int(np.mean([len(tokens) // 2 for tokens in emitted]))
    length = int(np.mean([len(prompt) for prompt in prompts])) + (0 if apart else half)
    texts = prompts if apart else [(*prompt, *tokens) for prompt, tokens in zip(prompts, emitted, strict=False)]
    given = _example_batch(texts, length, batch_size, seed, put)
    behind = half if apart else 0
    timers = lambda timed: latency.timers(timed.plan, params, timed.draft_params, *given, timed.sampling, behind=behind)
    gammas = [timed.plan.gamma for timed in speculative]
    return latency.PartsMeter(timers(plain), [timers(timed) for timed in speculative], gammas)


def measure_block_costs(
    plan: loop.Plan,
    params: Any,
    draft_params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    put: batch.Placer,
) -> Float[Array, "gamma_plus_1"]:
    """Seconds of blocks that draft 0 .. gamma tokens, for `Sampling.costs`, about half way through the run.

    Args:
      plan: with an `AdaptiveDrafter`.
      prompts: of the run.
    """
    apart, half = plan.target.is_encoder_decoder, max_new_tokens // 2
    length = int(np.mean([len(prompt) for prompt in prompts])) + (0 if apart else half)
    given = _example_batch(prompts, length, batch_size, seed, put)
    behind = half if apart else 0
    seconds = latency.block_seconds(plan, params, draft_params, *given, sampling, behind=behind)
    return jnp.asarray(processes.from_first(np.asarray(seconds, np.float32)))  # all draft by one clock


def _example_batch(texts: Sequence[Sequence[int]], length: int, batch_size: int, seed: int, put: batch.Placer) -> tuple:
    """Tokens, lengths and keys of the longest texts, each repeated or cut to one length."""
    rows = [(tuple(text) * length)[:length] for text in sorted(texts, key=len)[-batch_size:]]
    rows += rows[-1:] * (put.rows(len(rows)) - len(rows))
    tokens, lengths = batch.pad(rows, batch.prompt_slots(rows))
    return put(tokens), put(lengths), row_keys(seed, put(np.arange(len(rows), dtype=np.int32)))


def uncut_ctar(counts: metrics.Counts, weights: Float[np.ndarray, "N"]) -> Float[np.ndarray, "gamma"]:
    """`ctar` of blocks that no text's end cuts short, as the throughput model wants it, which cuts the last one itself.

    Where every block drafts gamma tokens it is the product of the positions' rates, in which what was cut is neither a
    trial nor a success. A drafter that stops early leaves the share of blocks as they were, the last of a text too.

    Args:
      weights: how often each row counts.
    """
    gamma, texts = counts.drafted_at.shape[1], len(counts.emitted)
    # Near a text's end the blocks that always draft gamma have room for gamma - 1, gamma - 2, .. at the least; one more
    # may be cut at an EOS.
    cut_at_most = texts * gamma * (gamma + 1) // 2
    if counts.drafted.sum() < gamma * counts.target_calls.sum() - cut_at_most:
        return (weights @ counts.emitted_more_than) / (weights @ counts.target_calls)
    return np.cumprod((weights @ counts.accepted_at) / np.maximum(weights @ counts.drafted_at, 1))


def expected_iterations(counts: metrics.Counts, batch_size: int) -> float:
    """Blocks that batches of these rows should take: of each the expected maximum over its rows.

    Args:
      counts: of all rows, in the order in which they are put into batches.
    """
    emitted = counts.emitted
    ctar = uncut_ctar(counts, np.ones(len(emitted))).tolist()
    batches = [emitted[first : first + batch_size].tolist() for first in range(0, len(emitted), batch_size)]
    return sum(throughput.expected_rounds([ctar] * len(tokens), tokens) for tokens in batches)


def predict(
    parts: throughput.Parts,
    plan: loop.Plan,
    block_efficiency: float,
    draft_params: int,
    output: Sequence[tuple[int, batch.BatchResult]],
    baseline: Sequence[tuple[int, batch.BatchResult]],
) -> dict[str, float | None]:
    """The parts and the speed-up predicted from them for the blocks that a run needed.

    Args:
      draft_params: parameters of the draft, 0 where it has none of its own (then there is no MBSU).
      output: (rows that count, result) of each batch; `baseline` the same of plain decoding.
    """
    emitted = lambda results: sum(len(row) for rows, result in results for row in result.tokens[:rows])
    iterations = lambda results: sum(result.iterations for _, result in results)
    prefill = lambda results: sum(result.prefill_seconds for _, result in results)
    predicted = throughput.predicted_speedup(
        parts,
        plan.gamma,
        emitted=emitted(output),
        iterations=iterations(output),
        prefill_seconds=prefill(output),
        baseline_emitted=emitted(baseline),
        baseline_iterations=iterations(baseline),
        baseline_prefill_seconds=prefill(baseline),
    )
    mbsu = None
    if draft_params:
        mbsu = throughput.memory_bound_speedup(block_efficiency, plan.gamma, plan.target.num_params, draft_params)
    steps = (parts.draft_step, parts.target_step, parts.verify, parts.rule, parts.baseline_rule, parts.cost_ratio())
    return dict(zip(_KEYS, (*steps, predicted, mbsu), strict=True))
