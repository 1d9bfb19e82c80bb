"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the last n-gram in the row's own text."""

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
    """Options of prompt lookup. Its drafts have no probabilities, so there is no threshold.

    Attributes:
      shortest: minimum number of matching tokens.
      longest: maximum number of tokens that are compared.
    """

    shortest: int = 2
    longest: int = 4

    def build(self, target: LanguageModel, gamma: int, loaded: None) -> "NGramDrafter":
        if not 1 <= self.shortest <= self.longest:
            raise UserError(
                f"ngram needs 1 <= shortest <= longest, not shortest={self.shortest}, longest={self.longest}"
            )
        return NGramDrafter(gamma, self.shortest, self.longest, target.is_encoder_decoder)


@dataclasses.dataclass(frozen=True)
class NGramDrafter(Drafter):
    """Copies the tokens after the longest earlier match of the row's last tokens, the latest one of equally long ones.

    If the text ends before gamma tokens are copied, the copy continues from its own beginning: the text then repeats
    with the distance to the match as its period. A match has `shortest` to `longest` tokens; without a match nothing is
    drafted. The proposal is deterministic, so its distribution is one-hot.

    Attributes:
      encodes: whether the target is an encoder-decoder, whose prompt is also searched.
    """

    gamma: int
    shortest: int
    longest: int
    encodes: bool = False

    def start(self, params, target_params, prompts: Prompts):
        return Encoded(prompts.tokens, prompts.lengths) if self.encodes else ()

    def propose(self, params, target_params, state: Encoded | tuple[()], target_cache, context: Context):
        tokens, lengths = context.tokens, context.lengths
        if self.encodes:
            tokens = jnp.pad(state.tokens, ((0, 0), (0, tokens.shape[1])))
            tokens = kv_cache.write_rows(tokens, context.tokens, state.lengths, axis=1)
            lengths = lengths + state.lengths
        ends = jnp.arange(tokens.shape[1])[None]
        matched = jnp.zeros_like(tokens)
        unbroken = ends < lengths[:, None] - 1
        for back in range(self.longest):
            earlier = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, : tokens.shape[1]]
            current = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
            unbroken &= (earlier == current) & (lengths > back)[:, None]
            matched += unbroken.astype(matched.dtype)
        has_match = jnp.max(matched, axis=1) >= self.shortest
        end = jnp.argmax(matched * tokens.shape[1] + ends, axis=1).astype(lengths.dtype)
        period = jnp.maximum(lengths - 1 - end, 1)
        source = end[:, None] + 1 + jnp.arange(self.gamma)[None] % period[:, None]
        drafted = jnp.take_along_axis(tokens, jnp.minimum(source, tokens.shape[1] - 1), axis=1)
        proposal = Proposal(drafted, None, jnp.where(has_match, self.gamma, 0).astype(jnp.int32))
        return proposal, state, target_cache
