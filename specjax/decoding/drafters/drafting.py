"""Drafting token by token until a row is unsure: what drafters with probabilities have in common."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.drafters.base import Context, Proposal

# step(tokens [B], offset, carry) -> (logits [B, V], carry): feeds the token at `lengths + offset - 1`.
Step = Callable[[Int[Array, "B"], Any, Any], tuple[Float[Array, "B V"], Any]]


def unsure(logits: Float[Array, "B V"], threshold: Float[Array, ""]) -> Bool[Array, "B"]:
    """Whether the largest probability at temperature 1 is below the threshold (arXiv 2404.18911, section 3.2).

    The temperature of sampling does not enter: what is cut to its best tokens would always look sure.
    """
    logits = logits.astype(jnp.float32)
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)) < threshold


def draft(
    context: Context,
    gamma: int,
    logits: Float[Array, "B V"],
    carry: Any,
    step: Step,
    *,
    stops: bool,
    adjusted: bool = False,
) -> tuple[Proposal, Int[Array, "B"], Int[Array, ""], Any]:
    """Draws from `logits`, then from what `step` makes of each token, until gamma are drafted or every row stopped.

    A row stops behind a token from whose distribution it was unsure. That token is kept and verified, and the stop
    asks nothing of its value, so the output law is the target's whatever the threshold (traced, of `Sampling`).
    Stopped and finished rows run along; what they draft does not count.

    Args:
      logits: from which the first token is drawn.
      stops: whether rows stop at all; otherwise confidence is not computed.
      adjusted: judges by the probabilities that tokens are drawn from, after temperature, top-k and top-p, in place of
        those at temperature 1 (arXiv 2404.18911 measures both). Greedy drafting is then never unsure.

    Returns:
      the proposal, the last tokens drawn, how many steps of drafting the longest row took, and the carry.
    """
    batch = context.lengths.shape[0]

    def add(offset, logits, counts, stopped, drafted):
        token, probs = context.draw(logits, offset)
        put = lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, offset, 0)
        counts = counts + jnp.where(stopped, 0, 1)
        if stops and not adjusted:
            stopped |= unsure(logits, context.sampling.threshold)
        elif stops and probs is not None:
            stopped |= jnp.max(probs, axis=-1) < context.sampling.threshold
        return token, counts, stopped, jax.tree.map(put, drafted, (token, probs))

    def more(state):
        offset, _, _, stopped, _, _ = state
        return (offset < gamma) & ~jnp.all(stopped) if stops else offset < gamma

    def body(state):
        offset, token, counts, stopped, drafted, carry = state
        logits, carry = step(token, offset, carry)
        return offset + 1, *add(offset, logits, counts, stopped, drafted), carry

    probs = None if context.noise.greedy else jnp.zeros((gamma, *logits.shape), jnp.float32)
    drafted = jnp.zeros((gamma, batch), jnp.int32), probs
    stopped = ~context.live if stops else jnp.zeros((batch,), bool)
    first = add(0, logits, jnp.zeros((batch,), jnp.int32), stopped, drafted)
    offset, token, counts, _, drafted, carry = jax.lax.while_loop(more, body, (jnp.int32(1), *first, carry))
    tokens, probs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drafted)
    return Proposal(tokens, probs, counts), token, offset, carry
