"""Fixed-shape padded key/value caches with a write position per row.

The layout is `[B, K, S, H]` per layer (K heads, S slots), with the slots of a head contiguous: on CPU, decoding a batch
of 8 was twice as fast as with `[B, S, K, H]`. A query attends only to slots up to its own position, so to roll a row
back, decoding just continues from an earlier position: stale slots are overwritten before a query can attend to them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.mesh import axes

# Logical axes of each cache array; the mesh rules map them to devices.
AXES = ("batch", "kv_heads", "slots", "head")

# Attention reads a prefix of the cache; shorter prefixes than this are not worth a compiled branch.
_SHORTEST_PREFIX = 128

# On a TPU, a device with more rows than this writes them in a loop: each row is an instruction in every layer.
_UNROLLED = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Meter:
    """Counts layer executions, where one execution is one layer running on one token. `extend` updates it.

    Attributes:
      counted: in each row, the number of columns of the next calls that hold real tokens. Other columns are padding, or
        the row has ended or is waiting for other rows.
      own: executions on real tokens, per row.
      columns: executions on all columns, per row; the same in every row.

    Arrays are on the device during decoding, and numpy arrays once fetched.
    """

    counted: Int[Array | np.ndarray, "B"] = axes("batch")
    own: Int[Array | np.ndarray, "B"] = axes("batch")
    columns: Int[Array | np.ndarray, ""] = axes()

    @classmethod
    def zeros(cls, batch: int) -> "Meter":
        row = lambda: jnp.zeros((batch,), jnp.int32)  # separate arrays, because donated buffers must be distinct
        return cls(row(), row(), jnp.zeros((), jnp.int32))

    def after(self, layers: int, columns: int) -> "Meter":
        """The meter after a call that ran `layers` layers on `columns` columns per row."""
        own = self.own + layers * jnp.minimum(self.counted, columns)
        return Meter(self.counted, own, self.columns + layers * columns)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, and a count of layer executions.

    Attributes:
      keys: one array per layer.
      values: one array per layer.
      meter: counts layer executions.
      prompt_lengths: number of tokens of each prompt; None unless rotary embeddings depend on it.
    """

    keys: tuple[Float[Array, "B K S H"], ...] = axes(*AXES)
    values: tuple[Float[Array, "B K S H"], ...] = axes(*AXES)
    meter: Meter
    prompt_lengths: Int[Array, "B"] | None = axes("batch")

    def with_layer(self, layer: int, keys, values) -> "Cache":
        """The cache with one layer's arrays replaced."""
        replaced = lambda arrays, new: (*arrays[:layer], new, *arrays[layer + 1 :])
        return dataclasses.replace(self, keys=replaced(self.keys, keys), values=replaced(self.values, values))

    def first(self, layers: int) -> "Cache":
        """The cache of the first layers."""
        return dataclasses.replace(self, keys=self.keys[:layers], values=self.values[:layers])

    def metered(self, layers: int, columns: int) -> "Cache":
        """The cache with its meter increased for a call of `layers` layers on `columns` columns per row."""
        return dataclasses.replace(self, meter=self.meter.after(layers, columns))


def stored_dtype(config) -> jnp.dtype:
    """The dtype of a cache that is written in every step: the compute dtype, but on CPU float32 for bfloat16.

    XLA would convert the whole cache to float32 and back for every write, which took two thirds of a step of 32 rows.
    """
    dtype = dtype_named(config.compute_dtype)
    return jnp.dtype(jnp.float32 if dtype == jnp.bfloat16 and meshes.platform() == "cpu" else dtype)


def zeros(config, batch: int, capacity: int, prompt_lengths: Int[Array, "B"] | None = None) -> Cache:
    """An empty cache, filled with zeros: masked slots are multiplied by weight 0, and 0 * NaN would be NaN."""
    shape, dtype = (batch, config.kv_heads, capacity, config.head_size), stored_dtype(config)
    arrays = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))
    return Cache(arrays(), arrays(), Meter.zeros(batch), prompt_lengths)


def _is_meter(node: Any) -> bool:
    return isinstance(node, Meter)


def _is_cache(node: Any) -> bool:
    return isinstance(node, Cache)


def counting(tree: Any, counted: Int[Array, "B"]) -> Any:
    """Sets `Meter.counted` in every meter of a tree, for the calls that follow."""
    change = lambda node: dataclasses.replace(node, counted=counted) if _is_meter(node) else node
    return jax.tree.map(change, tree, is_leaf=_is_meter)


def unmetered(tree: Any) -> Any:
    """Resets every meter of a tree to 0."""
    return jax.tree.map(lambda x: jax.tree.map(jnp.zeros_like, x) if _is_meter(x) else x, tree, is_leaf=_is_meter)


def meters(tree: Any) -> list[Meter]:
    """Returns every meter of a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=_is_meter) if _is_meter(node)]


def depends_on_prompt(tree: Any) -> bool:
    """Whether a cache of this tree has keys whose rotation depends on the length of the prompt."""
    caches = jax.tree.leaves(tree, is_leaf=_is_cache)
    return any(_is_cache(node) and node.prompt_lengths is not None for node in caches)


def shortened(tree: Any, slots: int) -> Any:
    """Replaces every longer cache of a tree with a copy of its first slots."""
    cut = lambda arrays: tuple(x[:, :, :slots] if x.shape[2] > slots else x for x in arrays)
    change = lambda node: dataclasses.replace(node, keys=cut(node.keys), values=cut(node.values))
    return jax.tree.map(lambda x: change(x) if _is_cache(x) else x, tree, is_leaf=_is_cache)


def restored(tree: Any, short: Any) -> Any:
    """`short` with the caches of `tree`, into whose first slots those of `short` are written."""
    write = lambda old, new: tuple(
        part if part.shape == x.shape else jax.lax.dynamic_update_slice_in_dim(x, part, 0, 2)
        for x, part in zip(old, new, strict=True)
    )

    def change(old, new):
        if not _is_cache(old):
            return new
        return dataclasses.replace(new, keys=write(old.keys, new.keys), values=write(old.values, new.values))

    return jax.tree.map(change, tree, short, is_leaf=_is_cache)


def write_rows(array: jax.Array, new: jax.Array, start: Int[Array, "B"], *, axis: int) -> jax.Array:
    """Writes `new` into `array`, row b from index `start[b]` of `axis` on; axis 0 holds the rows.

    The caller guarantees that it fits (see `decoding.plan.capacity_for`); otherwise `dynamic_update_slice` would clamp
    `start` and silently overwrite earlier entries.

    CPUs and GPUs are fastest with a batched `dynamic_update_slice`. A TPU runs that as a loop with seven instructions
    for each row, which is half of the time of a block of eight rows. There each device updates its rows one by one;
    arrays of one number per index, such as tokens, are selected from in one instruction.
    """
    new, rows, shards = new.astype(array.dtype), array.shape[0], meshes.num_shards("batch")
    if rows == 1:
        return _write_one_by_one(array, new, start, axis=axis)
    if meshes.platform() == "tpu" and array.ndim == 2 and new.shape[1] <= _UNROLLED:
        offsets = jnp.arange(array.shape[1], dtype=start.dtype)[None] - start[:, None]
        for offset in range(new.shape[1]):
            array = jnp.where(offsets == offset, new[:, offset, None], array)
        return array
    if meshes.platform() == "tpu" and rows <= _UNROLLED * shards and rows % shards == 0:
        return meshes.map_rows(functools.partial(_write_one_by_one, axis=axis), array, new, start)
    write_row = lambda row, update, at: jax.lax.dynamic_update_slice_in_dim(row, update, at, axis - 1)
    return jax.vmap(write_row)(array, new, start)


def write(
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    new_keys: Float[Array, "B K T H"],
    new_values: Float[Array, "B K T H"],
    start: Int[Array, "B"],
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Writes the keys and values of T tokens into those of a layer, row b from slot `start[b]` on.

    Values that are not finite become 0 with a key that is NaN. A query that may attend to the slot then still gets
    NaN, and for any other the slot has no effect: 0 * NaN, a masked weight times the value, would be NaN.
    """
    finite = jnp.isfinite(new_values)
    new_keys, new_values = jnp.where(finite, new_keys, jnp.nan), jnp.where(finite, new_values, 0)
    return write_rows(keys, new_keys, start, axis=2), write_rows(values, new_values, start, axis=2)


def _write_one_by_one(array, new, start, *, axis):
    for row in range(array.shape[0]):
        at = [start[row] if index == axis else row if index == 0 else 0 for index in range(array.ndim)]
        array = jax.lax.dynamic_update_slice(array, new[row : row + 1], at, allow_negative_indices=False)
    if meshes.platform() == "tpu":  # in a loop the compiler would otherwise choose another layout, and copy the cache
        array = with_layout_constraint(array, Layout(tuple(range(array.ndim))))
    return array


def prefixes(capacity: int) -> list[int]:
    """The lengths of cache prefixes that attention is compiled for, in ascending order: the capacity, a quarter of it,
    a sixteenth, and so on.

    Each is compiled in every layer, so they are few. On a CPU compiling takes little time and reading slots much, so
    they are the capacity, half of it, a quarter, and so on: with 2,048 slots the program of SmolLM2-135M takes 5.2 s to
    compile in place of 4.5 s, and a step at 200 tokens 28 ms in place of 32.
    """
    lengths, factor = [capacity], 2 if meshes.platform() == "cpu" else 4
    while lengths[0] // factor >= _SHORTEST_PREFIX:
        lengths.insert(0, lengths[0] // factor)
    return lengths
