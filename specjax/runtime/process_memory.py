"""Memory that this process occupies, now and at most, as Linux accounts for it."""

import ctypes
import gc
from pathlib import Path

from specjax.runtime.errors import UserError


def resident() -> int:
    """Bytes that this process occupies.

    Raises:
      UserError: on another system than Linux.
    """
    return _field("VmRSS")


def peak() -> int:
    """Bytes that this process has occupied at most since `reset_peak`, or since it began."""
    return _field("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def settled() -> int:
    """`resident`, once memory that was let go is the system's again; the peak begins anew."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # only glibc keeps so much of it
        trim(0)
    reset_peak()
    return resident()


def crowded(share: float = 0.5) -> bool:
    """Whether this process has mapped this share of the regions of memory that Linux lets it; False on another system.

    The CPU compiler maps up to some hundreds for a program, and at one that finds none left the process ends.
    """
    limit, mapped = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
    if not limit.exists() or not mapped.exists():
        return False
    return mapped.read_text().count("\n") > share * int(limit.read_text())


def _field(name: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"the memory of a process cannot be measured here (no {name} in {status}); run on Linux")
