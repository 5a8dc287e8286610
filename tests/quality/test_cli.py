"""`lsync quality` from the command line, on the tiny random pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lsync_compile.errors import MediaError, OptionError
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.quality.cli import quality
from lsync_compile.quality.compare import Compiler
from lsync_compile.quality.runs import Setting

Maker = Callable[..., Path]


@pytest.fixture
def invoke(
    tiny_pipeline: LatentSyncPipeline, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Run the command; errors come out as they are."""
    monkeypatch.setattr(
        LatentSyncPipeline, "from_pretrained", lambda *args, **options: tiny_pipeline
    )
    # Three steps instead of twenty: the tests are about the command.
    monkeypatch.setattr("lsync_compile.quality.compare.REFERENCE", Setting("reference", steps=3))
    app = typer.Typer()
    app.command()(quality)

    def run(*arguments: object) -> Any:
        words = [str(argument) for argument in arguments]
        return CliRunner(env={"COLUMNS": "160"}).invoke(
            app, [*words, "--device", "cpu"], catch_exceptions=False
        )

    return run


@pytest.mark.slow
def test_eager_lowering_is_identical(invoke: Callable[..., Any], make_clip: Maker) -> None:
    result = invoke(
        make_clip(4),
        "--num-frames",
        4,
        "--preset",
        "exact",
        "--steps",
        3,
        "--no-floors",
        "--json",
        "--check",
    )
    assert result.exit_code == 0
    study = json.loads(result.stdout)
    (candidate,) = study["candidates"]
    assert candidate["setting"]["options"] == {"preset": "exact", "lowering": "eager"}
    assert candidate["against_reference"]["mouth"]["psnr"]["note"] == "identical"
    assert candidate["against_original"]["mouth"]["psnr"]["value"] > 0
    assert study["verdicts"][0]["passed"]
    assert study["reference"]["setting"]["steps"] == 3


def test_fewer_steps_cost_quality(
    invoke: Callable[..., Any], make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    arguments = (make_clip(5), make_speech(0.2), "--num-frames", 5, "--max-frames", 4)
    result = invoke(
        *arguments, "--preset", "none", "--steps", 2, "--solver", "unipc", "--muted", "--html", page
    )
    assert result.exit_code == 0
    for words in (
        "Mouth region against reference",
        "candidate",
        "muted",
        "floor: float16",
        "floor: x264 crf 18",
        "4 frames; needs 50",
        f"page: {page}",
    ):
        assert words in result.stdout.replace("\n", " ")
    assert "against the original" not in result.stdout
    assert page.stat().st_size > 20_000


def test_a_missed_bar_can_fail(
    invoke: Callable[..., Any], make_clip: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "__call__", lambda self, pipeline, setting: pipeline)
    arguments = (make_clip(4), "--num-frames", 4, "--steps", 2, "--no-floors", "--json")
    assert invoke(*arguments).exit_code == 0
    result = invoke(*arguments, "--check")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdicts"][0]["shortfalls"]


def test_wrong_arguments_fail_before_the_work(
    invoke: Callable[..., Any], make_clip: Maker, tmp_path: Path
) -> None:
    clip = make_clip(4)
    with pytest.raises(OptionError, match="did you mean 'balanced'"):
        invoke(clip, "--preset", "balance")
    with pytest.raises(MediaError, match="does not exist"):
        invoke(clip, "--html", tmp_path / "nowhere" / "page.html")
    for option, wrong in (("--dtype", "float8"), ("--lowering", "c"), ("--detector", "eye")):
        assert invoke(clip, option, wrong).exit_code == 2
    assert invoke(clip, "--solver", "euler").exit_code == 2
