"""Structured pruning: makes a smaller model of the same family from the most important parts of a model.

It removes layers, query and key/value heads, inner units of the MLPs and channels of the residual stream. The result is
an ordinary model of its family, which must be distilled to be a useful draft.

Importance is measured on calibration text in one forward pass, without gradients or a search (with the formulas of
arXiv 2403.03853 for layers and of arXiv 2407.14679 for the rest).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.language_model import LanguageModel, Params, consecutive
from specjax.runtime.errors import UserError

# Sizes that pruning can reduce.
_SIZES = ("layers", "width", "heads", "kv_heads", "mlp_width")


@dataclasses.dataclass(frozen=True)
class Importance:
    """The importance of each part of a model; larger is more important. All are means over tokens.

    Attributes:
      layers: 1 - cosine similarity of a layer's input and output.
      heads: L2 norm of each query head's output before the output projection.
      mlp: absolute value of each inner unit of the MLP.
      width: absolute value of each channel after a norm, summed over norms.
    """

    layers: Float[np.ndarray, "L"]
    heads: Float[np.ndarray, "L N"]
    mlp: Float[np.ndarray, "L F"]
    width: Float[np.ndarray, "D"]


class _Tap:
    """Wraps a part of the model and records its inputs or outputs."""

    def __init__(self, part: Any, recorded: list, *, output: bool):
        self._part, self._recorded, self._output = part, recorded, output

    def __call__(self, inputs):
        outputs = self._part(inputs)
        self._recorded.append(outputs if self._output else inputs)
        return outputs


def importance(
    model: LanguageModel, params: Params, texts: Sequence[tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]]
) -> Importance:
    """Measures importance on calibration texts.

    Args:
      texts: batches of right-padded tokens and their lengths; padding does not count.

    Raises:
      UserError: for an encoder-decoder, a model with experts or attention sinks, or without any text.
    """
    if not isinstance(model, Decoder):
        raise UserError("only decoder-only models can be pruned; train an encoder-decoder draft from scratch")
    if model.config.experts or model.config.attention_sinks:
        raise UserError("a model with experts or attention sinks cannot be pruned; take a dense one with its tokens")
    if not texts:
        raise UserError("there is no calibration text; set calibration.batches to at least 1")
    sums = [_sums(model, params, jnp.asarray(tokens), jnp.asarray(lengths)) for tokens, lengths in texts]
    count = sum(int(lengths.sum()) for _, lengths in texts)
    layers, heads, mlp, width = (np.asarray(sum(parts), np.float64) / count for parts in zip(*sums, strict=True))
    return Importance(layers, heads, mlp, width)


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Decoder, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]):
    """Sums over tokens of the quantities whose means `Importance` contains."""
    config, module = model.config, model.bind(params)
    counted = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)
    mixed, inner, normed = [], [], []
    for block in module.blocks:
        block.attention.output = _Tap(block.attention.output, mixed, output=False)
        block.mlp.down = _Tap(block.mlp.down, inner, output=False)
        for name in ("attention_norm", "mlp_norm"):
            setattr(block, name, _Tap(getattr(block, name), normed, output=True))
    positions = consecutive(tokens)
    hidden, cosines = module.embed(tokens, positions), []
    for layer in range(config.layers):
        before = hidden
        hidden, _ = module.extend(None, hidden, positions, None, layer, layer + 1, prepare=lambda tapped: tapped)
        cosines.append(jnp.sum((1.0 - _cosine(before, hidden)) * counted))
    over = lambda x: jnp.einsum("BT...,BT->...", x.astype(jnp.float32), counted)
    by_head = [x.reshape(*x.shape[:2], config.heads, config.head_size) for x in mixed]
    heads = [over(jnp.linalg.norm(x.astype(jnp.float32), axis=-1)) for x in by_head]
    units = [over(jnp.abs(x)) for x in inner]
    channels = sum(over(jnp.abs(x)) for x in normed)
    return jnp.stack(cosines), jnp.stack(heads), jnp.stack(units), channels


def _cosine(a: Float[Array, "B T D"], b: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    scale = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)


def prune(model: LanguageModel, params: Params, shape: DecoderConfig, importance: Importance) -> tuple[Decoder, Params]:
    """Reduces the model to `shape` by keeping the most important parts, in their original order.

    A key/value head is kept or removed together with its query heads. If the shape has fewer query heads per key/value
    head, the most important ones of each group are kept.

    Raises:
      UserError: if the shape is larger in some size, or differs in an attribute that cannot be pruned.
    """
    config = model.config
    for name in _SIZES:
        if getattr(shape, name) > getattr(config, name):
            raise UserError(
                f"{name} is {getattr(config, name)}, and pruning cannot increase it to {getattr(shape, name)}; use a "
                "smaller value"
            )
    if shape.heads // shape.kv_heads > config.heads // config.kv_heads:
        raise UserError(
            f"{shape.heads} heads on {shape.kv_heads} key/value heads are larger groups than the model has "
            f"({config.heads} on {config.kv_heads}); keep more key/value heads"
        )
    if config.embedding_width and shape.width < config.width:
        raise UserError("a model that projects its embedding keeps its width; prune layers, heads or mlp_width")
    layers = _best(importance.layers, shape.layers).tolist()
    per_layer = {
        name: tuple(getattr(config, name)[layer] for layer in layers) if getattr(config, name) else ()
        for name in ("windows", "rotary_layers")
    }
    sizes = {name: getattr(shape, name) for name in _SIZES}
    if dataclasses.replace(shape, **per_layer) != dataclasses.replace(config, **sizes, **per_layer):
        raise UserError("pruning changes only layers, heads and widths; leave the rest as in the source")
    pruned = Decoder(dataclasses.replace(config, **sizes, **per_layer))
    width = _best(importance.width, shape.width)
    shared = {"embed": width, "norm": width}
    remaining = {**params, "blocks": {new: params["blocks"][old] for new, old in enumerate(layers)}}
    axes = model.axes()
    axes = {**axes, "blocks": {new: axes["blocks"][old] for new, old in enumerate(layers)}}
    by_layer = [{**shared, **_kept_of_layer(config, shape, importance, layer)} for layer in layers]

    def take(path, array, names):
        keys = [entry.key for entry in path]
        chosen = by_layer[keys[1]] if keys[0] == "blocks" else shared
        for axis, name in enumerate(names):
            if name in chosen:
                array = jnp.take(array, jnp.asarray(chosen[name]), axis=axis)
        return array

    return pruned, jax.tree_util.tree_map_with_path(take, remaining, axes)


def _kept_of_layer(config: DecoderConfig, shape: DecoderConfig, importance: Importance, layer: int) -> dict:
    """The indices of the channels of heads, key/value heads and MLP to keep in one layer."""
    grouped = importance.heads[layer].reshape(config.kv_heads, -1)
    size = shape.heads // shape.kv_heads
    groups = _best(grouped.sum(1), shape.kv_heads)
    heads = [group * grouped.shape[1] + head for group in groups for head in _best(grouped[group], size)]
    channels = lambda indices: np.concatenate([np.arange(config.head_size) + config.head_size * i for i in indices])
    return {
        "heads": channels(heads),
        "kv_heads": channels(groups),
        "mlp": _best(importance.mlp[layer], shape.mlp_width),
    }


def _best(scores: Float[np.ndarray, "X"], count: int) -> np.ndarray:
    """Indices of the `count` largest scores, ascending; among equal scores the first ones are taken."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
