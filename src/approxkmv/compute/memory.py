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


# Where control groups of version 2 and of version 1 lie, the controller that names this process's own in
# /proc/self/cgroup, and the files of the limit, of the usage and, within memory.stat, of the file cache.
_GROUPS = (
    ("/sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_OWN = "/proc/self/cgroup"


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and usage of this process's control group and of those around it, such as a container or a batch job."""
    yield 2**62, 0
    for root, controller, limit, usage, cache in _GROUPS:
        for folder in _own_groups(Path(root), controller):
            try:
                used = int((folder / usage).read_text()) - _cached(folder / "memory.stat", cache)
                # "max" is not a number: no limit.
                yield int((folder / limit).read_text()), used
            except (OSError, ValueError):
                continue


def _cached(stat: Path, name: str) -> int:
    """Bytes of cached files that a group's usage counts although the system drops them before anything else."""
    try:
        return int(dict(line.split() for line in stat.read_text().splitlines())[name])
    except (OSError, ValueError, KeyError):
        return 0


def _own_groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of those around it up to `root`."""
    try:
        lines = [line.split(":", 2) for line in Path(_OWN).read_text().splitlines()]
    except OSError:
        lines = []
    # Inside a container the path may be that of the machine, of which only the container's own group is seen, at root.
    paths = [root / path.lstrip("/") for _, controllers, path in lines if controller in controllers.split(",")]
    return [root, *{group for path in paths for group in (path, *path.parents) if root in group.parents}]
