"""Meshes of devices, and the one table that says which logical axis is split over which mesh axis.

Every parameter, cache and batch names its axes ("batch", "embed", ...). A mesh of one device is the special
case in which each of these splits is trivial.
"""

import math
from typing import Any

import jax

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


def make_mesh(config: Any) -> jax.sharding.Mesh:
    """A mesh of `data` x `fsdp` x `tensor` devices, as `config` says; 1 x 1 x 1 is the first device alone.

    Raises:
      UserError: for sizes below 1, and where the sizes do not multiply to the number of devices.
    """
    sizes = tuple(config[axis] for axis in AXES)
    said = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 for size in sizes):
        raise UserError(f"a mesh of {said} is not possible; every axis needs at least 1")
    wanted, devices = math.prod(sizes), jax.devices()
    alone = wanted == 1 and jax.process_count() == 1
    if wanted != len(devices) and not alone:
        raise UserError(
            f"a mesh of {said} needs {wanted} devices and there are {len(devices)}; "
            f"let mesh.data * mesh.fsdp * mesh.tensor be {len(devices)}"
        )
    # Auto: the compiler propagates shardings from parameters, caches and batches to everything else.
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:wanted])


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


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Inside jit, under `use`: `x` with its layout pinned. Without a mesh, or on one device, `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    check_divisible(x.shape, axes, mesh.shape)
    return jax.lax.with_sharding_constraint(x, spec(axes))


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
        ways = math.prod(mesh_shape[axis] for axis in over)
        if size % ways:
            divisors = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
            product = " * ".join(f"mesh.{axis}" for axis in over)
            raise UserError(
                f'axis "{name}" of size {size} does not split evenly over {product} = {ways}; '
                f"let that be one of {divisors}, or the size a multiple of {ways}"
            )


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)
