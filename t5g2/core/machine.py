"""The memory of this machine."""

import os
from pathlib import Path

# limits of the container, in cgroups of version 2 and 1
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Returns the bytes of memory of the machine, or of the container if that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Path(path).read_text().strip() for path in LIMITS if os.access(path, os.R_OK)]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])
