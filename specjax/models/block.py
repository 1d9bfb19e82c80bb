"""One layer of a decoder."""

import functools

import jax.numpy as jnp
from flax import nnx

from specjax.models import layers
from specjax.models.config import DecoderConfig
from specjax.models.experts import ExpertMLP, make_mlp


class Block(nnx.Module):
    """One layer: attention and MLP, each with a residual connection, with norms in the config's `order`."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs):
        self.attention_norm = layers.Norm(config, config.width)
        self.attention = layers.Attention(config, layer, rngs)
        self.attention_output_norm = layers.Norm(config, config.width) if config.order == "both" else None
        self.mlp_norm = layers.Norm(config, config.width)
        self.mlp = make_mlp(config, layer, rngs)
        self.mlp_output_norm = layers.Norm(config, config.width) if config.order == "both" else None
        self.order, self.residual_scale = config.order, config.residual_scale

    def __call__(self, hidden, angles, positions, mask, keys, values, bias=None, causal=True):
        """Returns the hidden states, the updated cache arrays (see `Attention`), and the logits of the layer's router
        in a list, which is empty for a dense MLP."""
        logits = []
        mlp = functools.partial(self.mlp, routed=logits) if isinstance(self.mlp, ExpertMLP) else self.mlp
        inputs = hidden if self.order in ("post", "output") else self.attention_norm(hidden)
        mixed, keys, values = self.attention(inputs, angles, positions, mask, keys, values, bias=bias, causal=causal)
        if self.order == "parallel":
            hidden = hidden + mixed + mlp(self.mlp_norm(hidden))
        elif self.order == "post":
            hidden = self.attention_norm(hidden + mixed)
            hidden = self.mlp_norm(hidden + mlp(hidden))
        elif self.order == "output":
            hidden = hidden + self.attention_norm(mixed)
            hidden = hidden + self.mlp_norm(mlp(hidden))
        elif self.order == "both":
            hidden = hidden + self.attention_output_norm(mixed)
            hidden = hidden + self.mlp_output_norm(mlp(self.mlp_norm(hidden)))
        else:
            scaled = lambda x: x if self.residual_scale == 1 else x * jnp.asarray(self.residual_scale, x.dtype)
            hidden = hidden + scaled(mixed)
            hidden = hidden + scaled(mlp(self.mlp_norm(hidden)))
        return hidden, keys, values, logits
