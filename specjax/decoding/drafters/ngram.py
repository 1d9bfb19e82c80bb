"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the last n-gram in the row's own text."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.decoding.drafters.base import Context, Drafter, DrafterOptions, Outcome, Prefill, Proposal
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """Prompt and text of each row: `tokens[b, :lengths[b]]`.

    Attributes:
      tokens: the committed text; for an encoder-decoder the encoder's prompt comes first.
      lengths: number of these tokens in each row.
    """

    tokens: Int[Array, "B S"] = axes("batch", None)
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
        return NGramDrafter(gamma, self.shortest, self.longest)


@dataclasses.dataclass(frozen=True)
class NGramDrafter(Drafter):
    """Copies the tokens after the longest earlier match of the row's last tokens, the latest one of equally long ones.

    If the text ends before gamma tokens are copied, the copy continues from its own beginning: the text then repeats
    with the distance to the match as its period. A match has `shortest` to `longest` tokens; without a match nothing is
    drafted. The proposal is deterministic, so its distribution is one-hot.
    """

    gamma: int
    shortest: int
    longest: int

    def init(self, params, target_params, prefill: Prefill, row_keys):
        if prefill.texts is prefill.prompts:
            padding = prefill.capacity - prefill.prompts.shape[1]
            return History(jnp.pad(prefill.prompts, ((0, 0), (0, padding))), prefill.lengths)
        tokens = jnp.pad(prefill.prompts, ((0, 0), (0, prefill.capacity)))
        tokens = kv_cache.write_rows(tokens, prefill.texts, prefill.lengths, axis=1)
        return History(tokens, prefill.lengths + prefill.text_lengths)

    def propose(self, params, target_params, state: History, target_cache, context: Context):
        tokens, lengths = state.tokens, state.lengths
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

    def commit(self, params, state: History, outcome: Outcome):
        tokens = kv_cache.write_rows(state.tokens, outcome.tokens, state.lengths, axis=1)
        return History(tokens, state.lengths + outcome.num_emitted)
