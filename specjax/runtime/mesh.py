"""Meshes of devices, and the one table that says which logical axis is split over which mesh axis.

Every parameter, cache and batch names its axes ("batch", "embed", ...). A mesh of one device is the special
case in which each of these splits is trivial.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from specjax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Of devices, or of their number alone: shapes are laid out on either.
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# Logical axis -> the mesh axes it is split over; None is a whole copy on every device.
RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head": None,
    "slots": None,
    "layers": None,
    "norm": None,
}


def sizes_of(config: Any) -> tuple[int, int, int]:
    """How long each of `AXES` is, as `config` says. Raises UserError for a size below 1."""
    sizes = tuple(config[axis] for axis in AXES)
    if min(sizes) < 1:
        raise UserError(f"a mesh of {_said(sizes)} is not possible; every axis needs at least 1")
    return sizes


def _said(sizes: tuple[int, int, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))


def make_mesh(config: Any) -> jax.sharding.Mesh:
    """A mesh of `data` x `fsdp` x `tensor` devices, as `config` says; 1 x 1 x 1 is the first device alone.

    Where devices come in several slices, between which the network is slow, `data` runs over the slices, and `fsdp`
    over what `data` is too small for; `tensor` stays within one.

    Raises:
      UserError: for sizes below 1, where the sizes do not multiply to the number of devices, and where slices would
        have to share a `tensor` axis.
    """
    sizes = sizes_of(config)
    wanted, devices = math.prod(sizes), jax.devices()
    alone = wanted == 1 and jax.process_count() == 1
    if wanted != len(devices) and not alone:
        several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        raise UserError(
            f"a mesh of {_said(sizes)} needs {wanted} devices and there are {len(devices)}{several}; "
            f"let mesh.data * mesh.fsdp * mesh.tensor be {len(devices)}"
        )
    # Auto: the compiler propagates shardings from parameters, caches and batches to everything else.
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    devices = devices[:wanted]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return jax.sharding.Mesh(lay_out(sizes, devices, slices), AXES, axis_types=types)


def lay_out(sizes: tuple[int, int, int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """Devices of several slices in the shape of a mesh. Raises UserError where slices do not divide it."""
    between = over_slices(sizes, slices)
    within = tuple(size // num_shards for size, num_shards in zip(sizes, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices)


def over_slices(sizes: tuple[int, int, int], slices: int) -> tuple[int, int, int]:
    """Into how many parts each axis is cut by the slices. Raises UserError where the slices do not divide them."""
    data, fsdp, _ = sizes
    num_shards = math.gcd(data, slices), slices // math.gcd(data, slices)
    if fsdp % num_shards[1]:
        raise UserError(
            f"the devices are in {slices} slices, over which mesh.data {data} and mesh.fsdp {fsdp} do not divide; "
            f"let mesh.data be a multiple of {slices} (mesh.tensor stays within a slice: the network between is slow)"
        )
    return (*num_shards, 1)


def use(mesh: jax.sharding.Mesh):
    """A context in which `constrain` refers to this mesh."""
    return jax.set_mesh(mesh)


def spec(axes: tuple[str | None, ...]) -> jax.P:
    """The partition of an array whose dimensions have these logical names (None: not split)."""
    unknown = [name for name in axes if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"Logical axes without a rule: {', '.join(unknown)}; add them to RULES.")
    return jax.P(*(None if name is None else RULES[name] for name in axes))


def shardings(axes_tree: Any, mesh: AnyMesh, shapes: Any = None) -> Any:
    """NamedShardings in the place of each tuple of logical names.

    Args:
      axes_tree: tuples of logical names (or None), one name a dimension.
      mesh: where to.
      shapes: the same tree of arrays or ShapeDtypeStructs, if it is to be checked that the dimensions divide.

    Raises:
      UserError: for a dimension that does not divide evenly over its mesh axes.
    """
    if shapes is None:
        return jax.tree.map(lambda axes: jax.NamedSharding(mesh, spec(axes)), axes_tree, is_leaf=_is_axes)

    def checked(x: Any, axes: tuple[str | None, ...]) -> jax.NamedSharding:
        check_divisible(x.shape, axes, mesh.shape)
        return jax.NamedSharding(mesh, spec(axes))

    return jax.tree.map(checked, shapes, axes_tree)


def abstract(shapes: Any, placed: Any) -> Any:
    """ShapeDtypeStructs of these shapes (or arrays) with these shardings: what is compiled for without an array."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed)


def local_bytes(tree: Any) -> int:
    """What the arrays, or shapes with shardings, occupy on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def platform() -> str:
    """Of the devices of the mesh in use, which need not be there, or of the default one: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def shard(tree: Any, axes_tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The arrays, laid out on the mesh. Raises UserError for a dimension that does not divide evenly."""
    return jax.device_put(tree, shardings(axes_tree, mesh, shapes=tree))


def pin_last(x: jax.Array, name: str) -> jax.Array:
    """As `constrain`, of the last axis alone, and only where it divides; how the others lie is left to the compiler."""
    if not splits(name) or x.shape[-1] % num_shards(name):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(*[jax.P.UNCONSTRAINED] * (x.ndim - 1), RULES[name]))


def pin_rows(x: jax.Array) -> jax.Array:
    """As `constrain`, of activations: rows split as a batch is, all else whole; and only where the rows divide.

    Without it the compiler keeps weights that are spread over `fsdp` where they are, and sends every row to all of
    them: what a chip sends and holds would grow with the number of chips.
    """
    if not splits("batch") or x.shape[0] % num_shards("batch"):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(RULES["batch"], *[None] * (x.ndim - 1)))


def splits(name: str) -> bool:
    """Inside jit, under `use`: whether this logical axis is spread over devices."""
    return num_shards(name) > 1


def num_shards(name: str) -> int:
    """Inside jit, under `use`: over how many devices this logical axis is spread; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[name] or ())


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array that every process has whole, on the devices of the sharding; each process places its own part."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def own_rows(mesh: jax.sharding.Mesh, count: int) -> tuple[int, ...]:
    """Which rows of a batch of `count` lie on devices of this process: all of them where it is alone.

    Raises:
      UserError: for a batch that does not divide evenly over the mesh.
    """
    check_divisible((count,), ("batch",), mesh.shape)
    sharding = jax.NamedSharding(mesh, spec(("batch",)))
    places = sharding.addressable_devices_indices_map((count,)).values()
    return tuple(sorted({row for place in places for row in range(*place[0].indices(count))}))


def place_rows(array: np.ndarray, count: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """The batch of `count` rows of which this process has all, or its `own_rows`, on the mesh."""
    axes = ("batch", *[None] * (array.ndim - 1))
    shape = (count, *array.shape[1:])
    check_divisible(shape, axes, mesh.shape)
    sharding = jax.NamedSharding(mesh, spec(axes))
    if len(array) == count:
        return place(array, sharding)
    own = own_rows(mesh, count)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, end, _ = index[0].indices(count)
        at = own.index(first)
        return array[at : at + end - first]

    return jax.make_array_from_callback(shape, sharding, part)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Inside jit, under `use`: `x` with its layout pinned. Without a mesh, or on one device, `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    check_divisible(x.shape, axes, mesh.shape)
    return jax.lax.with_sharding_constraint(x, spec(axes))


def replicated_over_tensor(axes_tree: Any) -> Any:
    """The tree of logical names without those that are split over the tensor axis."""
    kept = lambda name: None if name is not None and "tensor" in (RULES[name] or ()) else name
    return jax.tree.map(lambda axes: tuple(map(kept, axes)), axes_tree, is_leaf=_is_axes)


def check_divisible(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh_shape: Any) -> None:
    """Raises UserError where a dimension does not divide evenly over its mesh axes.

    Args:
      shape: of the array.
      axes: its logical names.
      mesh_shape: mesh axis -> size.
    """
    if len(shape) != len(axes):
        raise ValueError(f"An array of shape {tuple(shape)} has {len(shape)} axes, not {axes}.")
    for size, name in zip(shape, axes, strict=True):
        over = () if name is None else (RULES[name] or ())
        num_shards = math.prod(mesh_shape[axis] for axis in over)
        if size % num_shards:
            divisors = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
            product = " * ".join(f"mesh.{axis}" for axis in over)
            raise UserError(
                f'axis "{name}" of size {size} does not split evenly over {product} = {num_shards}; '
                f"let that be one of {divisors}, or the size a multiple of {num_shards}"
            )


def check_split(sizes: Mapping[str, int], mesh: jax.sharding.Mesh) -> None:
    """Refuses a model that does not split evenly over the tensor axis.

    Args:
      sizes: what of it is split there: heads, vocabulary, ...

    Raises:
      UserError: with the sizes of the axis that divide it.
    """
    tensor, common = mesh.shape["tensor"], math.gcd(*sizes.values())
    uneven = [f"{name} {size}" for name, size in sizes.items() if size % tensor]
    if uneven:
        working = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise UserError(
            f"mesh.tensor {tensor} does not divide {' and '.join(uneven)} of this model; let it be one of {working}"
        )


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)
