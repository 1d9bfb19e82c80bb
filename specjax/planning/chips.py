"""Accelerators, their peak rates, and the slices in which they are available.

Peak rates are those of the vendors' data sheets, for dense bfloat16. `interconnect` is the rate at which a chip sends
over all of its links together (half of a figure for both directions). One mesh axis may use fewer links, so times of
communication are lower bounds.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest

GIB = 2**30
_PLANAR = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
_NODES = ("1", "2", "4", "8", "16", "32", "64", "128", "256")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator.

    Attributes:
      name: the name used in `--plan`.
      flops: bfloat16 operations per second.
      memory: bytes of high-bandwidth memory.
      bandwidth: bytes per second to and from this memory.
      interconnect: bytes per second sent to other chips of the slice.
      slices: available topologies of TPU slices, or numbers of GPUs; smallest first.
      source: URL of the data sheet.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    interconnect: float
    slices: tuple[str, ...]
    source: str

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU, whose compiler runs without the chip."""
        return self.name.startswith("v")


_ALL = (
    Chip("v4", 275e12, 32 * GIB, 1228e9, 300e9, _CUBIC, "https://cloud.google.com/tpu/docs/v4"),
    Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, _PLANAR, "https://cloud.google.com/tpu/docs/v5e"),
    Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, _CUBIC, "https://cloud.google.com/tpu/docs/v5p"),
    Chip("v6e", 918e12, 32 * GIB, 1640e9, 448e9, _PLANAR, "https://cloud.google.com/tpu/docs/v6e"),
    # SXM, 80 GB, dense; NVLink 600, 900 and 900 GB/s in both directions.
    Chip("a100", 312e12, 80 * 10**9, 2039e9, 300e9, _NODES, "https://www.nvidia.com/en-us/data-center/a100/"),
    Chip("h100", 989e12, 80 * 10**9, 3350e9, 450e9, _NODES, "https://www.nvidia.com/en-us/data-center/h100/"),
    Chip("h200", 989e12, 141 * 10**9, 4800e9, 450e9, _NODES, "https://www.nvidia.com/en-us/data-center/h200/"),
)
CHIPS = {chip.name: chip for chip in _ALL}

# Compiler options by chip that make its two cores one device.
_ONE_DEVICE_PER_CHIP = {"v4": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A group of connected chips.

    Attributes:
      topology: arrangement of the chips, such as "4x4"; for GPUs their number.
    """

    chip: Chip
    topology: str

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(int(side) for side in self.topology.split("x"))

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.topology}"


def slices_of(chip: Chip) -> list[Slice]:
    """All listed slices of a chip, smallest first."""
    return [Slice(chip, topology) for topology in chip.slices]


def slice_named(name: str, size: int) -> Slice:
    """Parses "v5e:4x4", or "v5e" for the listed slice of `size` chips.

    Raises:
      UserError: if the chip or topology is not listed, or has another size.
    """
    kind, colon, topology = name.lower().partition(":")
    if kind not in CHIPS:
        raise UserError(f'there is no chip "{kind}" to plan for{nearest(kind, CHIPS)}')
    listed = slices_of(CHIPS[kind])
    sizes = ", ".join(f"{part.name} ({part.size})" for part in listed)
    if colon and topology not in CHIPS[kind].slices:
        raise UserError(f"{kind} has no slice {topology}; the listed ones and their numbers of chips are {sizes}")
    for part in listed:
        if part.size == size and topology in ("", part.topology):
            return part
    wanted = f"{name.lower()} has {Slice(CHIPS[kind], topology).size} chips" if colon else f"{kind} has none of {size}"
    raise UserError(
        f"the mesh has {size} devices and {wanted}; let mesh.data * mesh.fsdp * mesh.tensor be the size of a slice: "
        f"{sizes}"
    )


def make_mesh(part: Slice, sizes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh of the slice's devices, for compilation only; virtual CPU devices represent GPUs.

    Raises:
      UserError: if the TPU compiler is not installed, or this process has too few virtual devices.
    """
    devices = _tpus(part) if part.chip.is_tpu else _virtual(part.size)
    types = (jax.sharding.AxisType.Auto,) * len(meshes.AXES)
    shape = tuple(sizes[axis] for axis in meshes.AXES)
    return jax.make_mesh(shape, meshes.AXES, axis_types=types, devices=devices)


# Makes the compiler generate machine code once for identical parts of a program, such as layers. It saves a quarter of
# the compile time and does not change memory, work or HLO text, which the compiler determines earlier.
_SHARED_CODE = "--xla_tpu_enable_deduplicated_calls=true --xla_tpu_deduplicated_hlo_min_bundle_count=0"


def compile_only() -> None:
    """Configures JAX in this process for planning.

    JAX then ignores accelerators and creates as many virtual CPU devices as the largest GPU slice has. The TPU compiler
    skips its search for faster code, 80% of its time. Does nothing if JAX is initialised already or XLA_FLAGS sets the
    number of devices.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(int(count) for count in _NODES))
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_optimization_level", "O0")


def _tpus(part: Slice) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    # Do not look for a TPU, and do not lock one against other processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _SHARED_CODE not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{_SHARED_CODE} {flags}".strip()  # the user's flags win: the last one counts
    installed = str(Path(sys.prefix) / "tpu-compiler")  # where the Makefile installs it
    if importlib.util.find_spec("libtpu") is None and installed not in sys.path:
        sys.path.append(installed)
        importlib.invalidate_caches()
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed; run `make .venv/.installed-tpu-compiler`")
    options = dict(_ONE_DEVICE_PER_CHIP.get(part.chip.name, {}))
    if part.size == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # the default host is larger
    return topologies.get_topology_desc(part.name, "tpu", **options).devices


def _virtual(count: int) -> Sequence[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"the plan needs {count} virtual devices and this process has {len(devices)}; run it as a command of its "
            f"own, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]
