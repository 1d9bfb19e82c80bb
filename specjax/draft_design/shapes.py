"""Counts the parameters of draft shapes (configs), and finds shapes for a budget of parameters."""

import dataclasses

from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.runtime.errors import UserError

# MLP widths are multiples of this.
_STEP = 8
# The largest relative difference of a shape's parameters from the number that is wanted.
_TOLERANCE = 0.03


def reshaped(like: DecoderConfig, **changes: int) -> DecoderConfig:
    """Returns `like` with the sizes in `changes`; per-layer settings are those of the first layers.

    Raises:
      UserError: if heads do not divide evenly, a size is below 1, or there are more layers than per-layer settings.
    """
    layers = changes.get("layers", like.layers)
    heads, kv_heads = changes.get("heads", like.heads), changes.get("kv_heads", like.kv_heads)
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{heads} heads do not divide into {kv_heads} groups; use a multiple of kv_heads")
    if layers > like.layers and (like.windows or like.rotary_layers):
        raise UserError(f"the model has settings for each of its {like.layers} layers; do not add layers")
    per_layer = {name: getattr(like, name)[:layers] for name in ("windows", "rotary_layers")}
    rotary = like.rotary
    if "head_size" in changes and rotary is not None:
        if rotary.size != like.head_size:
            raise UserError("the model rotates only a part of each head; do not change head_size")
        rotary = dataclasses.replace(rotary, size=changes["head_size"])
    try:
        return dataclasses.replace(like, rotary=rotary, **per_layer, **changes)
    except ValueError as error:
        raise UserError(f"no such shape: {error}") from None


def plain_llama(like: DecoderConfig) -> DecoderConfig:
    """A Llama with the sizes of a model of any family, because new models for training are always Llamas."""
    names = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "max_positions")
    names += ("norm_epsilon", "tied_head", "param_dtype", "compute_dtype")
    theta = like.rotary.theta if like.rotary is not None else 10000.0
    return DecoderConfig.llama(rope_theta=theta, **{name: getattr(like, name) for name in names})


def parameters(config: DecoderConfig) -> int:
    """The number of parameters; a tied head is counted once. Layers have equal sizes, so only two are built."""
    one, two = (Decoder(reshaped(config, layers=min(layers, config.layers))).num_params for layers in (1, 2))
    return one + max(config.layers - 1, 0) * (two - one)


def at_parameters(like: DecoderConfig, layers: int, wanted: int) -> DecoderConfig:
    """The shape with `layers` layers and about `wanted` parameters, in the proportions of `like`.

    It keeps the head size and the query heads per key/value head. It chooses the number of heads that comes closest;
    the width is heads times head size, and the MLP width is adjusted to make up the difference.

    Raises:
      UserError: if no shape is within 3% of `wanted`.
    """
    group = like.heads // like.kv_heads
    ratio = like.mlp_width / like.width

    def shape(kv_heads: int, mlp_width: int | None = None) -> DecoderConfig:
        width = kv_heads * group * like.head_size
        inner = rounded(ratio * width) if mlp_width is None else mlp_width
        return reshaped(like, layers=layers, width=width, heads=kv_heads * group, kv_heads=kv_heads, mlp_width=inner)

    kv_heads = 1
    while parameters(shape(kv_heads + 1)) <= wanted:
        kv_heads += 1
    near = min((shape(kv_heads), shape(kv_heads + 1)), key=lambda config: abs(parameters(config) - wanted))
    per_step = parameters(shape(near.kv_heads, near.mlp_width + _STEP)) - parameters(near)
    inner = near.mlp_width + _STEP * round((wanted - parameters(near)) / per_step)
    best = shape(near.kv_heads, max(inner, _STEP))
    if abs(parameters(best) - wanted) > _TOLERANCE * wanted:
        raise UserError(
            f"no shape of {layers} layers in these proportions has about {wanted} parameters (the nearest has "
            f"{parameters(best)}); use another budget, fewer layers, or smaller heads"
        )
    return best


def rounded(width: float) -> int:
    """The multiple of 8 nearest to an MLP width."""
    return max(_STEP, _STEP * round(width / _STEP))
