"""The examples for other people's pipelines run as they are."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# What LatentSync's script does with its arguments, without its files.
SCRIPT = """
import sys
from latentsync.pipelines.lipsync_pipeline import LipsyncPipeline
from upstream_standin import DeepCacheSDHelper, OneConvolution, clip

if __name__ == "__main__":
    pipeline = LipsyncPipeline(OneConvolution)
    if "--enable_deepcache" in sys.argv:
        DeepCacheSDHelper(pipe=pipeline).enable()
    pipeline(*clip(), num_inference_steps=2)
    print("steps", pipeline.scheduler.num_inference_steps)
"""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def example(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_stable_diffusion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["-o", str(picture), "--steps", "3", "--lowering", "eager", "--deep-cache"]
    example("stable_diffusion.py", *arguments, monkeypatch=monkeypatch)
    assert picture.stat().st_size > 0
    assert "computed 1, reused 2" in capsys.readouterr().out


def test_contact_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = str(EXAMPLES.parent / "src" / "lsync_compile" / "assets" / "sample" / "talking.mp4")
    sheet = tmp_path / "sheet.jpg"
    arguments = [clip, clip, str(sheet), "--columns", "3", "--width", "40"]
    example("contact_sheet.py", *arguments, monkeypatch=monkeypatch)
    picture = cv2.imread(str(sheet))
    assert picture.shape[1] == 3 * 40
    assert picture.shape[0] % 2 == 0


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder laid out as LatentSync's repository, with the stand-in for its pipeline."""
    folder = tmp_path / "latentsync" / "pipelines"
    folder.mkdir(parents=True)
    (folder / "lipsync_pipeline.py").write_text("from upstream_standin import LipsyncPipeline\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "inference.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "latentsync"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "latentsync"]:
        del sys.modules[name]


def test_latentsyncs_repository(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LSYNC_OPTIONS", '{"lowering": "eager"}')
    example("latentsync_repository.py", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "face cache: frames 4" in printed
    assert "steps 2" in printed
    with pytest.raises(ValueError, match="DeepCacheSDHelper"):
        example("latentsync_repository.py", "--enable_deepcache", monkeypatch=monkeypatch)


def test_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no checkout of LatentSync's repository"):
        example("latentsync_repository.py", monkeypatch=monkeypatch)
