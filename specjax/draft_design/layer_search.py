"""Which layers of a target to leave out so that the rest drafts for it: a greedy search by acceptance and cost.

The search of Draft & Verify (arXiv 2309.08168, section 3.3) made small: whole layers, added one by one, in place of a
Bayesian optimisation over attention and MLP parts. Its candidates are judged without decoding: acceptance is the
overlap of target and draft on a text of the target's own, cost the parameters that a step reads, and both make the
speed-up of drafting gamma tokens at a time, whatever gamma is best.
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
from specjax.models.language_model import LanguageModel, Params, consecutive
from specjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Choice:
    """A draft made of a target's layers, and what it promises.

    Attributes:
      skipped: the layers left out, ascending.
      acceptance: mean overlap sum_v min(target, draft) over the text.
      cost_ratio: what a draft step reads, relative to a step of the target.
      gamma: at which drafting is predicted to be fastest.
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
    kept: Bool[Array, "L"],
    sampling: Sampling,
    *,
    greedy: bool,
) -> Float[Array, ""]:
    """Mean overlap over the counted positions. Which layers are kept is traced: all candidates share one executable.

    The draft's states come from kept layers all along the text, while in decoding the committed tokens have the whole
    target's keys and values: what is measured here is a little too low.
    """
    positions = consecutive(tokens)
    whole, _ = target.extend(params, None, tokens, positions)
    hidden, _ = target.extend(params, None, tokens, positions, layers=(0, 0))
    for layer in range(target.layers):
        after, _ = target.extend(params, None, hidden, positions, layers=(layer, layer + 1))
        hidden = jnp.where(kept[layer], after, hidden)
    law = lambda states: probabilities(target.head(params, states), sampling, greedy=greedy)
    overlap = jnp.sum(jnp.minimum(law(whole), law(hidden)), axis=-1)
    return jnp.sum(counted * overlap) / jnp.sum(counted)


def cost_ratio(target: LanguageModel, skipped: tuple[int, ...]) -> float:
    """Parameters that a step of the draft reads, over those of a step of the target."""
    blocks = target.abstract_params()["blocks"]
    left_out = sum(math.prod(x.shape) for layer in skipped for x in jax.tree.leaves(blocks[layer]))
    return 1 - left_out / target.num_step_params


def best_gamma(acceptance: float, cost_ratio: float, verify_cost: float, longest: int) -> tuple[int, float]:
    """The gamma in 1 .. longest of the largest predicted speed-up, and that.

    A block emits 1 + a + .. + a^gamma tokens where each stands with chance a (arXiv 2211.17192, equation 1), and costs
    gamma draft steps and a verification of `verify_cost` plain steps.
    """
    gammas = np.arange(1, longest + 1)
    speedups = 1 + np.cumsum(acceptance**gammas)
    speedups /= gammas * cost_ratio + verify_cost
    best = int(np.argmax(speedups))
    return best + 1, float(speedups[best])


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
    """The best choice of one layer to leave out, then with it the best second one, and so on up to `most_skipped`.

    Args:
      tokens: right-padded texts; the target's own say most.
      starts: position of each text from which on its tokens count as predicted.
      sampling: at whose temperature acceptance is judged.
      longest_gamma: the longest draft considered.
      verify_cost: seconds of a verification over those of a plain step.

    Raises:
      UserError: for numbers of layers that the target does not have, costs that are not positive, and an
        encoder-decoder.
    """
    if target.is_encoder_decoder:
        raise UserError("layers are chosen of decoder-only models, not of an encoder-decoder; take another target")
    if not 1 <= most_skipped < target.layers:
        raise UserError(f"most_skipped must lie in 1 .. {target.layers - 1} for this target, not {most_skipped}")
    if longest_gamma < 1 or not verify_cost > 0:
        raise UserError(
            f"longest_gamma is {longest_gamma} and verify_cost {verify_cost}; give at least 1 token and a positive cost"
        )
    following = np.arange(1, np.shape(tokens)[1] + 1)[None]
    counted = (following >= np.asarray(starts)[:, None]) & (following < np.asarray(lengths)[:, None])
    if not counted.any():
        raise UserError("there is no text to judge layers by; give more prompts or more new tokens")
    given = jnp.asarray(tokens, jnp.int32), jnp.asarray(counted, jnp.float32)

    def judged(skipped: tuple[int, ...]) -> Choice:
        kept = jnp.asarray(~np.isin(np.arange(target.layers), skipped))
        greedy = float(sampling.temperature) == 0
        acceptance = float(_acceptance(target, params, *given, kept, sampling, greedy=greedy))
        ratio = cost_ratio(target, skipped)
        return Choice(skipped, acceptance, ratio, *best_gamma(acceptance, ratio, verify_cost, longest_gamma))

    skipped: tuple[int, ...] = ()
    for _ in range(most_skipped):
        left = [layer for layer in range(target.layers) if layer not in skipped]
        choices = [judged(tuple(sorted((*skipped, layer)))) for layer in left]
        best = max(choices, key=lambda choice: choice.predicted_speedup)
        yield best
        skipped = best.skipped
