"""Cores that a process may use: affinity, and the shares of time of both versions of cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lsync_compile import cores
from lsync_compile.cores import codec_threads, fit_threads, processor_share, usable_cores
from lsync_compile.media import container, writer
from lsync_compile.media.video import read_frames


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def groups(folder: Path, *lines: str) -> Path:
    path = folder / "groups"
    write(path, "\n".join(lines))
    return path


def test_version_2_has_both_numbers_in_a_file(tmp_path: Path) -> None:
    own = groups(tmp_path, "0::/a/b")
    write(tmp_path / "a" / "b" / "cpu.max", "250000 100000")
    assert processor_share(tmp_path, own) == 2.5
    write(tmp_path / "a" / "b" / "cpu.max", "max 100000")
    assert processor_share(tmp_path, own) is None
    write(tmp_path / "a" / "cpu.max", "400000 100000")  # of the group around it
    assert processor_share(tmp_path, own) == 4.0


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_version_1_has_a_file_for_each_number(tmp_path: Path, controllers: str) -> None:
    own = groups(tmp_path, "4:memory:/m", f"3:{controllers}:/docker/7", "0::/docker/7")
    folder = tmp_path / controllers / "docker" / "7"
    write(folder / "cpu.cfs_period_us", "100000")
    write(folder / "cpu.cfs_quota_us", "-1")
    assert processor_share(tmp_path, own) is None
    write(folder / "cpu.cfs_quota_us", "150000")
    assert processor_share(tmp_path, own) == 1.5


@pytest.mark.parametrize("group", ["/known/outside/only", "/../other", "/"])
def test_in_a_container_the_root_is_the_own_group(tmp_path: Path, group: str) -> None:
    write(tmp_path / "cpu.max", "100000 100000")
    assert processor_share(tmp_path, groups(tmp_path, f"0::{group}")) == 1.0


@pytest.mark.parametrize("text", ["", "max", "100000 0", "a b", "-1 100000", "1 2 3", "²  1"])
def test_what_is_no_share_limits_nothing(tmp_path: Path, text: str) -> None:
    write(tmp_path / "cpu.max", text)
    assert processor_share(tmp_path, groups(tmp_path, "0::/", "nonsense", "")) is None
    assert processor_share(tmp_path, tmp_path / "not there") is None


@pytest.mark.parametrize(("share", "expected"), [(None, 16), (0.3, 1), (2.5, 3), (64.0, 16)])
def test_the_smaller_of_affinity_and_share_counts(
    monkeypatch: pytest.MonkeyPatch, share: float | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "processor_share", lambda: share)
    assert usable_cores() == expected
    assert codec_threads() == (0 if expected == 16 else expected)


def test_processes_of_one_program_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_processes", 1)  # put back at the end
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "processor_share", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(cv2, "getNumThreads", lambda: 1)
    for processes, expected in ((3, 5), (None, 5), (40, 1)):
        fit_threads(processes)
        assert usable_cores() == codec_threads() == expected


def test_without_affinity_the_machines_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_programs_fit_their_threads_and_keep_what_the_user_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int]] = []
    for module, name in ((torch, "set_num_threads"), (cv2, "setNumThreads")):
        monkeypatch.setattr(module, name, lambda count, name=name: calls.append((name, count)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(cv2, "getNumThreads", lambda: 64)
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    fit_threads()
    assert calls == [("set_num_threads", 4), ("setNumThreads", 4)]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    calls.clear()
    fit_threads()
    assert calls == [("setNumThreads", 4)]
    monkeypatch.setattr(cores, "usable_cores", lambda: 128)
    calls.clear()
    fit_threads()
    assert calls == []


def test_files_are_written_and_read_with_a_share_of_one_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (writer, container):
        monkeypatch.setattr(module, "codec_threads", lambda: 1)
    path = tmp_path / "film.mp4"
    with writer.VideoWriter(path, 64, 64) as film:
        assert film._video.codec_context.thread_count == 1
        for level in range(5):
            film.write(np.full((64, 64, 3), 40 * level, dtype=np.uint8))
    assert [round(float(frame.mean()) / 40) for frame in read_frames(path)] == [0, 1, 2, 3, 4]
