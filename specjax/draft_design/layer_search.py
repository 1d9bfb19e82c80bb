"""Greedy search for the layers that a target can skip when it drafts for itself.

It simplifies the search of Draft & Verify (arXiv 2309.08168, section 3.3): layers are skipped one more at a time,
without Bayesian optimisation over attention and MLP parts. Candidates are scored without decoding, by the predicted
speed-up at the best gamma. Acceptance is the overlap of the two distributions on the target's own text, and cost is the
number of parameters that a step reads.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.sampling import Sampling, probabilities
from specjax.evaluation import throughput
from specjax.models.language_model import LanguageModel, Params, consecutive
from specjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Choice:
    """A draft that skips layers of the target, and its predicted speed.

    Attributes:
      skipped: the skipped layers, ascending.
      acceptance: mean over the text of the overlap sum_v min(target, draft).
      cost_ratio: number of parameters that a draft step reads / number that a target step reads.
      gamma: the gamma with the largest predicted speed-up.
      predicted_speedup: over plain decoding, at that gamma.
    """

    skipped: tuple[int, ...]
    acceptance: float
    cost_ratio: float
    gamma: int
    predicted_speedup: float


@functools.partial(jax.jit, static_argnames=("target", "greedy"))
def _acceptance(
    target: LanguageModel,
    params: Params,
    tokens: Int[Array, "B T"],
    counted: Float[Array, "B T"],
    included: Bool[Array, "L"],
    sampling: Sampling,
    *,
    greedy: bool,
) -> Float[Array, ""]:
    """Mean overlap over the counted positions. `included` is traced, so all candidates share one executable.

    The result is slightly low, because here the whole text is computed with the included layers only, while in decoding
    committed tokens have keys and values of the complete target.
    """
    positions = consecutive(tokens)
    complete, _ = target.extend(params, None, tokens, positions)
    hidden, _ = target.extend(params, None, tokens, positions, layers=(0, 0))
    for layer in range(target.layers):
        after, _ = target.extend(params, None, hidden, positions, layers=(layer, layer + 1))
        hidden = jnp.where(included[layer], after, hidden)
    distribution = lambda states: probabilities(target.head(params, states), sampling, greedy=greedy)
    overlap = jnp.sum(jnp.minimum(distribution(complete), distribution(hidden)), axis=-1)
    return jnp.sum(counted * overlap) / jnp.sum(counted)


def cost_ratio(target: LanguageModel, skipped: tuple[int, ...]) -> float:
    """The number of parameters that a draft step reads / the number that a target step reads."""
    blocks = target.abstract_params()["blocks"]
    unread = sum(math.prod(x.shape) for layer in skipped for x in jax.tree.leaves(blocks[layer]))
    return 1 - unread / target.num_step_params


def best_gamma(acceptance: float, cost_ratio: float, verify_cost: float, longest: int) -> tuple[int, float]:
    """The gamma in 1 .. longest with the largest predicted speed-up, and that speed-up (see `throughput`).

    Every token is accepted with the same probability, and a verification takes as long as `verify_cost` plain steps.
    """
    ctar = throughput.iid(acceptance, longest)
    costs = throughput.Costs(cost_ratio, (1.0, *[verify_cost] * longest))
    speedups = {gamma: throughput.speedup(ctar, costs, gamma) for gamma in range(1, longest + 1)}
    best = max(speedups, key=speedups.__getitem__)
    return best, speedups[best]


def search(
    target: LanguageModel,
    params: Params,
    tokens: Int[Any, "B T"],
    lengths: Int[Any, "B"],
    starts: Int[Any, "B"],
    *,
    sampling: Sampling,
    most_skipped: int,
    longest_gamma: int,
    verify_cost: float,
) -> Iterator[Choice]:
    """Yields the best choice of one skipped layer, then of that one and a second, up to `most_skipped` layers.

    Args:
      tokens: right-padded texts, best written by the target.
      lengths: the number of tokens of each text.
      starts: the first position of each text whose token counts.
      sampling: temperature, top-k and top-p of the distributions.
      longest_gamma: the largest gamma to consider.
      verify_cost: seconds of a verification relative to a plain step.

    Raises:
      UserError: for an encoder-decoder, or an argument out of range.
    """
    if target.is_encoder_decoder:
        raise UserError("only decoder-only models can skip layers; use a decoder-only target")
    if not 1 <= most_skipped < target.layers:
        raise UserError(f"most_skipped must lie in 1 .. {target.layers - 1} for this target, not {most_skipped}")
    if longest_gamma < 1 or not verify_cost > 0:
        raise UserError(
            f"longest_gamma is {longest_gamma} and verify_cost {verify_cost}; give at least 1 token and a positive cost"
        )
    following = np.arange(1, np.shape(tokens)[1] + 1)[None]
    counted = (following >= np.asarray(starts)[:, None]) & (following < np.asarray(lengths)[:, None])
    if not counted.any():
        raise UserError("there is no text to judge layers by; use more prompts or more new tokens")
    text = jnp.asarray(tokens, jnp.int32), jnp.asarray(counted, jnp.float32)

    def judged(skipped: tuple[int, ...]) -> Choice:
        included = jnp.asarray(~np.isin(np.arange(target.layers), skipped))
        greedy = float(sampling.temperature) == 0
        acceptance = float(_acceptance(target, params, *text, included, sampling, greedy=greedy))
        ratio = cost_ratio(target, skipped)
        return Choice(skipped, acceptance, ratio, *best_gamma(acceptance, ratio, verify_cost, longest_gamma))

    skipped: tuple[int, ...] = ()
    for _ in range(most_skipped):
        rest = [layer for layer in range(target.layers) if layer not in skipped]
        choices = [judged(tuple(sorted((*skipped, layer)))) for layer in rest]
        best = max(choices, key=lambda choice: choice.predicted_speedup)
        yield best
        skipped = best.skipped
