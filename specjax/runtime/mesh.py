"""Makes device meshes, and shards arrays by one table that maps logical axes to mesh axes.

The axes of every parameter, cache and batch have names, the logical axes ("batch", "embed", ...).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils

from specjax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")

# A mesh with devices, or an abstract one with sizes only; shapes can be sharded over either.
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# Logical axis -> the mesh axes that split it; None keeps a complete copy on every device.
MESH_AXES: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("tensor",),
    "vocab": ("tensor",),
    "head": None,
    "slots": None,
    "layers": None,
    "norm": None,
}


# The words of messages for the logical axes that the tensor axis splits.
_WORDS = {"heads": "heads", "kv_heads": "key/value heads", "mlp": "MLP width", "vocab": "vocabulary"}


class Parts(str):
    """The name of a logical axis that is split only between its parts, such as the heads of a projection.

    Attributes:
      count: number of parts.
    """

    count: int

    def __new__(cls, name: str, count: int) -> "Parts":
        self = super().__new__(cls, name)
        self.count = count
        return self


def sizes_of(config: Any) -> tuple[int, int, int]:
    """The sizes of `AXES` in a config's mesh section. Raises UserError for a size below 1."""
    sizes = tuple(config[axis] for axis in AXES)
    if min(sizes) < 1:
        raise UserError(f"a mesh of {_text(sizes)} is not possible; every axis needs at least 1")
    return sizes


def _text(sizes: tuple[int, int, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))


def make_mesh(config: Any) -> jax.sharding.Mesh:
    """A mesh of `data` x `fsdp` x `tensor` devices; 1 x 1 x 1 uses the first device.

    The network between TPU slices is slow, so with several slices `data` spans them, and `fsdp` too if `data` is too
    small; `tensor` stays within one slice.

    Raises:
      UserError: for a size below 1, if the product of the sizes is not the number of devices, and if the slices do not
        divide `data` x `fsdp`.
    """
    sizes = sizes_of(config)
    wanted, devices = math.prod(sizes), jax.devices()
    alone = wanted == 1 and jax.process_count() == 1
    if wanted != len(devices) and not alone:
        several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        raise UserError(
            f"a mesh of {_text(sizes)} needs {wanted} devices and there are {len(devices)}{several}; "
            f"let mesh.data * mesh.fsdp * mesh.tensor be {len(devices)}"
        )
    # Auto: the compiler propagates shardings from parameters, caches and batches to all other arrays.
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    devices = devices[:wanted]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return jax.sharding.Mesh(lay_out(sizes, devices, slices), AXES, axis_types=types)


def lay_out(sizes: tuple[int, int, int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """Arranges the devices of several slices as a mesh. Raises UserError if the slices do not divide it."""
    between = over_slices(sizes, slices)
    within = tuple(size // num_slices for size, num_slices in zip(sizes, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices)


def over_slices(sizes: tuple[int, int, int], slices: int) -> tuple[int, int, int]:
    """How many slices each mesh axis spans. Raises UserError if the slices do not divide `data` x `fsdp`."""
    data, fsdp, _ = sizes
    over_data = math.gcd(data, slices)
    over_fsdp = slices // over_data
    if fsdp % over_fsdp:
        raise UserError(
            f"the devices are in {slices} slices, over which mesh.data {data} and mesh.fsdp {fsdp} do not divide; "
            f"let mesh.data be a multiple of {slices} (mesh.tensor must stay within a slice)"
        )
    return over_data, over_fsdp, 1


def use(mesh: jax.sharding.Mesh):
    """A context that sets the current mesh, which `constrain`, `pin_last`, `pin_rows` and `num_shards` use."""
    return jax.set_mesh(mesh)


def spec(axes: tuple[str | None, ...]) -> jax.P:
    """The PartitionSpec of an array with these logical axes (None: not split)."""
    return jax.P(*(None if name is None else MESH_AXES[name] for name in axes))


def shardings(axes_tree: Any, mesh: AnyMesh, shapes: Any = None) -> Any:
    """Replaces each tuple of logical axes in a tree with its NamedSharding.

    Args:
      axes_tree: a tree of tuples of logical axes, one name (or None) for each dimension.
      shapes: a matching tree of arrays or ShapeDtypeStructs; axes that the tensor axis does not divide are then
        replicated, see `divided`. None checks nothing.

    Raises:
      UserError: if a dimension does not divide evenly over the axes `data` and `fsdp`.
    """
    if shapes is None:
        return jax.tree.map(lambda axes: jax.NamedSharding(mesh, spec(axes)), axes_tree, is_leaf=_is_axes)

    place = lambda x, axes: jax.NamedSharding(mesh, spec(divided(x.shape, axes, mesh.shape)))
    return jax.tree.map(place, shapes, axes_tree)


def abstract(shapes: Any, placed: Any) -> Any:
    """ShapeDtypeStructs with the shapes of one tree and the shardings of another, to compile without arrays."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed)


def local_bytes(tree: Any) -> int:
    """Bytes that these arrays, or shapes with shardings, occupy on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the platform of the current mesh, or of the default device if there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_cpu() -> bool:
    """Whether arrays are on a CPU and not spread over several devices."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def shard(tree: Any, axes_tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shards arrays over the mesh by their logical axes, see `shardings`."""
    return jax.device_put(tree, shardings(axes_tree, mesh, shapes=tree))


def pin_last(x: jax.Array, name: str) -> jax.Array:
    """Shards the last axis as logical axis `name`, if it divides evenly; the compiler shards the other axes."""
    if num_shards(name) == 1 or x.shape[-1] % num_shards(name):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(*[jax.P.UNCONSTRAINED] * (x.ndim - 1), MESH_AXES[name]))


def pin_undivided(x: jax.Array, axis: int, name: str) -> jax.Array:
    """Replicates an axis, if logical axis `name` does not divide it; the compiler shards the other axes.

    Otherwise the compiler would split new keys as far as it can, and gather the cache after writing them into it.
    """
    if x.shape[axis] % num_shards(name) == 0:
        return x
    free = [jax.P.UNCONSTRAINED] * x.ndim
    return jax.lax.with_sharding_constraint(x, jax.P(*free[:axis], None, *free[axis + 1 :]))


def pin_rows(x: jax.Array) -> jax.Array:
    """Shards activations by rows only, like a batch, if the rows divide evenly.

    Otherwise the compiler would not gather weights that are sharded over `fsdp`, but send every row to all chips, so
    that memory and traffic of a chip would grow with the number of chips.
    """
    if num_shards("batch") == 1 or x.shape[0] % num_shards("batch"):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(MESH_AXES["batch"], *[None] * (x.ndim - 1)))


def map_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Calls `function` on the rows that each device holds of these arrays, which must divide evenly."""
    if num_shards("batch") == 1:
        return function(*arrays)
    rows = jax.P(MESH_AXES["batch"])
    return jax.shard_map(function, in_specs=rows, out_specs=rows, axis_names={*MESH_AXES["batch"]})(*arrays)


def num_shards(name: str) -> int:
    """The number of parts into which the current mesh splits this logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in MESH_AXES[name] or ())


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shards a host array that every process has completely; each process copies its part to its devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def own_rows(mesh: jax.sharding.Mesh, count: int) -> tuple[int, ...]:
    """Indices of the rows of a batch of `count` that are on this process's devices.

    Raises:
      UserError: if the batch does not divide evenly over the mesh.
    """
    divided((count,), ("batch",), mesh.shape)
    sharding = jax.NamedSharding(mesh, spec(("batch",)))
    places = sharding.addressable_devices_indices_map((count,)).values()
    return tuple(sorted({row for place in places for row in range(*place[0].indices(count))}))


def place_rows(array: np.ndarray, count: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """Shards a batch of `count` rows over the mesh; `array` has all rows or only this process's `own_rows`."""
    axes = ("batch", *[None] * (array.ndim - 1))
    shape = (count, *array.shape[1:])
    sharding = jax.NamedSharding(mesh, spec(divided(shape, axes, mesh.shape)))
    local = range(count) if len(array) == count else own_rows(mesh, count)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, end, _ = index[0].indices(count)
        return array[local.index(first) : local.index(first) + end - first]

    return jax.make_array_from_callback(shape, sharding, part)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Inside jit: constrains the sharding of `x` by logical axes. Returns `x` without a mesh or on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(divided(x.shape, axes, mesh.shape)))


def replicated_over_tensor(axes_tree: Any) -> Any:
    """Replaces logical axes that the tensor axis splits with None, so that arrays are replicated over it."""
    replicated = lambda name: None if name is not None and "tensor" in (MESH_AXES[name] or ()) else name
    return jax.tree.map(lambda axes: tuple(map(replicated, axes)), axes_tree, is_leaf=_is_axes)


def divided(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh_shape: Mapping[str, int]
) -> tuple[str | None, ...]:
    """The logical axes of an array of this shape, with None for those that the tensor axis of a mesh of this shape
    (mesh axis -> size) does not divide: they are replicated.

    Experts are not, because copies of them would be most of the model.

    Raises:
      UserError: if a dimension does not divide evenly over the axes `data` and `fsdp`, or experts over `tensor`.
    """
    result = []
    for size, name in zip(shape, axes, strict=True):
        over = () if name is None else (MESH_AXES[name] or ())
        num_shards = math.prod(mesh_shape[axis] for axis in over)
        parts = name.count if isinstance(name, Parts) else size
        if (over != ("tensor",) or name == "expert") and parts % num_shards:
            divisors = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
            product = " * ".join(f"mesh.{axis}" for axis in over)
            raise UserError(
                f'axis "{name}" of size {size} does not split evenly over {product} = {num_shards}; '
                f"let that be one of {divisors}, or the size a multiple of {num_shards}"
            )
        result.append(None if parts % num_shards else name)
    return tuple(result)


def report_replicated(axes_tree: Any, shapes: Any, mesh: AnyMesh) -> None:
    """Logs which axes of these parameters are replicated because the mesh's tensor axis does not divide them."""
    replicated = set()
    for x, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes_tree, is_leaf=_is_axes), strict=True):
        for size, before, after in zip(x.shape, names, divided(x.shape, names, mesh.shape), strict=True):
            if before != after:
                replicated.add(f"{_WORDS[before]} {before.count if isinstance(before, Parts) else size}")
    if replicated:
        message = "mesh.tensor %d does not divide %s; every device of this axis holds a copy of their parameters"
        logging.warning(message, mesh.shape["tensor"], " and ".join(sorted(replicated)))


def axes(*names: str | None) -> Any:
    """A dataclass field that declares the logical axes of its arrays, for `declared_axes`."""
    return dataclasses.field(metadata={"axes": names})


def declared_axes(tree: Any) -> list[tuple[str | None, ...]]:
    """The logical axes that a tree's dataclasses declare for each of its arrays, in the order of `jax.tree.leaves`.

    Arrays without declared axes get None for each axis, so they are replicated on every device.
    """
    return [names or (None,) * leaf.ndim for leaf, names in _with_axes(tree, None)]


def _with_axes(tree: Any, names: tuple[str | None, ...] | None) -> Iterator[tuple[Any, tuple[str | None, ...] | None]]:
    for node in jax.tree.leaves(tree, is_leaf=dataclasses.is_dataclass):
        if dataclasses.is_dataclass(node):
            for field in dataclasses.fields(node):
                if not field.metadata.get("static"):
                    yield from _with_axes(getattr(node, field.name), field.metadata.get("axes"))
        else:
            yield node, names


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)
