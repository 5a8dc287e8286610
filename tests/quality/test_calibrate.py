"""Calibrating: the best steps for every budget, a floor that is kept, a schedule that is found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lsync_compile
from lsync_compile import LatentSyncPipeline
from lsync_compile.cli import app
from lsync_compile.errors import OptionError
from lsync_compile.lowering.deep_cache import policy
from lsync_compile.quality import calibrate as module
from lsync_compile.quality.calibrate import FeatureSample, _fewest, best_choices, calibrate
from lsync_compile.quality.compare import Clip
from lsync_compile.runtime.calibration import (
    Calibration,
    calibration_file,
    fingerprint,
    load_calibrations,
    save_calibration,
)
from lsync_compile.runtime.context import StepContext

FOUND = Calibration(4, 0, "linear", (0, 1, 3), 50.0, 40.0, "clip.mp4", 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSYNC_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_choices_are_the_best_of_all(order: int) -> None:
    steps, generator = 6, torch.Generator().manual_seed(order)
    table: dict[Any, float] = {}

    def error(known: tuple[int, ...], step: int) -> float:
        if (known, step) not in table:
            table[known, step] = torch.rand((), generator=generator).item()
        return table[known, step]

    def total(chosen: tuple[int, ...]) -> float:
        missing = [step for step in range(steps) if step not in chosen]
        before = {step: [each for each in chosen if each < step] for step in missing}
        return sum(error(tuple(before[step][-order - 1 :]), step) for step in missing)

    choices = best_choices(steps, order, error)
    assert sorted(choices) == list(range(1, steps + 1))
    for count, chosen in choices.items():
        everything = [(0, *rest) for rest in itertools.combinations(range(1, steps), count - 1)]
        assert chosen == min(everything, key=total)


def test_the_error_is_of_the_prediction() -> None:
    sample = FeatureSample()
    for step, value in enumerate([1.0, 3.0, 5.0, 9.0]):
        context = StepContext("run", 0, step, 4, timestep=float(-step))
        sample(context, torch.full((10,), value))
        sample(StepContext("run", 1, step, 4), torch.zeros(10))  # another chunk
    assert sample.error((0,), 2) == pytest.approx(4 / 5)
    assert sample.error((0, 1), 2) == 0
    assert sample.error((0, 1), 3) == pytest.approx(2 / 9)


def test_the_fewest_above_the_floor() -> None:
    asked: list[int] = []

    def quality(count: int) -> float:
        asked.append(count)
        return 10.0 * count

    assert _fewest(20, 45, quality) == (5, 50.0)
    assert len(asked) <= 5
    with pytest.raises(OptionError, match="no schedule reaches 500 dB"):
        _fewest(20, 500, quality)


def test_a_checkpoint_is_known_by_its_weights() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 64).half()
    other = torch.nn.Linear(64, 64).half()
    known = fingerprint(module)
    assert fingerprint(module.float()) == known
    assert fingerprint(other) != known
    assert load_calibrations(module) == {}
    save_calibration(module, FOUND)
    again = Calibration(**{**vars(FOUND), "mouth_psnr": 51.0})
    more = Calibration(**{**vars(FOUND), "steps": 8})
    save_calibration(module, more)
    assert save_calibration(module, again) == calibration_file(module)
    assert load_calibrations(module) == {again.key: again, more.key: more}
    assert load_calibrations(other) == {}
    left = {path.suffix for path in calibration_file(module).parent.iterdir()}
    assert left == {".json", ".lock"}  # and nothing half written


def test_a_calibrated_pipeline_computes_the_steps_that_were_found(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Callable[..., Path],
    make_speech: Callable[..., Path],
) -> None:
    options = {"lowering": "eager", "strict": True}
    chosen = {**options, "deep_cache": True, "deep_cache_schedule": "calibrated",
              "deep_cache_predictor": "linear", "compile_vae": False}  # fmt: skip
    with pytest.raises(OptionError, match="run `lsync calibrate CLIP` first"):
        lsync_compile.compile(tiny_pipeline, **chosen)
    assert tiny_pipeline.unet._compiled_call_impl is None

    clip = Clip(make_clip(8), make_speech(0.16))
    found = calibrate(tiny_pipeline, clip, steps=4, floor=1, options=options)
    assert tiny_pipeline.unet._compiled_call_impl is None
    assert found.computed[0] == 0
    assert len(found.computed) < 4
    assert found.mouth_psnr >= 1
    save_calibration(tiny_pipeline.unet, found)

    fast = lsync_compile.compile(tiny_pipeline, **chosen)  # not run: that costs another capture
    session = fast.lsync._session
    assert policy(session, 4).schedule.computed(4) == found.computed
    assert not any("no calibration" in note for note in session.report().notes)
    assert policy(session, 5).schedule.computed(5) == (0, 3)  # nothing is known of 5 steps
    assert any("no calibration for 5 steps" in note for note in session.report().notes)
    fast.lsync.undo()


def test_the_command_files_what_it_finds(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LatentSyncPipeline, "from_pretrained", lambda *_, **__: tiny_pipeline)
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: FOUND)
    arguments = ["calibrate", str(make_clip(4)), "--device", "cpu", "--floor", "40"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "3 of 4 steps compute deep features (0, 1, 3): mouth PSNR 50.00 dB" in result.stdout
    assert load_calibrations(tiny_pipeline.unet) == {FOUND.key: FOUND}
    answer = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert answer["computed"] == [0, 1, 3]
    assert Path(answer["file"]) == calibration_file(tiny_pipeline.unet)
