"""PARD (arXiv 2504.18583): a draft model that drafts a block in one forward, as it is trained."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.models.decoder import Decoder
from specjax.models.language_model import LanguageModel, Params, Prediction, consecutive
from specjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ParallelDraft(Decoder):
    """A decoder that learns to draft from mask tokens: after the text up to an anchor follow masks at the next
    positions, and the outputs at the anchor and at the masks predict the tokens after it, independent of each other.

    Attention stays causal, so a mask reads the text up to its anchor and the masks between. It writes text as any
    decoder does, and its export is one with `DecoderConfig.mask_id`.

    Attributes:
      drafted: number of tokens that training drafts from an anchor. Drafts of other lengths are possible in decoding.
    """

    drafted: int = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, model: LanguageModel, *, drafted: int, mask_id: int) -> "ParallelDraft":
        """This model, to be trained so.

        Args:
          mask_id: the id whose embedding stands for a token to draft, best one that no text has; -1 is the one that the
            model was trained with, or else its last.

        Raises:
          UserError: for another model than a decoder, and for values out of range.
        """
        if type(model) is not Decoder:
            raise UserError("pard trains a decoder-only draft model; name one as model.init, or leave the section out")
        config = model.config
        if drafted < 2:
            raise UserError(f"pard.drafted is {drafted}; a block of masks drafts 2 tokens or more")
        if not -1 <= mask_id < config.vocab_size:
            raise UserError(
                f"pard.mask_id is {mask_id}; give an id below the draft's {config.vocab_size}, or -1 for its last"
            )
        if mask_id == -1:
            mask_id = config.vocab_size - 1 if config.mask_id is None else config.mask_id
        config = dataclasses.replace(config, mask_id=mask_id)
        return cls(config, logits_size=model.logits_size, drafted=drafted)

    @property
    def is_sparse(self) -> bool:
        return False  # the divergence alone trains its routers: masks are no text to balance

    @property
    def predicts(self) -> tuple[Prediction, ...]:
        return tuple(Prediction(k, math.exp(-k / self.drafted)) for k in range(self.drafted))

    def training_states(
        self, params: Params, start: Any, tokens: Int[Array, "B T"], anchors: Int[Array, "B K"] | None = None
    ) -> Float[Array, "B K E"]:
        anchors = consecutive(tokens) if anchors is None else anchors
        (batch, length), count = tokens.shape, anchors.shape[1]
        # Masks past the end of the text have no token to predict; only their positions must be valid.
        places = jnp.minimum(anchors[..., None] + jnp.arange(1, self.drafted)[None, None], length - 1)
        places = places.reshape(batch, -1).astype(jnp.int32)
        inputs = jnp.concatenate([tokens, jnp.full_like(places, self.config.mask_id)], axis=1)
        positions = jnp.concatenate([consecutive(tokens), places], axis=1)
        hidden, _ = self.extend(params, start, inputs, positions, self._readable(anchors, length))
        at_anchors = jnp.take_along_axis(hidden[:, :length], anchors[..., None], axis=1)
        at_masks = hidden[:, length:].reshape(batch, count, -1)
        return jnp.concatenate([at_anchors, at_masks], axis=-1)

    def _readable(self, anchors: Int[Array, "B K"], length: int) -> Bool[Array, "B S S"]:
        """Which entries each entry may read, in addition to causality: the text up to its anchor, its own block."""
        blocks = jnp.repeat(jnp.arange(anchors.shape[1]), self.drafted - 1)
        blocks = jnp.concatenate([jnp.full((length,), -1), blocks])
        ends = jnp.repeat(anchors, self.drafted - 1, axis=1)
        ends = jnp.pad(ends, ((0, 0), (length, 0)), constant_values=length)
        entries = jnp.arange(len(blocks))[None, None]
        text = (entries < length) & (entries <= ends[..., None])
        return text | ((blocks[:, None] == blocks[None]) & (blocks >= 0)[None])[None]

    def column_logits(self, params: Params, hidden: Float[Array, "B T E"]) -> Float[Array, "B T_times_drafted W"]:
        """Float32 logits of every drafted token; those of one anchor are adjacent."""
        return super().column_logits(params, hidden.reshape(hidden.shape[0], -1, self.config.width))
