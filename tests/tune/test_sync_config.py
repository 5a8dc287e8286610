"""Options from a file in production: what they were measured with, and the guard, by command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lsync_compile import cli
from lsync_compile.errors import OptionError
from lsync_compile.models.pipeline import LatentSyncPipeline

Maker = Callable[..., Path]
# What no one should run: one step of four, of which another graph sees cells instead of pictures.
BAD = {
    "preset": "exact",
    "compile_vae": False,
    "guidance_prefix": False,
    "null_audio": False,
    "few_steps": 1,
    "lip_attention": True,
    "lip_pool": "4",
}


def test_the_guard_reports_drift_falls_back_and_other_conditions_are_said(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        LatentSyncPipeline, "from_pretrained", classmethod(lambda *_, **__: tiny_pipeline)
    )
    config, out = tmp_path / "fast.json", tmp_path / "out.mp4"
    measured = {"steps": 20, "num_frames": 2, "device": "another GPU"}
    config.write_text(json.dumps({"options": BAD, "conditions": measured}))
    words = ["sync", make_clip(6), make_speech(0.24), "-o", out, "--config", config, "--steps", 4]
    words += ["--num-frames", 2, "--guard-every", 2, "--guard-floor", 99, "--json"]
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"]
    guard = report["features"]["guard"]
    assert (guard["checked"], guard["fallbacks"]) == (1, 1)
    assert 0 < guard["least_db"] < 99
    said = "\n".join(report["notes"])
    assert f"chunk 1 is {guard['least_db']:.1f} dB from the exact one" in said
    assert "chunks from 2 on are computed as 'exact'" in said
    assert "tuned options: steps: measured with 20, run with 4; quality and speed may" in said
    assert "tuned options: device: measured with another GPU, run with CPU" in said
    assert "num frames" not in said


def test_a_floor_without_a_guard_is_refused() -> None:
    result = CliRunner().invoke(cli.app, ["sync", "clip.mp4", "--guard-floor", "40"])
    assert isinstance(result.exception, OptionError)
    assert "--guard-floor does nothing without --guard-every" in str(result.exception)
