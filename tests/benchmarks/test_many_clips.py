"""What the benchmark of many clips counts, and that it goes on where it was."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import many_clips
import pytest

from lsync_compile.jobs import JobOutcome


def test_the_rate_is_that_while_all_workers_have_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(many_clips.time, "perf_counter", lambda: clock[0])
    times = many_clips.Times()
    assert times.steady is None

    def at(second: float, first: int, second_worker: int, *, waits: bool = False) -> None:
        """Clips that the two workers have done by then."""
        clock[0] = 100.0 + second
        while len(times.done) < first + second_worker:
            times.tell(JobOutcome(len(times.done), "a.mp4", "done"))
        states = [
            SimpleNamespace(steps=(1, 4), jobs=first, doing="a.mp4"),
            SimpleNamespace(steps=(0, 4), jobs=second_worker, doing="waiting" if waits else "b"),
        ]
        times.show(SimpleNamespace(workers=states))

    at(9.0, 0, 0)
    at(20.0, 1, 0)
    at(22.0, 1, 1)  # warm
    at(24.0, 2, 1)
    at(26.0, 2, 2)
    at(28.0, 2, 3, waits=True)
    at(40.0, 3, 3, waits=True)  # the other one alone
    assert times.given == 9.0
    assert times.steady == pytest.approx(3 / 6)
    with pytest.raises(SystemExit, match=r"a\.mp4: failed no face"):
        times.tell(JobOutcome(2, "a.mp4", "failed", error="no face"))


def test_rows_on_file_are_not_measured_again_and_time_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[str] = []
    clock = [0.0]

    def measure(settings: Any, clips: Any, count: int, devices: str) -> dict[str, Any]:
        measured.append(devices)
        clock[0] += 30.0
        return {"clips_per_second": 1.0}

    monkeypatch.setattr(many_clips, "measure", measure)
    monkeypatch.setattr(many_clips, "save_small", lambda folder: str(folder))
    monkeypatch.setattr(many_clips, "cut", lambda *arguments: [])
    monkeypatch.setattr(many_clips.time, "monotonic", lambda: clock[0])
    words = ["--devices", "cpu", "cpu,cpu", "--out", str(tmp_path / "out.json"), "--seconds", "50"]
    monkeypatch.setattr(sys, "argv", ["many_clips.py", *words])
    with pytest.raises(SystemExit, match="out of time before cpu,cpu"):
        many_clips.main()
    many_clips.main()
    many_clips.main()
    assert measured == ["cpu", "cpu,cpu"]
