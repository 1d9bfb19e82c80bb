"""Heads on the last hidden state of a decoder, each of which guesses one further token (Medusa, arXiv 2401.10774)."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from specjax.models import layers
from specjax.models.adapters import check_target
from specjax.models.config import DecoderConfig
from specjax.models.language_model import LanguageModel, Network, Params, fit_logits
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError

# What the loss of a head weighs relative to that of the head before it (arXiv 2401.10774, section 2.2.1).
_DECAY = 0.8


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """What the heads are; their sizes are those of their target.

    Attributes:
      target: the decoder to which they are attached.
      heads: how many; they draft as many tokens at most.
      own_head: whether each has a trainable projection to the vocabulary, as in the paper; the target's frozen one
        otherwise.
    """

    target: DecoderConfig
    heads: int
    own_head: bool = True

    def __post_init__(self):
        check_target(self.target)
        if self.heads < 1:
            raise UserError(f"medusa.heads is {self.heads}; there must be one head or more")

    @property
    def exit_layer(self) -> int:
        """After how many of the target's layers they read: all."""
        return self.target.layers


class MedusaHead(nnx.Module):
    """`x + SiLU(W x)`, and where it is its own the projection to the vocabulary."""

    def __init__(self, config: MedusaConfig, rngs: nnx.Rngs):
        target = config.target
        make = functools.partial(layers.Linear, dtype=target.param_dtype, rngs=rngs)
        # It begins as the identity, and so with the target's own law of the next token.
        self.block = make(target.width, target.width, ("embed", None), 0.0)
        sizes, axes = (target.width, target.vocab_size), ("embed", "vocab")
        self.unembedding = make(*sizes, axes, target.width**-0.5) if config.own_head else None

    def __call__(self, hidden):
        return hidden + jax.nn.silu(self.block(hidden))


class MedusaModule(nnx.Module):
    """The parameters of all heads."""

    def __init__(self, config: MedusaConfig, rngs: nnx.Rngs):
        self.heads = nnx.List([MedusaHead(config, rngs) for _ in range(config.heads)])


@dataclasses.dataclass(frozen=True)
class MedusaHeads(Network):
    """Medusa-1 (arXiv 2401.10774, section 2.1): of h, the target's last hidden state behind its final norm, head k
    makes logits_k = U_k (h + SiLU(W_k h)), the law of the token k places behind the next one, given nothing of the
    tokens between. With U_k of its own a head has D^2 + D V parameters.
    """

    config: MedusaConfig
    module = MedusaModule
    drafter: ClassVar[str] = "medusa"

    @property
    def predicts(self) -> tuple[tuple[int, float], ...]:
        """For each head, how many places behind the next token its guess stands, and the weight of its loss."""
        return tuple((k, _DECAY**k) for k in range(1, self.config.heads + 1))

    def first(self, params: Params, count: int) -> tuple["MedusaHeads", Params]:
        """The first `count` heads alone."""
        kept = {k: params["heads"][k] for k in range(count)}
        return MedusaHeads(dataclasses.replace(self.config, heads=count)), {"heads": kept}

    def init_on(self, key: Key[Array, ""], target: LanguageModel, target_params: Params) -> Params:
        """Parameters to begin training with: own projections are copies of the target's."""
        params = self.init(key)
        if self.config.own_head:
            unit = jnp.eye(self.config.target.width, dtype=jnp.float32)[None]
            kernel = target.with_vocab_size(self.config.target.vocab_size).unembed(target_params, unit)[0]
            kernel = kernel.astype(dtype_named(self.config.target.param_dtype))
            params = {"heads": {k: {**head, "unembedding": {"kernel": kernel}} for k, head in params["heads"].items()}}
        return params

    def start(self, batch: int, capacity: int) -> None:
        """They remember nothing."""
        return None

    def extend(
        self, params: Params, cache: Any, hidden: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The states themselves: all that is the heads' own lies behind them."""
        return hidden, cache

    def head(
        self, params: Params, target: LanguageModel, target_params: Params, hidden: Float[Array, "B T D"]
    ) -> Float[Array, "B T_times_heads V"]:
        """Float32 logits of every head on the target's last hidden states, those of one token side by side."""
        module, hidden = self.bind(params), target.normed(target_params, hidden)
        if self.config.own_head:
            logits = [head.unembedding(head(hidden)).astype(jnp.float32) for head in module.heads]
            return fit_logits(_side_by_side(logits), target.vocab_size)
        return target.unembed(target_params, _side_by_side([head(hidden) for head in module.heads]))


def _side_by_side(parts: list[Float[Array, "B T X"]]) -> Float[Array, "B T_times_heads X"]:
    stacked = jnp.stack(parts, axis=2)
    return stacked.reshape(stacked.shape[0], -1, stacked.shape[3])
