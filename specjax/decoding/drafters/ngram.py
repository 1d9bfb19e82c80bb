"""Prompt lookup: drafts the tokens that followed earlier occurrences of the last n-gram in the row's own text."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.decoding.drafters.base import Context, Drafter, DrafterOptions, Prompts, Proposal
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """The encoder's prompts, `tokens[b, :lengths[b]]`, which precede the text."""

    tokens: Int[Array, "B P"] = axes("batch", None)
    lengths: Int[Array, "B"] = axes("batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGram(DrafterOptions):
    """Options of prompt lookup. The defaults accept the most tokens; a threshold of 0.1 or 0.2 drafts half as many.

    Attributes:
      shortest: minimum number of matching tokens.
      longest: maximum number of tokens that are compared.
      threshold: a row's draft ends before the estimated chance that all its tokens are right falls below this; 0 always
        drafts gamma tokens if there is a match.
    """

    shortest: int = 1
    longest: int = 16
    threshold: float = 0.0

    def build(self, target: LanguageModel, gamma: int, loaded: None) -> "NGramDrafter":
        if not 1 <= self.shortest <= self.longest:
            raise UserError(
                f"ngram needs 1 <= shortest <= longest, not shortest={self.shortest}, longest={self.longest}"
            )
        return NGramDrafter(gamma, self.shortest, self.longest, target.is_encoder_decoder, self.threshold > 0)


# Number of matches that vote; with 64 of them no more tokens were accepted.
_VOTERS = 8
# A match of n tokens has 4 ** n votes, up to a limit far from float32's. A token of which no match knows has 4 ** 2.
_BASE, _UNKNOWN, _MOST = 4.0, 2, 30


@dataclasses.dataclass(frozen=True)
class NGramDrafter(Drafter):
    """Drafts what most often followed earlier matches of the row's last tokens.

    The longest matches, of equally long ones the latest, vote for the next token: each for the one that follows it, a
    match of n tokens with 4 ** n votes. After each drafted token only the matches that it continues vote again, with
    one token more. On a tie the longest, then latest match decides. A continuation that reaches the end of the text
    repeats from its own beginning: the text then has the distance to the match as its period. Matches have `shortest`
    to `longest` tokens; without a match nothing is drafted. The proposal is deterministic, so its distribution is
    one-hot.

    Attributes:
      encodes: whether the target is an encoder-decoder, whose prompt is also searched.
      stops: whether the threshold is used. A token's chance is estimated as its share of the votes.
    """

    gamma: int
    shortest: int
    longest: int
    encodes: bool = False
    stops: bool = False
    looks_up = True

    @classmethod
    def usual(cls, gamma: int, *, encodes: bool, stops: bool) -> "NGramDrafter":
        """The drafter with the default lengths of `NGram`."""
        return cls(gamma, NGram.shortest, NGram.longest, encodes, stops)

    @property
    def idles(self):
        return self.stops

    def start(self, params, target_params, prompts: Prompts):
        return Encoded(prompts.tokens, prompts.lengths) if self.encodes else ()

    def propose(self, params, target_params, state: Encoded | tuple[()], target_cache, context: Context):
        tokens, lengths = context.tokens, context.lengths
        if self.encodes:
            tokens = jnp.pad(state.tokens, ((0, 0), (0, tokens.shape[1])))
            tokens = kv_cache.write_rows(tokens, context.tokens, state.lengths, axis=1)
            lengths = lengths + state.lengths
        ends, matched = self._matches(tokens, lengths)
        last = jnp.maximum(lengths - 1, 0)[:, None]
        steps = jnp.arange(self.gamma, dtype=jnp.int32)[None, None]
        source = ends[..., None] + 1 + steps % jnp.maximum(last - ends, 1)[..., None]
        source = jnp.minimum(source, tokens.shape[1] - 1).reshape(lengths.shape[0], -1)
        continuations = jnp.take_along_axis(tokens, source, axis=1).reshape(*ends.shape, self.gamma)

        def vote(carry, voted):
            """The next token, from each match's own, and the estimated chance that the draft is right so far."""
            follows, length, chance = carry
            votes = jnp.where(follows, _BASE ** jnp.minimum(length, min(self.longest, _MOST)).astype(jnp.float32), 0)
            sums = jnp.sum(jnp.where(voted[:, :, None] == voted[:, None], votes[:, None], 0), axis=-1)
            winner = jnp.argmax(jnp.where(follows, sums, -1), axis=1)[:, None]
            token = jnp.take_along_axis(voted, winner, axis=1)
            share = jnp.take_along_axis(sums, winner, axis=1)[:, 0] / (jnp.sum(votes, axis=1) + _BASE**_UNKNOWN)
            return (follows & (voted == token), length + 1, chance * share), (token[:, 0], chance * share)

        carry = matched >= self.shortest, matched, jnp.ones(lengths.shape, jnp.float32)
        _, (drafted, chances) = jax.lax.scan(vote, carry, jnp.moveaxis(continuations, 2, 0))
        likely = (chances > 0) & (chances >= context.sampling.threshold)
        counts = jnp.sum(likely, axis=0, dtype=jnp.int32)
        proposal = Proposal(drafted.T, None, counts)
        return proposal, state, target_cache

    def _matches(self, tokens: Int[Array, "B S"], lengths: Int[Array, "B"]) -> tuple[Int[Array, "B K"], ...]:
        """The positions of the last tokens of the best matches, longest and then latest first, and their lengths."""
        slots = tokens.shape[1]
        positions = jnp.arange(slots, dtype=jnp.int32)[None]
        matched = jnp.zeros_like(tokens)
        unbroken = positions < lengths[:, None] - 1
        for back in range(self.longest):
            earlier = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :slots]
            current = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
            unbroken &= (earlier == current) & (lengths > back)[:, None]
            matched += unbroken.astype(matched.dtype)
        # One number for length and position, so that each voter is the largest below the one before it.
        order = matched * slots + positions

        def next_best(last, _):
            best = jnp.max(jnp.where(order < last[:, None], order, 0), axis=1)
            return best, best

        voters = jax.lax.scan(next_best, jnp.full_like(lengths, 2**31 - 1), length=_VOTERS)[1].T
        return voters % slots, voters // slots
