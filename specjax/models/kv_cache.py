"""Fixed-shape padded key/value caches with a write position per row.

Layout `[B, K, S, H]` per layer: the slots of one head are contiguous, which on CPU made decoding at batch 8
twice as fast as `[B, S, K, H]`. A slot at or after a query's position is never visible, so rolling a row back
means nothing more than continuing from an earlier position: the stale slots are overwritten before they are seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logical axes of each cache array; the mesh rules map them to devices.
AXES = ("batch", "kv_heads", "slots", "head")

# Attention reads a prefix of the cache; the shortest prefix worth its own branch.
_SHORTEST_PREFIX = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer.

    Attributes:
      keys: one `[B, K, S, H]` array a layer.
      values: the same for values.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def with_layer(self, layer: int, keys, values) -> "Cache":
        """The cache with one layer's arrays replaced."""
        return Cache(
            self.keys[:layer] + (keys,) + self.keys[layer + 1 :],
            self.values[:layer] + (values,) + self.values[layer + 1 :],
        )


def zeros(config, batch: int, capacity: int, dtype) -> Cache:
    """An empty cache. Zeros, not `jnp.empty`: a masked slot still enters a product, and 0 * nan is nan."""
    shape = (batch, config.kv_heads, capacity, config.head_size)
    return Cache(
        tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)),
    )


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
    """Lengths of cache prefixes that attention may be asked to read: powers of two, and the whole."""
    lengths = []
    length = _SHORTEST_PREFIX
    while length < capacity:
        lengths.append(length)
        length *= 2
    return [*lengths, capacity]
