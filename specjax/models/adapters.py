"""Kangaroo's adapter (arXiv 2404.18911): a small network on the target's hidden states after its first layers."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import kv_cache, layers
from specjax.models.attachment import Attachment, AttachmentConfig, States
from specjax.models.config import DecoderConfig
from specjax.models.language_model import LanguageModel, Params
from specjax.models.rotary import angles, text_lengths
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest

KINDS = ("attention", "layer", "mlp", "none")
_ATTENDING, _WITH_MLP = ("attention", "layer"), ("layer", "mlp")


@dataclasses.dataclass(frozen=True)
class AdapterConfig(AttachmentConfig):
    """Options of an adapter.

    Attributes:
      exit_layer: the adapter reads the hidden states after this many of the target's layers.
      kind: "attention" is the paper's adapter. Its ablations are "layer" (attention and MLP), "mlp" (an MLP of width D
        without a gate) and "none" (only the norm before the head).
      own_head: whether the adapter trains a head; otherwise it uses the target's frozen head.
    """

    exit_layer: int
    kind: str = "attention"
    own_head: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.exit_layer < self.target.layers:
            raise UserError(
                f"an adapter's exit_layer must lie in 1 .. {self.target.layers - 1} for this target, "
                f"not {self.exit_layer}"
            )
        if self.kind not in KINDS:
            raise UserError(f"there is no adapter of kind {self.kind!r}{nearest(self.kind, KINDS)}")

    @property
    def inner(self) -> DecoderConfig:
        """The adapter as a decoder of one layer."""
        width = self.target.width if self.kind == "mlp" else self.target.mlp_width
        return self.one_layer(mlp_width=width, tied_head=not self.own_head, gated_mlp=self.kind == "layer")


class AdapterModule(nnx.Module):
    """Parameters and forward pass of an adapter."""

    def __init__(self, config: AdapterConfig, rngs: nnx.Rngs):
        inner = config.inner
        attends, has_mlp = config.kind in _ATTENDING, config.kind in _WITH_MLP
        norm = lambda: layers.Norm(inner, inner.width)
        self.attention_norm = norm() if attends else None
        self.attention = layers.Attention(inner, 0, rngs) if attends else None
        self.mlp_norm = norm() if has_mlp else None
        self.mlp = layers.MLP(inner, rngs) if has_mlp else None
        self.norm = norm()
        self.unembedding = config.own_head_layer(rngs, inner.width) if config.own_head else None
        self.config = config

    def extend(self, cache, hidden, positions):
        if self.attention is not None:
            # The adapter is trained on texts of unknown prompts, so its rotation depends on positions only.
            cosine_sine = angles(self.config.inner.rotary, positions, text_lengths(positions))
            keys, values = (None, None) if cache is None else (cache.keys[0], cache.values[0])
            inputs = self.attention_norm(hidden)
            mixed, keys, values = self.attention(inputs, cosine_sine, positions, None, keys, values)
            hidden = hidden + mixed
            cache = None if cache is None else cache.with_layer(0, keys, values)
        if self.mlp is not None:
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        if cache is None:
            return meshes.pin_rows(hidden), None
        return hidden, cache.metered(1, hidden.shape[1])


@dataclasses.dataclass(frozen=True)
class Adapter(Attachment):
    """Kangaroo's adapter (section 3). With f the hidden state at the exit layer,

    f' = f + Attention(RMSNorm(f)), and logits = head(RMSNorm'(f')).

    The attention is causal, with rotary positions and its own cache; the head is the target's, frozen. If there are as
    many key heads as query heads, and the heads span the width, it has 4 D^2 + 2 D parameters.
    """

    config: AdapterConfig
    config_class = AdapterConfig
    module = AdapterModule
    drafter = "kangaroo"

    @property
    def taps(self) -> tuple[int, ...]:
        return (self.config.exit_layer,)

    def start(self, batch: int, capacity: int) -> kv_cache.Cache | None:
        inner = self.config.inner
        if self.config.kind == "none":
            return None
        if self.config.kind not in _ATTENDING:  # no keys and values; the meter still counts executions
            return kv_cache.Cache((), (), kv_cache.Meter.zeros(batch), None)
        return kv_cache.zeros(inner, batch, capacity)

    def extend(
        self, params: Params, cache: Any, states: States, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the hidden states before the adapter's final norm, and the cache; `states` has one entry."""
        return self.bind(params).extend(cache, *states, positions)

    def head(
        self, params: Params, target: LanguageModel, target_params: Params, hidden: Float[Array, "B T D"]
    ) -> Float[Array, "B T W"]:
        """Float32 logits: the adapter's final norm, then the adapter's own output projection or the target's."""
        module = self.bind(params)
        hidden = module.norm(hidden)
        if module.unembedding is None:
            return target.unembed(target_params, hidden)
        return module.unembedding.logits(hidden)
