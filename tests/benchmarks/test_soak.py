"""The soak: many short clips in one process, and that growth is seen and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import soak

from lsync_compile.models.pipeline import LatentSyncPipeline


def test_growth_is_told_from_noise_and_from_warming_up() -> None:
    warm = [100.0, 300.0]
    assert soak.growth([*warm, 500, 501, 499, 500, 501, 500]) == pytest.approx(0, abs=1)
    assert soak.growth([*warm, 500, 520, 540, 560, 580, 600]) == pytest.approx(80)


def test_short_clips_one_after_the_other_leave_memory_flat(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Callable[..., Path],
    make_speech: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is compiled has its own tests, and takes half a minute here.
    monkeypatch.setattr("lsync_compile.compiled.PipelineHandle.settle", lambda handle: None)
    monkeypatch.setattr(soak, "small_pipeline", lambda *of: tiny_pipeline)
    monkeypatch.setenv("LSYNC_CACHE", str(tmp_path))  # put back at the end
    out = tmp_path / "rows.json"
    files = ["--clip", make_clip(16), "--speech", make_speech(0.6), "--out", out]
    # The process has much else in it here: 22 MiB were seen once that were none of these jobs.
    words = ["--device", "cpu", "--chunks", "24", "--kinds", "2", "--most", "32", *map(str, files)]
    monkeypatch.setattr(
        "sys.argv", ["soak.py", *words, "--with", "parallel_stages=on", "clip_cache=True"]
    )
    soak.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["jobs"], len(row["resident_mib"])) == (16, 16)  # of one chunk and two in turns
    written = out.stat().st_mtime_ns
    soak.main()
    assert out.stat().st_mtime_ns == written  # what is on file is not measured again
    assert row["grown_mib"] < 32
    monkeypatch.setattr("sys.argv", ["soak.py", *words[:3], "8", *words[4:], "--most", "-1000"])
    with pytest.raises(SystemExit, match="grew by"):
        soak.main()
    monkeypatch.setattr("sys.argv", ["soak.py", *words, "--again", "--seconds", "0"])
    with pytest.raises(SystemExit, match="of 24 chunks in 0 s"):
        soak.main()
