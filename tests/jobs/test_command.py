"""``lsync sync --jobs`` on several devices: what comes out is what one process makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsync_compile import cli
from lsync_compile.devices import choose_devices
from lsync_compile.errors import OptionError
from lsync_compile.media.video import read_frames
from lsync_compile.models.pipeline import LatentSyncPipeline

Maker = Callable[..., Path]


@pytest.fixture
def checkpoint(tiny_pipeline: LatentSyncPipeline, tmp_path: Path) -> Path:
    """The tiny pipeline as a folder, which other processes can load."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tiny_pipeline.unet.save_config(folder)
    (folder / "config.json").rename(folder / "unet.json")
    tiny_pipeline.unet.save_pretrained(folder, safe_serialization=True)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "unet.safetensors")
    tiny_pipeline.vae.save_pretrained(folder / "vae")
    tiny_pipeline.audio_encoder.save_pretrained(folder)
    (folder / "mini.json").write_text(json.dumps({"version": 1, "resolution": 64, "mask": None}))
    return folder


@pytest.fixture
def lsync(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run ``lsync`` with arguments: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lsync", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        return int(leaving.value.code or 0), captured.out, captured.err

    return call


def test_two_devices_make_what_one_makes(
    lsync: Callable, checkpoint: Path, make_speech: Maker, tmp_path: Path
) -> None:
    make_speech(0.3)
    sample = Path(cli.__file__).parent / "assets" / "sample" / "talking.mp4"
    lines = [f"{sample},speech.wav,a", f"{sample},,b", "gone.mp4,,c"]
    words = ["--checkpoint", checkpoint, "--steps", 2, "--num-frames", 4, "--max-frames", 5]
    summaries = []
    for name, devices in (("one", "cpu"), ("two", "cpu,cpu")):
        listed = tmp_path / f"{name}.csv"
        rows = [f"{line}-{name}.mp4" for line in lines]
        listed.write_text("\n".join(["video,audio,output", *rows]) + "\n")
        code, text, _ = lsync(
            "sync", "--jobs", listed, "--devices", devices, *words, "--no-compile", "--json"
        )
        assert code == 1  # one clip is not there
        summaries.append(json.loads(text))
    for summary in summaries:
        assert [job["state"] for job in summary["jobs"]] == ["done", "done", "failed"]
        assert "gone.mp4: no such file" in summary["jobs"][2]["error"]
    assert [len(summary["workers"]) for summary in summaries] == [1, 2]
    for name in "ab":
        one, two = (
            np.stack(list(read_frames(tmp_path / f"{name}-{how}.mp4"))) for how in ("one", "two")
        )
        np.testing.assert_array_equal(one, two)
    assert not list(tmp_path.glob(".*"))


def test_devices_are_checked_before_anything_is_loaded(lsync: Callable, tmp_path: Path) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("video,audio,output\na.mp4,,b.mp4\n")
    for words, said in (
        (["--jobs", listed, "--devices", "cpu,tpu"], "--device tpu: no such device"),
        (["--jobs", listed, "--devices", "cpu,"], "expected auto or names"),
        (["--jobs", listed, "--devices", "cpu", "--device", "cpu"], "one of the two"),
        (["a.mp4", "--devices", "cpu,cpu"], "for one clip use --device"),
        (["--jobs", listed, "--trace", tmp_path / "t.json"], "leave it out with --jobs"),
        (["--jobs", listed, "--report", tmp_path / "no" / "r.json"], "does not exist"),
    ):
        code, _, errors = lsync("sync", *words)
        assert code in (2, 3)
        assert said in errors


def test_auto_is_every_gpu_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert choose_devices("auto") == choose_devices(None) == ["cpu"]
    assert choose_devices("cpu, cpu") == ["cpu", "cpu"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_devices("auto") == choose_devices("cuda:0,cuda:1") == ["cuda:0", "cuda:1"]
    with pytest.raises(OptionError, match="the last GPU here is cuda:1"):
        choose_devices("cuda:0,cuda:2")
