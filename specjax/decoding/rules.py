"""Verification rules: which drafted tokens stand, and which token follows them.

A rule is a frozen callable of (noise, proposal, target probabilities, raw target probabilities) that returns the
number of accepted tokens and the next one. Rows of a proposal from `num_drafted` on count as drafts of probability 0:
then the recovered token and the bonus token come from one formula, max(target - draft, 0), and an empty proposal
is ordinary decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.drafters.base import Proposal
from specjax.decoding.sampling import Noise, Stream
from specjax.runtime.errors import UserError, nearest


def _leading(accepted: Bool[Array, "B gamma"]) -> Int[Array, "B"]:
    """How many tokens stand before the first refusal."""
    gamma = accepted.shape[1]
    index = jnp.arange(gamma, dtype=jnp.int32)[None]
    return jnp.min(jnp.where(accepted, gamma, index), axis=1, initial=gamma).astype(jnp.int32)


def _row_at(rows: Float[Array, "B R V"], index: Int[Array, "B"]) -> Float[Array, "B V"]:
    return jnp.take_along_axis(rows, index[:, None, None], axis=1)[:, 0]


def _draft_row(proposal: Proposal, index: Int[Array, "B"], vocab: int) -> Float[Array, "B V"]:
    """The draft's distribution at `index`, zero from `num_drafted` on."""
    gamma = proposal.tokens.shape[1]
    if gamma == 0:
        return jnp.zeros((index.shape[0], vocab), jnp.float32)
    inside = jnp.minimum(index, gamma - 1)
    if proposal.probs is None:
        row = jax.nn.one_hot(jnp.take_along_axis(proposal.tokens, inside[:, None], axis=1)[:, 0], vocab)
    else:
        row = _row_at(proposal.probs, inside)
    return jnp.where((index < proposal.num_drafted)[:, None], row, 0)


@dataclasses.dataclass(frozen=True)
class Lossless:
    """Speculative sampling (arXiv 2211.17192, algorithm 1): accept y iff r * draft(y) < target(y).

    Output law: exactly the adjusted target's, at any temperature; at temperature 0 both are one-hot and this is
    greedy decoding. The comparison is strict because uniforms include 0, which `<=` would let accept a token that
    the target gives probability 0.
    """

    shared_noise = False

    def __call__(
        self,
        noise: Noise,
        proposal: Proposal,
        target_probs: Float[Array, "B gamma_plus_1 V"],
        raw_target_probs: Float[Array, "B gamma_plus_1 V"] | None,
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        del raw_target_probs
        gamma = proposal.tokens.shape[1]
        at_token = lambda rows: jnp.take_along_axis(rows, proposal.tokens[..., None], axis=2)[..., 0]
        target_at = at_token(target_probs[:, :gamma])
        draft_at = jnp.ones_like(target_at) if proposal.probs is None else at_token(proposal.probs)
        drafted = jnp.arange(gamma, dtype=jnp.int32)[None] < proposal.num_drafted[:, None]
        num_accepted = _leading((noise.uniforms(gamma) * draft_at < target_at) & drafted)
        target_row = _row_at(target_probs, num_accepted)
        residual = jnp.maximum(target_row - _draft_row(proposal, num_accepted, target_probs.shape[-1]), 0)
        # A refusal means target < draft somewhere, so some token has target > draft, except by rounding when the
        # two distributions agree to the last bit; then the target itself is the residual's limit.
        empty = jnp.max(residual, axis=-1, keepdims=True) <= 0
        residual = jnp.where(empty, target_row, residual)
        return num_accepted, noise.choose(residual, num_accepted, Stream.RECOVER)


@dataclasses.dataclass(frozen=True)
class Coupled:
    """Draft and target take the argmax of log-probability plus the same position-keyed Gumbel noise (arXiv 2408.07978).

    Output law: exactly the adjusted target's; more, the output is token for token what plain decoding with that
    noise emits, for any drafter and gamma, because a draft stands only where it equals the target's own choice.
    """

    shared_noise = True

    def __call__(
        self,
        noise: Noise,
        proposal: Proposal,
        target_probs: Float[Array, "B gamma_plus_1 V"],
        raw_target_probs: Float[Array, "B gamma_plus_1 V"] | None,
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        del raw_target_probs
        batch, gamma = proposal.tokens.shape
        choices = [
            noise.choose(target_probs[:, i], jnp.full((batch,), i, jnp.int32), Stream.RECOVER) for i in range(gamma + 1)
        ]
        chosen = jnp.stack(choices, axis=1)
        drafted = jnp.arange(gamma, dtype=jnp.int32)[None] < proposal.num_drafted[:, None]
        num_accepted = _leading((chosen[:, :gamma] == proposal.tokens) & drafted)
        return num_accepted, jnp.take_along_axis(chosen, num_accepted[:, None], axis=1)[:, 0]


RULES = {"lossless": Lossless(), "coupled": Coupled()}


def rule_named(name: str):
    """The rule called `name`. Raises UserError for an unknown one."""
    if name not in RULES:
        raise UserError(f"Unknown rule {name!r}{nearest(name, RULES)}.")
    return RULES[name]
