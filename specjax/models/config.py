"""The frozen description of a decoder-only model: true differences between families, nothing else."""

import dataclasses

from specjax.runtime.dtypes import dtype_named


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a decoder in the Llama manner.

    Attributes:
      vocab_size: V, rows of the embedding.
      width: D, size of the residual stream.
      layers: L, number of blocks.
      heads: N, query heads.
      kv_heads: K, key/value heads; divides `heads` (grouped-query attention).
      head_size: H.
      mlp_width: F, inner width of the gated MLP.
      max_positions: longest sequence the positions are meant for (HF `max_position_embeddings`).
      rope_theta: base of the rotary frequencies.
      norm_epsilon: added to the mean square in RMSNorm.
      tied_head: whether the output head is the transposed embedding.
      param_dtype: dtype in which parameters are stored.
      compute_dtype: dtype of activations and caches; logits are always float32.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    max_positions: int
    rope_theta: float
    norm_epsilon: float
    tied_head: bool
    param_dtype: str
    compute_dtype: str

    def __post_init__(self):
        for field in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}).")
        if self.head_size % 2:
            raise ValueError(f"head_size ({self.head_size}) must be even: rotary positions turn pairs.")
        dtype_named(self.param_dtype), dtype_named(self.compute_dtype)

    @property
    def num_params(self) -> int:
        """Parameters, the tied head counted once."""
        attention = 2 * self.width * self.head_size * (self.heads + self.kv_heads)
        layer = attention + 3 * self.width * self.mlp_width + 2 * self.width
        embeddings = self.vocab_size * self.width * (1 if self.tied_head else 2)
        return self.layers * layer + embeddings + self.width

    @property
    def num_step_params(self) -> int:
        """Parameters read to decode one token: an embedding row is looked up, the head is read whole."""
        return self.num_params - (0 if self.tied_head else self.vocab_size * self.width)
