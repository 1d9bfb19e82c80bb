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
        self.attention_norm = layers.make_norm(config, config.width)
        self.attention = layers.Attention(config, layer, rngs)
        self.attention_output_norm = layers.make_norm(config, config.width) if config.order == "both" else None
        self.mlp_norm = layers.make_norm(config, config.width)
        self.mlp = make_mlp(config, layer, rngs)
        self.mlp_output_norm = layers.make_norm(config, config.width) if config.order == "both" else None
        self.order, self.residual_scale = config.order, config.residual_scale

    def __call__(self, hidden, angles, positions, mask, keys, values, *, routed=None, **attention):
        """Returns the hidden states and the updated cache arrays; see `Attention`.

        Args:
          routed: a list to which the logits of the layer's router are appended, if it has one; or None.
        """
        is_sparse = isinstance(self.mlp, ExpertMLP)
        mlp = functools.partial(self.mlp, routed=routed) if is_sparse else self.mlp
        inputs = hidden if self.order in ("post", "output") else self.attention_norm(hidden)
        mixed, keys, values = self.attention(inputs, angles, positions, mask, keys, values, **attention)
        if self.order == "parallel":
            return hidden + mixed + mlp(self.mlp_norm(hidden)), keys, values
        if self.order == "post":
            hidden = self.attention_norm(hidden + mixed)
            return self.mlp_norm(hidden + mlp(hidden)), keys, values
        if self.order == "output":
            hidden = hidden + self.attention_norm(mixed)
            return hidden + self.mlp_norm(mlp(hidden)), keys, values
        if self.order == "both":
            hidden = hidden + self.attention_output_norm(mixed)
            return hidden + self.mlp_output_norm(mlp(self.mlp_norm(hidden))), keys, values
        scaled = lambda x: x if self.residual_scale == 1 else x * jnp.asarray(self.residual_scale, x.dtype)
        hidden = hidden + scaled(mixed)
        return hidden + scaled(mlp(self.mlp_norm(hidden))), keys, values
