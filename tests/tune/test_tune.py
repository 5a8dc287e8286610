"""Tuning: the walk through candidates, the files it writes, and the two commands that know them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lsync_compile import LatentSyncPipeline, cli
from lsync_compile.errors import MediaError, OptionError
from lsync_compile.options import resolve_options
from lsync_compile.quality import cli as quality_cli
from lsync_compile.tune.configuration import read_configuration, write_configuration
from lsync_compile.tune.search import BASE, Group, Measured, Trial, best_of, groups, walk

Maker = Callable[..., Path]
STEPS = Group("steps", [(f"{n} steps", {"few_steps": n}) for n in (10, 5, 3)])
CROP = Group("decoder", [("crop", {"crop_decode": True})])
SOLVER = Group("solver", [("unipc", {"solver": "unipc"})])


def pretend(options: dict[str, Any]) -> Measured:
    """Steps cost a unit each and 1 dB, the decoder two units, UniPC is no faster."""
    steps = options.get("few_steps", 20)
    cost = steps + (1 if options.get("crop_decode") else 2)
    psnr = 60.0 - (20 - steps) - (1 if options.get("crop_decode") else 0)
    return Measured(psnr=psnr, ssim=0.99, flicker=0.1, fps=100 / cost)


def test_the_walk_keeps_what_is_faster_and_ends_a_group_at_the_floor() -> None:
    runs: list[str] = []

    def measure(name: str, options: dict[str, Any]) -> Measured:
        runs.append(name)
        return pretend(options)

    trials = list(walk(measure, min_psnr=44.0, tried=[STEPS, SOLVER, CROP]))
    assert runs == ["exact", "10 steps", "5 steps", "3 steps", "unipc", "crop"]
    assert [trial.verdict for trial in trials] == [
        "kept", "kept", "kept", "below the floor", "no faster", "kept",
    ]  # fmt: skip
    best = best_of(trials)
    assert best.options == {**BASE, "few_steps": 5, "crop_decode": True}
    assert best.measured.psnr == 44.0


def test_no_trial_begins_that_would_end_too_late() -> None:
    now = [0.0]

    def measure(name: str, options: dict[str, Any]) -> Measured:
        now[0] += 50
        return pretend(options)

    found = walk(measure, min_psnr=0.0, minutes=2.0, tried=[STEPS], clock=lambda: now[0])
    assert [trial.name for trial in found] == ["exact", "10 steps"]


def test_every_candidate_is_valid_options() -> None:
    base = dict(BASE)
    for group in groups(20):
        assert group.candidates
        for _, options in group.candidates:
            resolve_options(options={**base, **options})
    assert {"few_steps": 4} in [options for _, options in groups(5)[0].candidates]


def test_equal_pictures_are_written_as_json() -> None:
    trial = Trial("", "exact", dict(BASE), Measured(float("inf"), 1.0, 0.0, 2.0), "kept")
    assert json.loads(json.dumps(trial.to_dict(), allow_nan=False))["measured"]["psnr"] is None


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "fast.json"
    write_configuration(path, {"preset": "exact", "few_steps": 5}, clip="a.mp4")
    assert read_configuration(path) == {"preset": "exact", "few_steps": 5}
    with pytest.raises(MediaError, match="cannot be written"):
        write_configuration(tmp_path / "none" / "fast.json", {})
    for text, words in (
        ("{", "is no JSON"),
        ("[]", "expected"),
        ('{"options": {"few_stesp": 5}}', "did you mean 'few_steps'"),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match=words) as raised:
            read_configuration(path)
        assert str(path) in str(raised.value)
    with pytest.raises(OptionError, match="cannot be read"):
        read_configuration(tmp_path / "none.json")


def test_sync_takes_a_preset_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fast.json"
    path.write_text('{"options": {"few_steps": 0.5}}')
    for arguments, words in (
        (["--preset", "turbo", "--config", str(path)], "one of the two"),
        (["--config", str(path)], "few_steps=0.5 must be a whole number"),
    ):
        result = CliRunner().invoke(cli.app, ["sync", "clip.mp4", *arguments])
        assert isinstance(result.exception, OptionError)
        assert words in str(result.exception)


def test_the_command_writes_what_sync_reads(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality_cli, "load_pipeline", lambda *arguments: tiny_pipeline)
    monkeypatch.setattr(
        "lsync_compile.tune.search.groups",
        lambda steps: [Group("steps", [("1 step", {"few_steps": 1})])],
    )
    target = tmp_path / "fast.json"
    arguments = ["tune", str(make_clip(4)), "-o", str(target), "--device", "cpu", "--json"]
    more = ["--max-frames", "4", "--num-frames", "2", "--steps", "3", "--min-psnr", "0"]
    result = CliRunner().invoke(cli.app, [*arguments, *more, "--min-fps", "1e6"])
    assert result.exit_code == 1  # slower than was asked for, and written all the same
    written = json.loads(target.read_text())
    assert [trial["name"] for trial in written["tried"]] == ["exact", "1 step"]
    assert (
        written["tried"][0]["measured"]["psnr"] is None
        or written["tried"][0]["measured"]["psnr"] > 80
    )
    assert read_configuration(target) == written["options"]
    assert json.loads(result.stdout)["options"] == written["options"]
    assert tiny_pipeline.unet._compiled_call_impl is None
    far = CliRunner().invoke(cli.app, ["tune", "x.mp4", "-o", str(tmp_path / "no" / "a.json")])
    assert isinstance(far.exception, MediaError)
