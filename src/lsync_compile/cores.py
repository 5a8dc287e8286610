"""How many of the processor's cores this process may use.

A machine has more than a process is given where it is pinned to some of them, or where a container
has a share of processor time: cgroups count that as so many microseconds in each period. Threads
beyond it do not run in parallel; they use the share up early in each period, and then everything
stands still until the next.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOUNT = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_processes = 1  # of one program that share the cores, this one included


def usable_cores() -> int:
    """Cores by the process's affinity and by its groups' shares of time, at least one.

    Of these a part, where :func:`fit_threads` was told that other processes share them.
    """
    cores, share = _by_affinity(), processor_share()
    cores = cores if share is None else min(cores, math.ceil(share))
    return max(1, cores // _processes)


def _by_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_share(mount: Path = _MOUNT, own_groups: Path = _OWN_GROUPS) -> float | None:
    """Cores' worth of time that the process's groups allow it; None where nothing limits it.

    Args:
        mount: where cgroups are mounted, of version 1 or 2 or both.
        own_groups: the file that says which groups the process is in.
    """
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # not Linux
        return None
    shares = [share for line in lines for share in _shares(mount, line)]
    return min(shares, default=None)


def _shares(mount: Path, line: str) -> Iterator[float]:
    """The limits of a line ``number:controllers:/group``: of the group and those it is in."""
    number, _, rest = line.partition(":")
    controllers, _, group = rest.partition(":")
    if number == "0" and not controllers:
        for folder in _up(mount, group):
            yield from _of_version_2(folder)
    elif "cpu" in controllers.split(","):
        for name in {"cpu", controllers}:  # one of them may be a link to the other
            for folder in _up(mount / name, group):
                yield from _of_version_1(folder)


def _up(root: Path, group: str) -> Iterator[Path]:
    """The folders of a group and of those around it.

    In a container the root may be the group itself, under a name that is only known outside.
    """
    path = PurePosixPath(group.lstrip("/"))
    if ".." in path.parts:
        path = PurePosixPath()
    for each in (path, *path.parents):
        yield root / each


def _of_version_2(folder: Path) -> Iterator[float]:
    """``cpu.max`` holds microseconds, or "max", in each period of so many."""
    words = _read(folder / "cpu.max").split()
    if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
        yield int(words[0]) / int(words[1])


def _of_version_1(folder: Path) -> Iterator[float]:
    """The same in two files; -1 is no limit."""
    quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdecimal() and period.isdecimal() and int(period):
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def codec_threads() -> int:
    """Threads for a video codec; 0 leaves it to FFmpeg, which knows the affinity but no shares."""
    cores = usable_cores()
    return 0 if cores == _by_affinity() else cores


def fit_threads(processes: int | None = None) -> None:
    """Have torch and OpenCV use no more threads than there are cores for this process.

    Both count the machine's cores where nothing else is said. For programs: a library leaves such
    settings to the program it is part of. ``OMP_NUM_THREADS`` stands as it is.

    Args:
        processes: which share the cores; None for as many as were said before, at first one.
    """
    import cv2
    import torch

    global _processes
    _processes = max(1, processes or _processes)
    cores = usable_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
    if cv2.getNumThreads() > cores:
        cv2.setNumThreads(cores)
