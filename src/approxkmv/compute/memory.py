"""How much memory there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes; on the CPU no more than the limit of this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that the caching allocator holds but does not use is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    free = int(line.split()[1]) * 1024
    except OSError:
        pass
    return min(free, *(limit - used for limit, used in _limits()))


# Limit and usage of a control group, versions 2 and 1: a container or batch job may have less than the machine.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _limits() -> Iterator[tuple[int, int]]:
    yield 2**62, 0
    for limit, used in _GROUPS:
        try:
            # "max" is not a number: no limit.
            yield int(Path(limit).read_text()), int(Path(used).read_text())
        except (OSError, ValueError):
            continue
