"""What this machine, or the container around the process, lets us use: cores, memory, files."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from pathlib import Path

_ROOT = Path("/")


def physical_cores(root: Path = _ROOT, cpus: frozenset[int] | None = None) -> int:
    """Count the physical cores that this process may keep busy, at least 1.

    Two hardware threads of one core count once, because matrix products gain nothing from the
    second. A container's CPU quota lowers the count.

    Args:
        root: Where `sys` and `proc` are mounted; tests pass a folder.
        cpus: Logical CPUs allowed; the process's affinity by default.
    """
    allowed = frozenset(os.sched_getaffinity(0)) if cpus is None else cpus
    cores = {_siblings(root, cpu) for cpu in allowed}
    quota = _cpu_quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def free_cores() -> int:
    """Count the physical cores that nobody computes on now, at least 1.

    Threads of one matrix product wait for each other, so two busy threads on two busy cores take
    many times as long as one. Who is busy is told by the load average of the last minute.
    """
    return max(1, physical_cores() - round(os.getloadavg()[0]))


def available_memory(root: Path = _ROOT) -> int:
    """Return the bytes that can be allocated without swapping, within the container's limit."""
    free = [_meminfo(root, "MemAvailable")]
    for folder in _cgroup_folders(root):
        limit = _read(folder / "memory.max")
        used = _read(folder / "memory.current")
        if limit is not None and limit.isdigit() and used is not None:
            free.append(int(limit) - int(used))
    return max(0, min(free))


def give_memory_back() -> None:
    """Return what is freed to the system, where the C library would keep it for later.

    After a model was loaded, probed and packed that is several times its size.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def allow_files(wanted: int) -> int:
    """Let this process open so many files, or as many as it may; return the most that it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(soft, most)


def _siblings(root: Path, cpu: int) -> str:
    """Name the core of a logical CPU by its list of hardware threads."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    listed = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
    return listed or str(cpu)


def _cpu_quota(root: Path) -> float | None:
    """Return the tightest CPU quota of the surrounding cgroups, in cores."""
    quotas = []
    for folder in _cgroup_folders(root):
        limit = (_read(folder / "cpu.max") or "max").split()
        if len(limit) == 2 and limit[0] != "max":
            quotas.append(int(limit[0]) / int(limit[1]))
    legacy = root / "sys/fs/cgroup/cpu"
    quota, period = _read(legacy / "cpu.cfs_quota_us"), _read(legacy / "cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    """List the cgroup v2 folders from the process's own up to the root."""
    mount = root / "sys/fs/cgroup"
    lines = (_read(root / "proc/self/cgroup") or "").splitlines()
    own = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    folder = mount / own
    return [folder, *(parent for parent in folder.parents if mount in (parent, *parent.parents))]


def _meminfo(root: Path, key: str) -> int:
    """Read one line of /proc/meminfo, in bytes."""
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0


def _read(path: Path) -> str | None:
    """Return a file's text without surrounding space, or None when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
