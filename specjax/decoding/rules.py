"""Verification rules: which drafted tokens are accepted, and which token follows them.

Rows of a proposal from `num_drafted` on count as drafts of probability 0. Then the recovered token and the bonus token
come from one formula, max(target - draft, 0), and an empty proposal is ordinary decoding.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding.drafters.base import Proposal
from specjax.decoding.sampling import Noise, Stream
from specjax.runtime.errors import UserError
from specjax.runtime.extensions import named


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossyInputs:
    """What a lossy rule uses in addition to the target's adjusted probabilities.

    Attributes:
      lenience: epsilon in (0, 1]; smaller accepts more. Traced.
      raw_target_probs: with greedy decoding the target's softmax at temperature 1, not cut; None otherwise. Greedy
        target probabilities are one-hot, and no lenience raises a probability of 0.
    """

    lenience: Float[Array, ""]
    raw_target_probs: Float[Array, "B gamma_plus_1 V"] | None


class Rule:
    """What the decoding loop asks of a rule. Subclasses are frozen dataclasses, so that they can be compile keys.

    Attributes:
      shared_noise: draft and target draw a position's token by the same noise; plain decoding does too.
      lossy: the rule departs from the target's law, and takes a lenience.
    """

    shared_noise: bool = False
    lossy: bool = False

    def __call__(
        self,
        noise: Noise,
        proposal: Proposal,
        target_probs: Float[Array, "B gamma_plus_1 V"],
        inputs: LossyInputs | None,
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """The number of accepted tokens of each row, and the token after them. `inputs` is None for an exact rule."""
        raise NotImplementedError


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


def _at_tokens(rows: Float[Array, "B R V"], proposal: Proposal) -> Float[Array, "B gamma"]:
    """The entry of each row for the token drafted there."""
    gamma = proposal.tokens.shape[1]
    return jnp.take_along_axis(rows[:, :gamma], proposal.tokens[..., None], axis=2)[..., 0]


def _draft_at_tokens(proposal: Proposal) -> Float[Array, "B gamma"]:
    """The draft's probability of each drafted token, 1 where the draft is deterministic."""
    if proposal.probs is None:
        return jnp.ones(proposal.tokens.shape, jnp.float32)
    return _at_tokens(proposal.probs, proposal)


def _num_accepted(accepted: Bool[Array, "B gamma"], proposal: Proposal) -> Int[Array, "B"]:
    """The number of drafted tokens before the first that is not accepted, or was not drafted."""
    gamma = accepted.shape[1]
    index = jnp.arange(gamma, dtype=jnp.int32)[None]
    accepted &= index < proposal.num_drafted[:, None]
    return jnp.min(jnp.where(accepted, gamma, index), axis=1, initial=gamma).astype(jnp.int32)


def _from_residual(
    noise: Noise, proposal: Proposal, target_probs: Float[Array, "B gamma_plus_1 V"], num_accepted: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Draws the token after the accepted ones in proportion to max(target - draft, 0)."""
    target_row = _row_at(target_probs, num_accepted)
    residual = jnp.maximum(target_row - _draft_row(proposal, num_accepted, target_probs.shape[-1]), 0)
    # A rejection means target < draft for some token, so another has target > draft, except by rounding where the two
    # distributions agree to the last bit; then the target itself is the limit of the residual.
    empty = jnp.max(residual, axis=-1, keepdims=True) <= 0
    residual = jnp.where(empty, target_row, residual)
    return noise.choose(residual, num_accepted, Stream.RECOVER)


@dataclasses.dataclass(frozen=True)
class Lossless(Rule):
    """Speculative sampling (arXiv 2211.17192, algorithm 1): accept y iff r * draft(y) < target(y).

    Output law: exactly the adjusted target's, at any temperature; at temperature 0 both are one-hot and this is
    greedy decoding. The comparison is strict because uniforms include 0, and `<=` would then accept a token that the
    target gives probability 0.
    """

    def __call__(self, noise, proposal, target_probs, inputs):
        uniforms = noise.uniforms(proposal.tokens.shape[1])
        accepted = uniforms * _draft_at_tokens(proposal) < _at_tokens(target_probs, proposal)
        num_accepted = _num_accepted(accepted, proposal)
        return num_accepted, _from_residual(noise, proposal, target_probs, num_accepted)


@dataclasses.dataclass(frozen=True)
class Coupled(Rule):
    """Draft and target take the argmax of log-probability plus the same position-keyed Gumbel noise (arXiv 2408.07978).

    Output law: exactly the adjusted target's. Moreover the output is token for token what plain decoding with that
    noise emits, for any drafter and gamma, because a draft is accepted only where it equals the target's own choice.
    """

    shared_noise = True

    def __call__(self, noise, proposal, target_probs, inputs):
        batch, gamma = proposal.tokens.shape
        choices = [
            noise.choose(target_probs[:, i], jnp.full((batch,), i, jnp.int32), Stream.RECOVER) for i in range(gamma + 1)
        ]
        chosen = jnp.stack(choices, axis=1)
        num_accepted = _num_accepted(chosen[:, :gamma] == proposal.tokens, proposal)
        return num_accepted, jnp.take_along_axis(chosen, num_accepted[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Lenient(Rule):
    """Speculative sampling in which the target's probability p of a drafted token counts as f(p, epsilon) >= p.

    Accept y iff r * draft(y) < f(p(y), epsilon), strictly; after a rejection recover from max(p - draft, 0), with both
    distributions unmodified (DistillSpec, arXiv 2310.08461). A drafted position then emits

      P(x) = min(q(x), f(p(x))) + D * max(p(x) - q(x), 0),   D = sum(q - min(q, f(p))) / sum(p - min(p, q)),

    with q the draft's law (arXiv 2607.26627, equations 10 and 11, where f is p / epsilon); a bonus token follows p. No
    token is likelier than f(p), and f(0) is 0: what the target excludes (by top-k, by top-p, as an id that it lacks) is
    never accepted. Lossy; `lossless` bit for bit at epsilon 1.

    At temperature 0 p and q are one-hot, and f is applied to the target's probabilities at temperature 1: a drafted
    token is accepted iff it is the target's most probable one, or f of its probability is above the largest. The token
    after the accepted ones is the target's most probable one.

    Attributes:
      f: (p, epsilon) -> f(p, epsilon).
    """

    f: Callable[[Array, Array], Array]
    lossy = True

    def __call__(self, noise, proposal, target_probs, inputs):
        target_at, raw = _at_tokens(target_probs, proposal), inputs.raw_target_probs
        if raw is None:
            uniforms = noise.uniforms(proposal.tokens.shape[1])
            accepted = uniforms * _draft_at_tokens(proposal) < self.f(target_at, inputs.lenience)
        else:
            largest = jnp.max(raw, axis=-1)[:, : proposal.tokens.shape[1]]
            accepted = (target_at > 0) | (self.f(_at_tokens(raw, proposal), inputs.lenience) > largest)
        num_accepted = _num_accepted(accepted, proposal)
        return num_accepted, _from_residual(noise, proposal, target_probs, num_accepted)


def linear(probs: Array, lenience: Array) -> Array:
    """p / epsilon."""
    return probs / lenience


def square(probs: Array, lenience: Array) -> Array:
    """p / epsilon ** 2."""
    return probs / lenience / lenience  # the square of a small epsilon would be 0, and 0 / 0 no number


def exponential(probs: Array, lenience: Array) -> Array:
    """p ** epsilon: as epsilon goes to 0 the output becomes the draft's own law, less what the target excludes."""
    return jnp.where(lenience == 1, probs, probs**lenience)  # a power of 1 may round


@dataclasses.dataclass(frozen=True)
class Typical(Rule):
    """Typical acceptance (Medusa, arXiv 2401.10774): a reference point that does not use the draft's law.

    Accept y iff p(y) > min(epsilon, sqrt(epsilon) * exp(-H(p))), H the entropy of the target's law p; the token after
    the accepted ones is drawn from p itself. Output law of a drafted position:

      P(x) = q(x) * [x is accepted] + p(x) * (1 - sum of q over what is accepted),

    with q the draft's law; a bonus token follows p. Lossy at every epsilon, 1 included. At temperature 0 the threshold
    uses the target's probabilities at temperature 1, its most probable token is always accepted, and the token after
    the accepted ones is the most probable one.
    """

    lossy = True

    def __call__(self, noise, proposal, target_probs, inputs):
        raw = inputs.raw_target_probs
        probs = target_probs if raw is None else raw
        entropy = jnp.sum(jax.scipy.special.entr(probs[:, : proposal.tokens.shape[1]]), axis=-1)
        threshold = jnp.minimum(inputs.lenience, jnp.sqrt(inputs.lenience) * jnp.exp(-entropy))
        accepted = _at_tokens(probs, proposal) > threshold
        if raw is not None:
            accepted |= _at_tokens(target_probs, proposal) > 0
        num_accepted = _num_accepted(accepted, proposal)
        return num_accepted, noise.choose(_row_at(target_probs, num_accepted), num_accepted, Stream.RECOVER)


RULES: dict[str, Rule] = {
    "lossless": Lossless(),
    "coupled": Coupled(),
    "lenient_linear": Lenient(linear),
    "lenient_square": Lenient(square),
    "lenient_exp": Lenient(exponential),
    "typical": Typical(),
}


def rule_named(name: str) -> Rule:
    """The rule called `name`: a key of `RULES`, or "path/to/file.py:Name" of a user's own, the class or an instance.

    Raises:
      UserError: for an unknown name, and for what is no Rule.
    """
    rule = named(name, RULES, "rule")
    rule = rule() if isinstance(rule, type) and issubclass(rule, Rule) else rule
    if not isinstance(rule, Rule):
        raise UserError(f'rule "{name}" must be a subclass of specjax.decoding.rules.Rule, or an instance of one')
    return rule
