"""Fixed-shape padded key/value caches with a write position per row.

Layout `[B, K, S, H]` per layer: the slots of one head are contiguous, which on CPU made decoding at batch 8
twice as fast as `[B, S, K, H]`. A slot at or after a query's position is never visible, so rolling a row back
means nothing more than continuing from an earlier position: the stale slots are overwritten before they are seen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.runtime.mesh import axes

# Logical axes of each cache array; the mesh rules map them to devices.
AXES = ("batch", "kv_heads", "slots", "head")

# Attention reads a prefix of the cache; the shortest prefix worth its own branch.
_SHORTEST_PREFIX = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Meter:
    """Layer executions: how often a layer ran on a token. `extend`, which calls the layers, counts them.

    Attributes:
      counted: how many columns of the next calls are the row's own tokens; the others are padding, or belong to rows
        that have ended or that wait for the rest of their batch.
      own: executions on the row's own tokens.
      columns: executions on all columns of a row, the same number in every row.

    Device arrays while decoding, numpy arrays once fetched.
    """

    counted: Int[Array | np.ndarray, "B"] = axes("batch")
    own: Int[Array | np.ndarray, "B"] = axes("batch")
    columns: Int[Array | np.ndarray, ""] = axes()

    @classmethod
    def zeros(cls, batch: int) -> "Meter":
        row = lambda: jnp.zeros((batch,), jnp.int32)  # an array each: a cache that is donated may hold none twice
        return cls(row(), row(), jnp.zeros((), jnp.int32))

    def after(self, layers: int, columns: int) -> "Meter":
        """The meter after a call of so many layers on so many columns."""
        own = self.own + layers * jnp.minimum(self.counted, columns)
        return Meter(self.counted, own, self.columns + layers * columns)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, and how much was computed with them.

    Attributes:
      keys: one `[B, K, S, H]` array a layer.
      values: the same for values.
      meter: layer executions so far.
    """

    keys: tuple[Float[Array, "B K S H"], ...] = axes(*AXES)
    values: tuple[Float[Array, "B K S H"], ...] = axes(*AXES)
    meter: Meter

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def with_layer(self, layer: int, keys, values) -> "Cache":
        """The cache with one layer's arrays replaced."""
        return Cache(
            self.keys[:layer] + (keys,) + self.keys[layer + 1 :],
            self.values[:layer] + (values,) + self.values[layer + 1 :],
            self.meter,
        )

    def metered(self, layers: int, columns: int) -> "Cache":
        """The cache after a call of so many layers on so many columns."""
        return dataclasses.replace(self, meter=self.meter.after(layers, columns))


def zeros(config, batch: int, capacity: int, dtype) -> Cache:
    """An empty cache. Zeros, not `jnp.empty`: a masked slot still enters a product, and 0 * nan is nan."""
    shape = (batch, config.kv_heads, capacity, config.head_size)
    return Cache(
        tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)),
        Meter.zeros(batch),
    )


def _is_meter(node: Any) -> bool:
    return isinstance(node, Meter)


def counting(tree: Any, counted: Int[Array, "B"]) -> Any:
    """The tree with `counted` columns of each row, from now on, in every meter of it."""
    change = lambda node: dataclasses.replace(node, counted=counted) if _is_meter(node) else node
    return jax.tree.map(change, tree, is_leaf=_is_meter)


def unmetered(tree: Any) -> Any:
    """The tree with every meter of it at 0."""
    return jax.tree.map(lambda x: jax.tree.map(jnp.zeros_like, x) if _is_meter(x) else x, tree, is_leaf=_is_meter)


def meters(tree: Any) -> list[Meter]:
    """Every meter of the tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=_is_meter) if _is_meter(node)]


def write(
    slots: Float[Array, "B K S H"], new: Float[Array, "B K T H"], start: Int[Array, "B"]
) -> Float[Array, "B K S H"]:
    """Writes T consecutive slots of each row from `start[b]`.

    The caller keeps `start + T <= S`: past the end `dynamic_update_slice` would clamp and silently overwrite
    earlier slots (the loop's capacity has the room, see `decoding.loop.capacity_for`).
    """
    return write_rows(slots, new, start, axis=2)


def write_rows(array: jax.Array, new: jax.Array, start: Int[Array, "B"], *, axis: int) -> jax.Array:
    """Writes `new` into `array`, each row at its own place along `axis`; the first axis counts rows."""
    new = new.astype(array.dtype)
    if array.shape[0] == 1:  # the batched form becomes a scatter, which costs more than the slice it updates
        return jax.lax.dynamic_update_slice_in_dim(array, new, start[0], axis)
    write_row = lambda row, update, at: jax.lax.dynamic_update_slice_in_dim(row, update, at, axis - 1)
    return jax.vmap(write_row)(array, new, start)


def prefixes(capacity: int) -> list[int]:
    """Lengths of cache prefixes that attention may be asked to read: powers of two, and the whole.

    A prefix of three quarters of the whole or more is none: each is compiled in every layer, and spares little.
    """
    lengths = []
    length = _SHORTEST_PREFIX
    while 4 * length < 3 * capacity:
        lengths.append(length)
        length *= 2
    return [*lengths, capacity]
