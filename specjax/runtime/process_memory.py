"""Checks the number of memory mappings of this process, which Linux limits."""

from pathlib import Path


def crowded(share: float = 0.5) -> bool:
    """Whether this process has more than this share of the memory mappings that Linux allows.

    The CPU compiler creates up to hundreds of mappings for each program, and the process dies at the limit. Returns
    False on other systems.
    """
    limit, mapped = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
    if not limit.exists() or not mapped.exists():
        return False
    return mapped.read_text().count("\n") > share * int(limit.read_text())
