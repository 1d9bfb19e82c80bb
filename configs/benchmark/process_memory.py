"""Memory of this process, now and at its peak, as Linux counts it in /proc/self/status."""

import ctypes
import gc
import re
from pathlib import Path

from specjax.runtime.errors import UserError


def resident(field: str = "VmRSS") -> int:
    """Bytes in use now. Raises UserError on systems other than Linux."""
    status = Path("/proc/self/status")
    kibibytes = re.search(rf"^{field}:\s+(\d+)", status.read_text() if status.exists() else "", re.MULTILINE)
    if not kibibytes:
        raise UserError(f"the memory of a process cannot be measured here (no {field} in {status}); run on Linux")
    return int(kibibytes[1]) * 1024


def peak() -> int:
    """The most bytes in use at any time since `reset_peak`, or since the process began."""
    return resident("VmHWM")


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
