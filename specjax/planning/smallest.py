"""The smallest listed slice that holds a stage."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from specjax.planning import account
from specjax.planning.chips import Slice, slices_of
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# Of a chip's memory, what a compiler leaves to programs and their temporary arrays.
_USABLE = 0.97


def summary(
    stage: str,
    section: Any,
    needs: Callable[[Any], Mapping[str, int]],
    rows: Sequence[Mapping],
    part: Slice,
    sizes: Mapping[str, int],
) -> dict:
    """What a stage comes to on its slice, and the smallest slice of the same chip that holds it.

    Smaller and larger slices are not compiled for: what is resident is exact there, and temporary memory is what was
    compiled here, in proportion to the rows that a chip has.

    Args:
      needs: resident bytes on one chip of another mesh; raises UserError where sizes do not divide.
      sizes: of the mesh that the rows are for.
    """
    resident = max((sum(row["resident_bytes"].values()) for row in rows), default=0)
    peak = account.peak_of(rows)
    temporary = None if peak is None else max(peak - resident, 0)
    found = {"stage": stage, "slice": part.name, "peak_bytes": peak, "fits": all(row["fits"] for row in rows)}
    return found | {"smallest": _smallest(needs, temporary, part, sizes, trains=section.binary == "distill")}


def _smallest(needs, temporary: int | None, part: Slice, sizes: Mapping[str, int], *, trains: bool) -> dict | None:
    """The slice and its mesh; None where no listed one holds the stage, or the compiler refused this one."""
    if temporary is None:
        return None
    ways = sizes["data"] * sizes["fsdp"]
    for other in slices_of(part.chip):
        for mesh_sizes in _meshes(other.size, sizes, trains=trains):
            mesh = jax.sharding.AbstractMesh(tuple(mesh_sizes.values()), meshes.AXES)
            with contextlib.suppress(UserError):
                scaled = temporary * ways / (mesh_sizes["data"] * mesh_sizes["fsdp"])
                if sum(needs(mesh).values()) + scaled <= _USABLE * part.chip.memory:
                    return {"slice": other.name, "mesh": mesh_sizes}
    return None


def _meshes(chips: int, like: Mapping[str, int], *, trains: bool) -> Iterator[dict[str, int]]:
    """Meshes of so many chips: with the tensor axis asked for, then with wider and narrower ones.

    What the tensor axis leaves goes to `fsdp` in training, where that axis is in use, and else to `data`.
    """
    widths = [like["tensor"], *(2**power for power in range(9) if 2**power != like["tensor"])]
    for tensor in (width for width in widths if chips % width == 0):
        rest = chips // tensor
        fsdp = rest if trains and (like["fsdp"] > 1 or like["data"] == 1) else 1
        yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}
