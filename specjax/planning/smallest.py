"""Finds the smallest listed slice in whose memory a stage fits."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from specjax.planning.chips import Slice, slices_of
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# The fraction of a chip's memory that programs can use.
_USABLE = 0.97


def summary(
    stage: str,
    section: Any,
    needs: Callable[[Any], Mapping[str, int]],
    rows: Sequence[Mapping],
    part: Slice,
    sizes: Mapping[str, int],
) -> dict:
    """Whether a stage fits its slice, and the smallest slice of the same chip that it fits.

    Nothing is compiled for other slices: their resident memory is computed exactly, and their temporary memory is
    estimated in proportion to the batch rows per chip.

    Args:
      needs: function from a mesh to resident bytes on one chip; raises UserError if an axis does not divide evenly.
      rows: the rows of the stage's executables, see `account.row`.
      part: the slice that they were compiled for.
      sizes: the sizes of the mesh that they were compiled for.
    """
    resident = max((sum(row["resident_bytes"].values()) for row in rows), default=0)
    peaks = [row.get("peak_bytes") for row in rows]
    peak = None if None in peaks else max(peaks)  # None: an executable did not compile
    temporary = None if peak is None else max(peak - resident, 0)
    return {
        "stage": stage,
        "slice": part.name,
        "peak_bytes": peak,
        "fits": all(row["fits"] for row in rows),
        "smallest": _smallest(needs, temporary, part, sizes, trains=section.binary == "distill"),
    }


def _smallest(needs, temporary: int | None, part: Slice, sizes: Mapping[str, int], *, trains: bool) -> dict | None:
    """The smallest slice and its mesh; None if the stage fits no listed slice, or did not compile here."""
    if temporary is None:
        return None
    row_shards = sizes["data"] * sizes["fsdp"]
    for other in slices_of(part.chip):
        for mesh_sizes in _meshes(other.size, sizes, trains=trains):
            mesh = jax.sharding.AbstractMesh(tuple(mesh_sizes.values()), meshes.AXES)
            with contextlib.suppress(UserError):
                scaled = temporary * row_shards / (mesh_sizes["data"] * mesh_sizes["fsdp"])
                if sum(needs(mesh).values()) + scaled <= _USABLE * part.chip.memory:
                    return {"slice": other.name, "mesh": mesh_sizes}
    return None


def _meshes(chips: int, like: Mapping[str, int], *, trains: bool) -> Iterator[dict[str, int]]:
    """Sizes of meshes with this many chips: first with the config's `tensor` size, then with others.

    The other chips are on the `fsdp` axis in training if the config uses it, and otherwise on `data`.
    """
    widths = [like["tensor"], *(2**power for power in range(9) if 2**power != like["tensor"])]
    for tensor in (width for width in widths if chips % width == 0):
        rest = chips // tensor
        fsdp = rest if trains and (like["fsdp"] > 1 or like["data"] == 1) else 1
        yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}
