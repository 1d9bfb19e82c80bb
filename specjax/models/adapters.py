"""A light network on the hidden states of a decoder's first layers, which makes a draft of them (Kangaroo)."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from specjax.models import kv_cache, layers
from specjax.models.config import DecoderConfig
from specjax.models.language_model import NEXT, LanguageModel, Network, Params, fit_logits
from specjax.models.rotary import Rotary, angles
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError, nearest

KINDS = ("attention", "layer", "mlp", "none")
_ATTENDING, _WITH_MLP = ("attention", "layer"), ("layer", "mlp")

# Of targets that have no rotary positions of their own.
_THETA = 1e4


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is; its sizes are those of its target.

    Attributes:
      target: the decoder to which it is attached.
      exit_layer: after how many of the target's layers.
      kind: "attention" is the paper's; "layer" (attention and MLP), "mlp" (two projections of width D) and "none" (the
        norm before the head alone) are those that it is compared with.
      own_head: whether it has a trainable head of its own; the target's frozen one otherwise.
    """

    target: DecoderConfig
    exit_layer: int
    kind: str = "attention"
    own_head: bool = False

    def __post_init__(self):
        check_target(self.target)
        if not 1 <= self.exit_layer < self.target.layers:
            raise UserError(
                f"an adapter's exit_layer must lie in 1 .. {self.target.layers - 1} for this target, "
                f"not {self.exit_layer}"
            )
        if self.kind not in KINDS:
            raise UserError(f"there is no adapter of kind {self.kind!r}{nearest(self.kind, KINDS)}")

    @property
    def inner(self) -> DecoderConfig:
        """Its one layer as a decoder's: the target's sizes and rotary positions, RMS norms, no biases."""
        target = self.target
        return DecoderConfig(
            vocab_size=target.vocab_size,
            width=target.width,
            layers=1,
            heads=target.heads,
            kv_heads=target.kv_heads,
            head_size=target.head_size,
            mlp_width=target.width if self.kind == "mlp" else target.mlp_width,
            max_positions=target.max_positions,
            rotary=target.rotary or Rotary(_THETA, target.head_size),
            norm_epsilon=target.norm_epsilon,
            tied_head=not self.own_head,
            param_dtype=target.param_dtype,
            compute_dtype=target.compute_dtype,
            gated_mlp=self.kind == "layer",
        )


def check_target(config: DecoderConfig) -> None:
    """Raises UserError for a target that nothing attaches to."""
    if type(config) is not DecoderConfig:  # an encoder-decoder's is a subclass
        raise UserError("an adapter attaches to a decoder-only model, not to an encoder-decoder; take another target")


class AdapterModule(nnx.Module):
    """The parameters of an adapter and what is computed with them."""

    def __init__(self, config: AdapterConfig, rngs: nnx.Rngs):
        inner = config.inner
        attends, has_mlp = config.kind in _ATTENDING, config.kind in _WITH_MLP
        norm = lambda: layers.make_norm(inner, inner.width)
        self.attention_norm = norm() if attends else None
        self.attention = layers.Attention(inner, 0, rngs) if attends else None
        self.mlp_norm = norm() if has_mlp else None
        self.mlp = layers.MLP(inner, rngs) if has_mlp else None
        self.norm = norm()
        sizes, scale = (inner.width, inner.vocab_size), inner.width**-0.5
        own_head = functools.partial(layers.Linear, *sizes, ("embed", "vocab"), scale, inner.param_dtype, rngs)
        self.unembedding = own_head() if config.own_head else None
        self.config = config

    def extend(self, cache, hidden, positions):
        if self.attention is not None:
            capacity = hidden.shape[1] if cache is None else cache.capacity
            turned = angles(self.config.inner.rotary, positions, capacity)
            keys, values = (None, None) if cache is None else (cache.keys[0], cache.values[0])
            inputs = self.attention_norm(hidden)
            mixed, keys, values = self.attention(inputs, turned, positions, None, keys, values)
            hidden = hidden + mixed
            cache = None if cache is None else cache.with_layer(0, keys, values)
        if self.mlp is not None:
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        if cache is None:
            return meshes.pin_rows(hidden), None
        return hidden, cache.metered(1, hidden.shape[1])


@dataclasses.dataclass(frozen=True)
class Adapter(Network):
    """The self-draft's own part (arXiv 2404.18911, section 3): with f the hidden state at the exit layer,

    f' = f + Attention(RMSNorm(f)), and logits = head(RMSNorm'(f')).

    The attention is causal, with rotary positions and a cache of its own; the head is the target's, frozen. With as
    many key heads as query heads, and heads that span the width, that is 4 D^2 + 2 D parameters.
    """

    config: AdapterConfig
    module = AdapterModule
    drafter: ClassVar[str] = "kangaroo"
    predicts: ClassVar[tuple[tuple[int, float], ...]] = NEXT

    def init_on(self, key: Key[Array, ""], target: LanguageModel, target_params: Params) -> Params:
        """Parameters to begin training with: random ones."""
        return self.init(key)

    def start(self, batch: int, capacity: int) -> kv_cache.Cache | None:
        """An empty cache; None where there is nothing to cache (capacity 0: training)."""
        inner = self.config.inner
        if not capacity or self.config.kind == "none":
            return None
        if self.config.kind not in _ATTENDING:  # nothing to remember but how often it ran
            return kv_cache.Cache((), (), kv_cache.Meter.zeros(batch))
        return kv_cache.zeros(inner, batch, capacity, dtype_named(inner.compute_dtype))

    def extend(
        self, params: Params, cache: Any, hidden: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs the adapter on the target's states at the exit layer; consecutive positions in each row.

        Returns:
          hidden states before the adapter's final norm; the cache with this call's slots written.
        """
        return self.bind(params).extend(cache, hidden, positions)

    def head(
        self, params: Params, target: LanguageModel, target_params: Params, hidden: Float[Array, "B T D"]
    ) -> Float[Array, "B T V"]:
        """The adapter's final norm, then the target's projection or its own: float32 logits."""
        module = self.bind(params)
        hidden = module.norm(hidden)
        if module.unembedding is None:
            return target.unembed(target_params, hidden)
        return fit_logits(module.unembedding(hidden).astype(jnp.float32), target.vocab_size)
