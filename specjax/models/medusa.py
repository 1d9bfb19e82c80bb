"""Medusa heads (arXiv 2401.10774): each reads the target's last hidden state and predicts one further token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from specjax.models import layers
from specjax.models.attachment import Attachment, AttachmentConfig, States
from specjax.models.language_model import LanguageModel, Params, Prediction
from specjax.runtime.errors import UserError

# A larger number in a damaged file would be a hang: each head is built before its tensors are looked for.
_MOST_HEADS = 1000

# Weight of a head's loss relative to the preceding head's (section 2.2.1).
_DECAY = 0.8


@dataclasses.dataclass(frozen=True)
class MedusaConfig(AttachmentConfig):
    """Options of Medusa heads.

    Attributes:
      heads: number of heads, which is the maximum number of drafted tokens per block.
      own_head: whether each head trains its own projection to the vocabulary, as in the paper; otherwise all use the
        target's frozen projection.
    """

    heads: int
    own_head: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.heads <= _MOST_HEADS:
            raise UserError(f"medusa.heads is {self.heads}; there must be one head or more, and at most {_MOST_HEADS}")


class MedusaHead(nnx.Module):
    """`x + SiLU(W x)`, and with `own_head` a projection to the vocabulary."""

    def __init__(self, config: MedusaConfig, rngs: nnx.Rngs):
        width, dtype = config.target.width, config.target.float_dtype
        # W starts at 0, so the head starts as the identity and predicts the target's next-token distribution.
        self.block = layers.Linear(width, width, ("embed", None), 0.0, dtype, rngs)
        self.unembedding = config.own_head_layer(rngs, width) if config.own_head else None

    def __call__(self, hidden):
        return hidden + jax.nn.silu(self.block(hidden))


class MedusaModule(nnx.Module):
    """Parameters of all heads."""

    def __init__(self, config: MedusaConfig, rngs: nnx.Rngs):
        self.heads = nnx.List([MedusaHead(config, rngs) for _ in range(config.heads)])


@dataclasses.dataclass(frozen=True)
class MedusaHeads(Attachment):
    """The heads of Medusa-1 (section 2.1). With h the target's last hidden state after its final norm, head k computes

    logits_k = U_k (h + SiLU(W_k h)),

    the distribution of the token k places after the next one, independent of the tokens between. With a projection U_k
    of its own, a head has D^2 + D V parameters.
    """

    config: MedusaConfig
    config_class = MedusaConfig
    module = MedusaModule
    drafter = "medusa"

    @property
    def taps(self) -> tuple[int, ...]:
        return (self.config.target.layers,)

    @property
    def predicts(self) -> tuple[Prediction, ...]:
        return tuple(Prediction(k, _DECAY**k) for k in range(1, self.config.heads + 1))

    def first(self, params: Params, count: int) -> tuple["MedusaHeads", Params]:
        """The first `count` heads with their parameters."""
        heads = {k: params["heads"][k] for k in range(count)}
        return MedusaHeads(dataclasses.replace(self.config, heads=count)), {"heads": heads}

    def init_on(self, key: Key[Array, ""], target: LanguageModel, target_params: Params) -> Params:
        """Parameters at step 0 of training; the projections of `own_head` are copies of the target's."""
        params = self.init(key)
        if self.config.own_head:
            own = self.head_of_target(target, target_params)
            params = {"heads": {k: {**head, "unembedding": own} for k, head in params["heads"].items()}}
        return params

    def extend(
        self, params: Params, cache: Any, states: States, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the states as they are: the heads have no layers before `head`."""
        return states[0], cache

    def head(
        self, params: Params, target: LanguageModel, target_params: Params, hidden: Float[Array, "B T D"]
    ) -> Float[Array, "B T_times_heads W"]:
        """Float32 logits of every head on the target's last hidden states; those of one position are adjacent."""
        module, hidden = self.bind(params), target.normed(target_params, hidden)
        if self.config.own_head:
            return _interleaved([head.unembedding.logits(head(hidden)) for head in module.heads])
        return target.unembed(target_params, _interleaved([head(hidden) for head in module.heads]))


def _interleaved(parts: list[Float[Array, "B T X"]]) -> Float[Array, "B T_times_heads X"]:
    stacked = jnp.stack(parts, axis=2)
    return stacked.reshape(stacked.shape[0], -1, stacked.shape[3])
