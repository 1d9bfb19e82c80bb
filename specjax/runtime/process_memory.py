"""Free memory, and the number of memory mappings of this process, which Linux limits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def crowded(share: float = 0.5) -> bool:
    """Whether this process has more than this share of the memory mappings that Linux allows.

    The CPU compiler creates up to hundreds of mappings for each program, and the process dies at the limit. Returns
    False on other systems.
    """
    limit, mapped = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
    if not limit.exists() or not mapped.exists():
        return False
    return mapped.read_text().count("\n") > share * int(limit.read_text())


def free_bytes(devices: Sequence[Any]) -> float:
    """Bytes that can still be allocated on these devices of this process; infinite where the system does not say.

    CPU devices share the memory that Linux can still give to processes.
    """
    if devices[0].platform == "cpu":
        path = Path("/proc/meminfo")
        lines = path.read_text().splitlines() if path.exists() else []
        return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))
    stats = [device.memory_stats() or {} for device in devices]
    return float(sum(each.get("bytes_limit", float("inf")) - each.get("bytes_in_use", 0) for each in stats))
