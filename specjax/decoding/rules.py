"""Verification rules: which drafted tokens are accepted, and which token follows them.

Positions from `num_drafted` on have draft probability 0 for every token. Then one formula, max(target - draft, 0),
gives the distribution of the recovered token and of the bonus token, and an empty proposal is plain decoding.

A draft with a reduced head has distributions over its own ids, and probability 0 for all others. Rules look up the
drafted tokens there, and spread one row per text over all ids, that of the residual.
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
      raw_target_probs: in greedy decoding the target's probabilities at temperature 1 without top-k and top-p, because
        the adjusted ones are one-hot; None otherwise.
    """

    lenience: Float[Array, ""]
    raw_target_probs: Float[Array, "B gamma_plus_1 V"] | None


class Rule:
    """Base class of rules. Subclasses are frozen dataclasses, because they are static arguments of compiled code.

    Attributes:
      shared_noise: whether draft and target use the same random numbers for a position, as plain decoding then does.
      block_noise: whether each block has random numbers of its own, which a rule needs if drafted tokens after the
        accepted ones influence how many are accepted; otherwise the next block uses those of the same positions again.
      lossy: whether the output distribution can differ from the target's; such a rule uses a lenience.
    """

    shared_noise: bool = False
    block_noise: bool = False
    lossy: bool = False

    def __call__(
        self,
        noise: Noise,
        proposal: Proposal,
        target_probs: Float[Array, "B gamma_plus_1 V"],
        inputs: LossyInputs | None,
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """The number of accepted tokens `[B]`, and the token `[B]` after them. `inputs` is None for an exact rule."""
        raise NotImplementedError


def _row_at(rows: Float[Array, "B R V"], index: Int[Array, "B"]) -> Float[Array, "B V"]:
    return jnp.take_along_axis(rows, index[:, None, None], axis=1)[:, 0]


def _draft_rows(
    proposal: Proposal,
    tokens: Int[Array, "B R"],
    probs: Float[Array, "B R W"] | None,
    drafted: Bool[Array, "B R"],
    vocab: int,
) -> Float[Array, "B R V"]:
    """The draft's distributions over all ids, from some rows of the proposal; zero where no token is drafted."""
    if probs is None:
        rows = jax.nn.one_hot(tokens, vocab)
    else:
        rows = probs if proposal.vocabulary is None else proposal.vocabulary.spread(probs, vocab, 0.0)
        if proposal.one_hot is not None:
            rows = jnp.where(proposal.one_hot[:, None, None], jax.nn.one_hot(tokens, vocab), rows)
    # `rows > 0` leaves out what is not a number.
    return jnp.where(drafted[..., None] & (rows > 0), rows, 0)


def _draft_row(proposal: Proposal, index: Int[Array, "B"], vocab: int) -> Float[Array, "B V"]:
    """The draft's distribution at `index`, zero from `num_drafted` on."""
    gamma = proposal.tokens.shape[1]
    if gamma == 0:
        return jnp.zeros((index.shape[0], vocab), jnp.float32)
    inside = jnp.minimum(index, gamma - 1)[:, None]
    tokens = jnp.take_along_axis(proposal.tokens, inside, axis=1)
    probs = None if proposal.probs is None else jnp.take_along_axis(proposal.probs, inside[..., None], axis=1)
    return _draft_rows(proposal, tokens, probs, (index < proposal.num_drafted)[:, None], vocab)[:, 0]


def _at_tokens(rows: Float[Array, "B R V"], proposal: Proposal) -> Float[Array, "B gamma"]:
    """The probability in `rows` of each drafted token at its position."""
    gamma = proposal.tokens.shape[1]
    return jnp.take_along_axis(rows[:, :gamma], proposal.tokens[..., None], axis=2)[..., 0]


def _draft_at_tokens(proposal: Proposal) -> Float[Array, "B gamma"]:
    """The draft's probability of each drafted token, 1 where the draft is deterministic."""
    if proposal.probs is None:
        return jnp.ones(proposal.tokens.shape, jnp.float32)
    if proposal.vocabulary is None:
        drawn = _at_tokens(proposal.probs, proposal)
    else:
        columns, inside = proposal.vocabulary.columns(proposal.tokens)
        drawn = jnp.where(inside, jnp.take_along_axis(proposal.probs, columns[..., None], axis=2)[..., 0], 0)
    return drawn if proposal.one_hot is None else jnp.where(proposal.one_hot[:, None], 1, drawn)


def _num_accepted(accepted: Bool[Array, "B gamma"], proposal: Proposal) -> Int[Array, "B"]:
    """The number of accepted tokens in each row before the first that is not accepted or was not drafted.

    A token of draft probability 0 was not drawn from the draft's distribution, which was not finite; it is refused.
    """
    gamma = accepted.shape[1]
    index = jnp.arange(gamma, dtype=jnp.int32)[None]
    accepted &= (index < proposal.num_drafted[:, None]) & (_draft_at_tokens(proposal) > 0)
    return jnp.min(jnp.where(accepted, gamma, index), axis=1, initial=gamma).astype(jnp.int32)


def _from_residual(
    noise: Noise,
    proposal: Proposal,
    target_probs: Float[Array, "B gamma_plus_1 V"],
    num_accepted: Int[Array, "B"],
    scale: Float[Array, "B"] | None = None,
) -> Int[Array, "B"]:
    """Draws the token after the accepted ones from the normalised max(scale * target - draft, 0); None: scale 1."""
    target_row = _row_at(target_probs, num_accepted)
    scaled = target_row if scale is None else scale[:, None] * target_row
    residual = jnp.maximum(scaled - _draft_row(proposal, num_accepted, target_probs.shape[-1]), 0)
    # After a rejection target < draft for some token, so target > draft for another one. Only rounding can make the
    # residual empty, if both distributions are equal except for the last bit; then draw from the target.
    empty = jnp.max(residual, axis=-1, keepdims=True) <= 0
    residual = jnp.where(empty, target_row, residual)
    return noise.choose(residual, num_accepted, Stream.RECOVER)


def _accept_choices(
    noise: Noise, proposal: Proposal, target_probs: Float[Array, "B gamma_plus_1 V"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Accepts the drafted tokens that equal the target's choices; the token after them is the target's choice."""
    gamma = proposal.tokens.shape[1]
    choose = lambda probs, offset: noise.choose(probs, jnp.full_like(noise.lengths, offset), Stream.RECOVER)
    chosen = jax.vmap(choose, (1, 0), 1)(target_probs, jnp.arange(gamma + 1, dtype=jnp.int32))
    num_accepted = _num_accepted(chosen[:, :gamma] == proposal.tokens, proposal)
    return num_accepted, jnp.take_along_axis(chosen, num_accepted[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Lossless(Rule):
    """Speculative sampling (arXiv 2211.17192, algorithm 1): accept y iff r * draft(y) < target(y).

    The output distribution is exactly the adjusted target's. At temperature 0 both distributions are one-hot, and the
    output is that of greedy decoding. The comparison is strict because r can be 0, and `<=` would then accept a token
    with target probability 0.
    """

    def __call__(self, noise, proposal, target_probs, inputs):
        if noise.greedy:
            return _accept_choices(noise, proposal, target_probs)
        uniforms = noise.uniforms(proposal.tokens.shape[1])
        accepted = uniforms * _draft_at_tokens(proposal) < _at_tokens(target_probs, proposal)
        num_accepted = _num_accepted(accepted, proposal)
        return num_accepted, _from_residual(noise, proposal, target_probs, num_accepted)


@dataclasses.dataclass(frozen=True)
class Block(Rule):
    """Block verification (arXiv 2403.10444, algorithm 2): accepts the longest part of the draft that passes.

    With p the target's and q the draft's distribution after the first i drafted tokens, and x the token drafted next,

      w(0) = 1,   w(i + 1) = min(w(i) * p(x) / q(x), 1)
      h(i) = R / (R + 1 - w(i)),   R = sum of max(w(i) * p - q, 0) over all tokens;   h(i) = w(i) after the last token

    the first i tokens pass with probability h(i), independently, and the next token is drawn from max(w(i) * p - q, 0).
    The output distribution is exactly the adjusted target's, also if the draft stops depending on the tokens drawn so
    far: the first i tokens of a draft are accepted with probability w(i), at least that of `lossless`, the product of
    all min(p(x) / q(x), 1). At temperature 0 the output is that of greedy decoding.
    """

    block_noise = True

    def __call__(self, noise, proposal, target_probs, inputs):
        if noise.greedy:
            return _accept_choices(noise, proposal, target_probs)
        tokens, gamma, vocab = proposal.tokens, proposal.tokens.shape[1], target_probs.shape[-1]
        draft_at, target_at = _draft_at_tokens(proposal), _at_tokens(target_probs, proposal)
        weights = [jnp.ones(tokens.shape[:1], jnp.float32)]
        for i in range(gamma):
            product = jnp.minimum(weights[-1] * target_at[:, i] / draft_at[:, i], 1)
            weights.append(jnp.where(draft_at[:, i] > 0, product, 0))  # 0: not drawn, see `_num_accepted`
        weights = jnp.stack(weights, axis=1)
        index = jnp.arange(1, gamma + 1, dtype=jnp.int32)[None]
        follows = index < proposal.num_drafted[:, None]  # whether a token is drafted after the first `index` ones
        probs = None if proposal.probs is None else proposal.probs[:, 1:]
        draft = _draft_rows(proposal, tokens[:, 1:], probs, follows[:, :-1], vocab)
        mass = jnp.sum(jnp.maximum(weights[:, 1:-1, None] * target_probs[:, 1:-1] - draft, 0), axis=-1)
        mass = jnp.pad(mass, ((0, 0), (0, min(gamma, 1))))
        # A target that is not finite ends the draft, so that these rows fail as often as in plain decoding.
        passes = jnp.where(follows & jnp.isfinite(mass), mass / (mass + (1 - weights[:, 1:])), weights[:, 1:])
        passed = (noise.uniforms(gamma) < passes) & (index <= proposal.num_drafted[:, None])
        num_accepted = jnp.max(jnp.where(passed, index, 0), axis=1, initial=0).astype(jnp.int32)
        scale = jnp.take_along_axis(weights, num_accepted[:, None], axis=1)[:, 0]
        return num_accepted, _from_residual(noise, proposal, target_probs, num_accepted, scale)


@dataclasses.dataclass(frozen=True)
class Coupled(Rule):
    """Draft and target take the argmax of log-probability plus the same Gumbel noise per position (arXiv 2408.07978).

    A drafted token is accepted if it equals the target's choice, so for any drafter and gamma the tokens are those of
    plain decoding with the same noise, and their distribution is exactly the adjusted target's.
    """

    shared_noise = True

    def __call__(self, noise, proposal, target_probs, inputs):
        return _accept_choices(noise, proposal, target_probs)


@dataclasses.dataclass(frozen=True)
class Lenient(Rule):
    """Speculative sampling that accepts with f(p, epsilon) >= p in place of the target's probability p.

    Accept y iff r * q(y) < f(p(y), epsilon), with q the draft's distribution and r uniform; after a rejection draw from
    max(p - q, 0), without f (DistillSpec, arXiv 2310.08461). A drafted position then emits

      P(x) = min(q(x), f(p(x))) + D * max(p(x) - q(x), 0),   D = sum(q - min(q, f(p))) / sum(p - min(p, q))

    (arXiv 2607.26627, equations 10 and 11, where f is p / epsilon); a bonus token is drawn from p. P(x) <= f(p(x)), and
    f(0) is 0, so tokens with target probability 0 (by top-k, top-p, or a smaller vocabulary) are never accepted. The
    rule is lossy; at epsilon 1 it equals `lossless` bit for bit.

    At temperature 0, where p and q are one-hot, f is applied to the target's probabilities at temperature 1: a drafted
    token is accepted iff it is the target's most probable one, or f of its probability exceeds the largest one. The
    token after the accepted ones is the target's most probable one.

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
    return probs / lenience / lenience  # epsilon ** 2 can underflow to 0, and 0 / 0 is NaN


def exponential(probs: Array, lenience: Array) -> Array:
    """p ** epsilon: as epsilon goes to 0, every drafted token with positive target probability is accepted."""
    return jnp.where(lenience == 1, probs, probs**lenience)  # probs ** 1 may be rounded


@dataclasses.dataclass(frozen=True)
class Typical(Rule):
    """Typical acceptance (Medusa, arXiv 2401.10774), which does not use the draft's probabilities.

    Accept y iff p(y) > min(epsilon, sqrt(epsilon) * exp(-H(p))), with p the target's distribution and H its entropy;
    the token after the accepted ones is drawn from p. A drafted position emits

      P(x) = q(x) * [x is accepted] + p(x) * (1 - sum of q over accepted tokens),

    with q the draft's distribution; a bonus token is drawn from p. The rule is lossy at every epsilon, including 1. At
    temperature 0 the threshold uses the target's probabilities at temperature 1, the target's most probable token is
    always accepted, and the token after the accepted ones is that one.
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
    "block": Block(),
    "coupled": Coupled(),
    "lenient_linear": Lenient(linear),
    "lenient_square": Lenient(square),
    "lenient_exp": Lenient(exponential),
    "typical": Typical(),
}


def rule_named(name: str) -> Rule:
    """The rule called `name`: a key of `RULES`, or "path/to/file.py:Name" of a user's own subclass or instance of Rule.

    Raises:
      UserError: for an unknown name, and for an object that is not a Rule.
    """
    rule = named(name, RULES, "rule")
    rule = rule() if isinstance(rule, type) and issubclass(rule, Rule) else rule
    if not isinstance(rule, Rule):
        raise UserError(f'rule "{name}" must be a subclass of specjax.decoding.rules.Rule, or an instance of one')
    return rule
