"""One layer of a decoder."""

import jax.numpy as jnp
from flax import nnx

from specjax.models import layers
from specjax.models.config import DecoderConfig
from specjax.models.experts import make_mlp


class Block(nnx.Module):
    """One layer: attention and MLP, each with a residual connection, with norms in the config's `order`."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs):
        self.attention_norm = layers.make_norm(config, config.width)
        self.attention = layers.Attention(config, layer, rngs)
        self.attention_output_norm = layers.make_norm(config, config.width) if config.order == "both" else None
        self.mlp_norm = layers.make_norm(config, config.width)
        self.mlp = make_mlp(config, layer, rngs)
        self.mlp_output_norm = layers.make_norm(config, config.width) if config.order == "both" else None
        self.order, self.residual_scale = config.order, config.residual_scale

    def __call__(self, hidden, angles, positions, mask, keys, values, **attention):
        inputs = hidden if self.order in ("post", "output") else self.attention_norm(hidden)
        mixed, keys, values = self.attention(inputs, angles, positions, mask, keys, values, **attention)
        if self.order == "parallel":
            return hidden + mixed + self.mlp(self.mlp_norm(hidden)), keys, values
        if self.order == "post":
            hidden = self.attention_norm(hidden + mixed)
            return self.mlp_norm(hidden + self.mlp(hidden)), keys, values
        if self.order == "output":
            hidden = hidden + self.attention_norm(mixed)
            return hidden + self.mlp_norm(self.mlp(hidden)), keys, values
        if self.order == "both":
            hidden = hidden + self.attention_output_norm(mixed)
            return hidden + self.mlp_output_norm(self.mlp(self.mlp_norm(hidden))), keys, values
        scaled = lambda x: x if self.residual_scale == 1 else x * jnp.asarray(self.residual_scale, x.dtype)
        hidden = hidden + scaled(mixed)
        return hidden + scaled(self.mlp(self.mlp_norm(hidden))), keys, values
