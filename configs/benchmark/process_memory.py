"""Memory of this process, now and at its peak, as Linux counts it in /proc/self/status."""

import ctypes
import gc
from pathlib import Path

from specjax.runtime.errors import UserError


def resident() -> int:
    """Bytes in use now. Raises UserError on systems other than Linux."""
    return _field("VmRSS")


def peak() -> int:
    """The most bytes in use at any time since `reset_peak`, or since the process began."""
    return _field("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def settled() -> int:
    """Returns freed memory to the system and resets the peak; then `resident()`."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # only glibc holds on to freed memory like this
        trim(0)
    reset_peak()
    return resident()


def _field(name: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"the memory of a process cannot be measured here (no {name} in {status}); run on Linux")
