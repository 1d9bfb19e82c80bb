"""Shapes of drafts: the published ones, those that meet a budget of parameters or seconds, and what they hold."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError, nearest

# MLP widths are multiples of this.
_STEP = 8

# Layers, width, heads, head size, MLP width of arXiv 2402.01528's drafts, all pruned from LLaMA-7B (vocabulary 32,000,
# head apart from the embedding). NoFT: not fine-tuned after pruning. Of the three smallest the width is 2560: notes on
# the paper say 4096, with which parameters do not come to the numbers in their names.
PRESETS = {
    "noft-1.3b": (24, 2048, 16, 128, 5504),
    "wide-1.3b": (12, 2560, 20, 128, 9280),
    "wide-796m": (5, 2560, 32, 128, 11008),
    "wide-543m": (3, 2560, 32, 128, 11008),
    "wide-290m": (1, 2560, 32, 128, 11008),
}


def preset(name: str, dtype: str = "float16") -> DecoderConfig:
    """A published shape. Raises UserError for a name that is none."""
    if name not in PRESETS:
        raise UserError(f'there is no published shape "{name}"{nearest(name, PRESETS)}')
    layers, width, heads, head_size, mlp_width = PRESETS[name]
    return DecoderConfig.llama(
        vocab_size=32000,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=head_size,
        mlp_width=mlp_width,
        max_positions=2048,
        rope_theta=10000.0,
        norm_epsilon=1e-6,
        tied_head=False,
        param_dtype=dtype,
        compute_dtype=dtype,
    )


def reshaped(like: DecoderConfig, **changes: int) -> DecoderConfig:
    """`like` with another number of layers, heads, ... of which none may be left without meaning.

    Of what is one value a layer, the first layers keep theirs. Head size stays, unless it is given.

    Raises:
      UserError: for heads that do not divide, and sizes below 1.
    """
    layers = changes.get("layers", like.layers)
    heads, kv_heads = changes.get("heads", like.heads), changes.get("kv_heads", like.kv_heads)
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{heads} heads do not divide into {kv_heads} groups; take a multiple of kv_heads")
    if layers > like.layers and (like.windows or like.rotary_layers):
        raise UserError(f"the shape to start from says how each of its {like.layers} layers sees; take no more layers")
    per_layer = {name: getattr(like, name)[:layers] for name in ("windows", "rotary_layers")}
    rotary = like.rotary
    if "head_size" in changes and rotary is not None:
        if rotary.size != like.head_size:
            raise UserError("only a part of each head is turned here; keep head_size as it is")
        rotary = dataclasses.replace(rotary, size=changes["head_size"])
    try:
        return dataclasses.replace(like, rotary=rotary, **per_layer, **changes)
    except ValueError as error:
        raise UserError(f"no such shape: {error}") from None


def plain_llama(like: DecoderConfig) -> DecoderConfig:
    """A Llama of these sizes, which is what the trainer makes of random weights, whatever family the sizes are from."""
    sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "max_positions")
    kept = (*sizes, "norm_epsilon", "tied_head", "param_dtype", "compute_dtype")
    theta = like.rotary.theta if like.rotary is not None else 10000.0
    return DecoderConfig.llama(rope_theta=theta, **{name: getattr(like, name) for name in kept})


def heads_of(width: int, head_size: int) -> int:
    """How many heads of this size a model of this width has. Raises UserError where they do not divide it."""
    if head_size < 1 or width % head_size:
        raise UserError(f"a width of {width} does not divide into heads of {head_size}; take a multiple of head_size")
    return width // head_size


def parameters(config: DecoderConfig) -> int:
    """Parameters, the tied head counted once. All layers have as many, so that two of them are looked at."""
    one, two = (Decoder(reshaped(config, layers=min(layers, config.layers))).num_params for layers in (1, 2))
    return one + max(config.layers - 1, 0) * (two - one)


def weight_bytes(config: DecoderConfig) -> int:
    """What the parameters occupy."""
    return parameters(config) * jnp.dtype(dtype_named(config.param_dtype)).itemsize


def step_bytes(config: DecoderConfig, context: int, batch: int = 1) -> int:
    """What a step of decoding reads at least: the weights of one token once, and the keys and values of the context."""
    weights = Decoder(config).num_step_params * jnp.dtype(dtype_named(config.param_dtype)).itemsize
    return weights + kv_bytes(config, context, batch)


def kv_bytes(config: DecoderConfig, tokens: int, batch: int = 1) -> int:
    """What the cache of so many tokens a row occupies, by the cache that decoding would make; nothing is allocated."""
    prompts, lengths = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32)

    def arrays():
        cache = Decoder(config).start({}, prompts, lengths, tokens)
        return *cache.keys, *cache.values

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.eval_shape(arrays))


def at_parameters(like: DecoderConfig, layers: int, wanted: int, tolerance: float = 0.03) -> DecoderConfig:
    """The shape of `layers` layers with about `wanted` parameters, in the proportions of `like`.

    Head size and query heads a key head stay. The number of heads is the one that comes nearest, width is heads times
    head size, and the MLP's width makes up the rest.

    Args:
      tolerance: how far from the budget it may be, as a share.

    Raises:
      UserError: where no shape comes so near.
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
    found = min((shape(kv_heads), shape(kv_heads + 1)), key=lambda config: abs(parameters(config) - wanted))
    more = parameters(shape(found.kv_heads, found.mlp_width + _STEP)) - parameters(found)
    inner = found.mlp_width + _STEP * round((wanted - parameters(found)) / more)
    best = shape(found.kv_heads, max(inner, _STEP))
    if abs(parameters(best) - wanted) > tolerance * wanted:
        raise UserError(
            f"no shape of {layers} layers in these proportions has about {wanted} parameters (the nearest has "
            f"{parameters(best)}); take another budget, fewer layers, or smaller heads"
        )
    return best


def rounded(width: float) -> int:
    """An MLP width near this one."""
    return max(_STEP, _STEP * round(width / _STEP))


def within_seconds(
    shapes: Sequence[DecoderConfig], seconds_of: Callable[[DecoderConfig], float], budget: float
) -> DecoderConfig:
    """The shape with the most parameters whose step takes at most `budget` seconds.

    Raises:
      UserError: where every shape takes longer.
    """
    taken = {shape: seconds_of(shape) for shape in shapes}
    fitting = [shape for shape, seconds in taken.items() if seconds <= budget]
    if not fitting:
        raise UserError(
            f"no shape takes at most {budget:.3g} s a step (the fastest takes {min(taken.values()):.3g}); "
            "allow more, or offer smaller shapes"
        )
    return max(fitting, key=parameters)
