"""Predicted speed-ups: times the parts of a block at a run's mean context and applies the throughput model to them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.decoding import batch
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import row_keys
from specjax.evaluation import latency, throughput
from specjax.evaluation.engine import Method, Output
from specjax.reporting import metrics
from specjax.runtime import processes


def parts_meter(
    plain: Method,
    speculative: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    emitted: Sequence[Sequence[int]],
    **how: Any,
) -> latency.PartsMeter:
    """Makes a PartsMeter of plain decoding and the speculative methods, with rows as long as the run's mean context.

    Args:
      prompts: the prompts of the run.
      emitted: tokens that plain decoding emitted for the first prompts; half of them are in the mean context.
      how: `batch_size`, `eos_ids`, `seed` and `put` of the run.
    """
    half = int(np.mean([len(tokens) // 2 for tokens in emitted]))
    texts = [(*prompt, *tokens) for prompt, tokens in zip(prompts, emitted, strict=False)]
    return latency.PartsMeter(plain, speculative, _example_rows(plain.plan, prompts, texts, half, **how))


def measure_block_costs(
    method: Method, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **how: Any
) -> Float[Array, "gamma_plus_1"]:
    """Seconds of blocks with 0 .. gamma drafted tokens (`Sampling.block_costs`), with half of the new tokens decoded.

    Args:
      method: a method whose drafter is an `AdaptiveDrafter`.
      prompts: the prompts of the run.
      how: `batch_size`, `eos_ids`, `seed` and `put` of the run.
    """
    # Texts that repeat themselves, so that a lookup of earlier text has as many tokens to draft as are forced.
    half = max(int(np.mean([len(prompt) for prompt in prompts])) // 2, 1)
    rows = _example_rows(method.plan, prompts, [prompt[:half] for prompt in prompts], max_new_tokens // 2, **how)
    seconds = np.asarray(latency.forced_block_seconds(method, rows), np.float32)
    return jnp.asarray(processes.from_first(seconds))  # all processes must use the same costs


def _example_rows(
    plan: Plan,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    half: int,
    *,
    batch_size: int,
    eos_ids: Sequence[int],
    seed: int,
    put: batch.Placer,
) -> latency.Rows:
    """The longest texts, each repeated or cut to the mean context length: a prompt and `half` emitted tokens.

    For an encoder-decoder the rows are prompts, and the emitted tokens are in the decoder's cache.
    """
    separate = plan.target.is_encoder_decoder
    length = int(np.mean([len(prompt) for prompt in prompts])) + (0 if separate else half)
    longest = sorted(prompts if separate else texts, key=len)[-batch_size:]
    rows = [(tuple(text) * length)[:length] for text in longest]
    rows += rows[-1:] * (put.rows(len(rows)) - len(rows))
    tokens, lengths = batch.pad(rows, max(plan.prompt_slots, batch.prompt_slots(rows)))
    limits = batch.make_limits([2**30] * len(rows), [-1] * len(eos_ids), put)
    keys = row_keys(seed, put(np.arange(len(rows), dtype=np.int32)))
    decoded = half if separate else 0
    return latency.Rows(put(tokens), put(lengths), keys, limits, decoded, decoded or length)


def uncut_ctar(counts: metrics.Counts, weights: Float[np.ndarray, "N"]) -> Float[np.ndarray, "gamma"]:
    """`ctar` (see `throughput`) as if no block were cut short by the end of a text.

    The throughput model cuts the last block itself. If every block drafts gamma tokens, `ctar` is the cumulative
    product of acceptance by position, in which positions after a cut are not counted. For drafters that stop early, it
    is the observed share of blocks, including blocks that were cut.

    Args:
      weights: how often to count each row.
    """
    if _drafts_fewer(counts):
        return (weights @ counts.emitted_more_than) / (weights @ counts.target_calls)
    return np.cumprod((weights @ counts.accepted_at) / np.maximum(weights @ counts.drafted_at, 1))


def _drafts_fewer(counts: metrics.Counts) -> bool:
    """Whether blocks drafted fewer than gamma tokens for another reason than the end of a text.

    If a drafter always drafts gamma tokens, at least gamma - 1, gamma - 2, .. are counted in the last blocks of a text,
    and one more block may be cut at an EOS.
    """
    gamma, texts = counts.drafted_at.shape[1], len(counts.emitted)
    return bool(counts.drafted.sum() < gamma * counts.target_calls.sum() - texts * gamma * (gamma + 1) // 2)


# Rounds of fitting factors of texts and rates of positions in turn.
_ROUNDS = 10
# Keeps quotients finite; and the pseudo-count of texts that share one rate.
_TINY, _ALL_SHARED = 1e-9, 1e6


def text_ctars(counts: metrics.Counts) -> Float[np.ndarray, "N gamma"]:
    """`ctar` of each text: a text accepts position i at the rate factor_text * rate_i, with factors shrunk to 1.

    Factors and rates are fitted in turn, because later positions are reached more often in texts that accept much:

        rate_i = sum over texts of accepted / sum over texts of factor * tried
        factor = (accepted + h) / (sum over positions of rate_i * tried + h)

    The pseudo-count h is the method-of-moments estimate of a beta-binomial model of the texts' rates over all
    positions: the more texts differ beyond chance, the smaller it is.
    """
    if fewer := _drafts_fewer(counts):
        accepted, tried = counts.emitted_more_than, np.tile(counts.target_calls[:, None], counts.drafted_at.shape[1])
    else:
        accepted, tried = counts.accepted_at, counts.drafted_at
    of_text, tries = accepted.sum(1), np.maximum(tried.sum(1), 1)
    rate = of_text.sum() / tries.sum()
    chance = rate * (1 - rate)
    differs = np.average((of_text / tries - rate) ** 2, weights=tries) - chance * len(tries) / tries.sum()
    shrinkage = rate * np.clip(chance / max(differs, _TINY) - 1, 0, _ALL_SHARED) + _TINY
    factors = np.ones(len(tries))
    for _ in range(_ROUNDS):
        rates = accepted.sum(0) / np.maximum(factors @ tried, _TINY)
        factors = (of_text + shrinkage) / (tried @ rates + shrinkage)
    scaled = np.minimum(factors[:, None] * rates, 1)
    return scaled if fewer else np.cumprod(scaled, axis=1)


def expected_iterations(counts: metrics.Counts, batch_size: int, group: int) -> float:
    """Expected number of blocks of groups of `group` prompts, each decoded in a batch of `batch_size` rows."""
    return throughput.expected_rounds(text_ctars(counts).tolist(), counts.emitted.tolist(), batch_size, group)


def predict(
    parts: throughput.PartSeconds | None,
    plan: Plan,
    draft_size: int,
    output: Output,
    baseline: Output,
    batch_size: int,
) -> dict[str, Any]:
    """The fields of an `EvaluationRow` for part times and the speed-up predicted from them.

    Args:
      parts: seconds of the parts; None if they were not timed, and then every field but `expected_iterations` is None.
      draft_size: number of parameters of the draft; 0 for self-drafts, for which `mbsu` is None.
    """
    group = max(len(result.rows) for result in output.batches)
    expected, plain = (expected_iterations(each.counts(), batch_size, group) for each in (output, baseline))
    names = [field.name for field in dataclasses.fields(throughput.PartSeconds) if field.name != "intervals"]
    fields: dict[str, Any] = {f"{name}_seconds": parts and getattr(parts, name) for name in names}
    fields |= {"expected_iterations": expected, "part_seconds_ci": parts and parts.intervals}
    cost_ratio = predicted = mbsu = None
    if parts is not None:
        cost_ratio = parts.cost_ratio()
        speed = lambda result, blocks, seconds: result.emitted / (result.prefill_seconds + blocks * seconds)
        predicted = speed(output, expected, parts.block(plan.gamma)) / speed(baseline, plain, parts.baseline)
        if draft_size:
            block_efficiency = output.emitted / int(output.counts().target_calls.sum())
            mbsu = throughput.memory_bound_speedup(block_efficiency, plan.gamma, plan.target.num_params, draft_size)
    return {**fields, "cost_ratio": cost_ratio, "predicted_speedup": predicted, "mbsu": mbsu}
