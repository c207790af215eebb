"""What this process may take of the machine: cores and memory, as its container allows."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that threads of this process can keep busy: those it may run on, or its container's share, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota_us, period_us in _quotas():
        if quota_us > 0 and period_us > 0:
            cores = min(cores, math.ceil(quota_us / period_us))
    return max(1, cores)


def usable_memory_bytes() -> int:
    """Memory that this process may have: the machine's, or its container's where that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in _groups():
        for name in ("memory.max", "memory.limit_in_bytes"):  # cgroups 2 and 1
            with contextlib.suppress(OSError, ValueError):  # no container, or no limit: "max"
                limits.append(int((group / name).read_text()))
    return min(limits)


def _quotas() -> Iterator[tuple[int, int]]:
    """(µs of processor time, in how many µs) of every group that limits it."""
    for group in _groups():
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()  # cgroups 2
            yield int(quota), int(period)
        with contextlib.suppress(OSError, ValueError):
            files = (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")  # cgroups 1; −1: no limit
            quota_us, period_us = (int(file.read_text()) for file in files)
            yield quota_us, period_us


def _groups() -> Iterator[Path]:
    """Folders of the groups of this process: each may limit what its members take together.

    Within a container the root of the tree shows the container's own limits.
    """
    roots = [_GROUPS, _GROUPS / "memory", _GROUPS / "cpu"]
    yield from roots
    with contextlib.suppress(OSError):
        for line in _OWN_GROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = _GROUPS / controllers if controllers else _GROUPS
            own = root / path.lstrip("/")
            for group in (own, *own.parents):
                if group == root or not group.is_relative_to(root):
                    break
                yield group
