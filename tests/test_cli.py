"""The command line: exit codes, one clear line for each error, JSON that a program can read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsync_compile import cli
from lsync_compile.doctor import Finding
from lsync_compile.media.video import read_frames
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.passes.spec import registered

Maker = Callable[..., Path]


@pytest.fixture
def lsync(
    monkeypatch: pytest.MonkeyPatch,
    tiny_pipeline: LatentSyncPipeline,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Run ``lsync`` with arguments on the tiny pipeline: (exit code, stdout, stderr)."""
    monkeypatch.setattr(
        LatentSyncPipeline, "from_pretrained", classmethod(lambda *_, **__: tiny_pipeline)
    )

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lsync", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SHORT = ("--steps", 1, "--num-frames", 4)
PLAIN = (*SHORT, "--no-compile")  # where compiling is not what is tested


def test_sync_writes_the_video_and_says_so(
    lsync: Callable, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    code, text, _ = lsync("sync", make_clip(4), make_speech(0.16), "-o", out, *SHORT)
    assert code == 0
    assert len(list(read_frames(out))) == 4
    assert "4 frames" in text


def test_json_is_one_object_with_the_report(
    lsync: Callable, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    code, text, _ = lsync(
        "sync", make_clip(4), make_speech(0.16), "-o", tmp_path / "o.mp4", "--json",
        "--report", report, *SHORT,
    )  # fmt: skip
    summary = json.loads(text)
    assert code == 0
    assert summary["frames"] == 4
    assert summary["report"] is not None
    assert json.loads(report.read_text()) == summary


def test_quiet_prints_nothing(
    lsync: Callable, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    code, text, errors = lsync(
        "sync", make_clip(4), make_speech(0.16), "-o", tmp_path / "o.mp4", "-q", *PLAIN
    )
    assert (code, text, errors) == (0, "", "")


def test_no_compile_runs_the_plain_pipeline_with_the_same_frames(
    lsync: Callable, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    clip, speech = make_clip(4), make_speech(0.16)
    lsync("sync", clip, speech, "-o", tmp_path / "plain.mp4", "--no-compile", *SHORT)
    lsync("sync", clip, speech, "-o", tmp_path / "eager.mp4", "--lowering", "eager", *SHORT)
    plain, eager = (list(read_frames(tmp_path / name)) for name in ("plain.mp4", "eager.mp4"))
    # Equal before the encoder (tests/test_pipeline_compiled.py); x264's threads may differ after.
    for a, b in zip(plain, eager, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 1


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("no face", 4, "no usable face"),
        ("no sound", 3, "no audio"),
        ("empty", 3, "clip.mp4"),
        ("truncated", 3, "clip.mp4"),
        ("missing", 3, "nowhere.mp4"),
        ("no folder", 3, "folder"),
        ("bad device", 2, "--device"),
    ],
)
def test_bad_input_is_one_line_and_keeps_the_old_output(
    lsync: Callable,
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
    case: str,
    code: int,
    words: str,
) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    clip, speech, extra = make_clip(4), make_speech(0.16), []
    if case == "no face":
        clip = make_clip(4, black=(0, 1, 2, 3))
    elif case == "no sound":
        clip, speech = make_clip(4, sound=False), None
    elif case == "empty":
        clip.write_bytes(b"")
    elif case == "truncated":
        clip.write_bytes(clip.read_bytes()[:300])
    elif case == "missing":
        clip = tmp_path / "nowhere.mp4"
    elif case == "no folder":
        out = tmp_path / "not" / "there" / "out.mp4"
    elif case == "bad device":
        extra = ["--device", "cuda:99"]
    paths = [clip] if speech is None else [clip, speech]
    got, text, errors = lsync("sync", *paths, "-o", out, "-q", *PLAIN, *extra)
    assert got == code
    assert text == ""
    assert errors.startswith("lsync: ")
    assert errors.count("\n") == 1
    assert words in errors
    if case != "no folder":
        assert out.read_bytes() == b"precious"


def test_interrupt_leaves_the_old_output(
    lsync: Callable,
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
    tiny_pipeline: LatentSyncPipeline,
) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    tiny_pipeline.vae.decoder.register_forward_pre_hook(interrupt)
    code, _, errors = lsync("sync", make_clip(12), make_speech(0.48), "-o", out, "-q", *PLAIN)
    assert code == 130
    assert "interrupted" in errors
    assert out.read_bytes() == b"precious"
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name or "part" in path.name]


def test_unknown_flag_suggests_the_nearest(lsync: Callable, tmp_path: Path) -> None:
    code, _, errors = lsync("sync", "a.mp4", "b.wav", "--presett", "exact")
    assert code == 2
    assert "--preset" in errors


def test_doctor_finds_what_this_test_run_needs(lsync: Callable) -> None:
    _, text, _ = lsync("doctor", "--json")
    states = {finding["name"]: finding["state"] for finding in json.loads(text)}
    assert states["codec libx264"] == "ok"
    assert states["backend"] == "ok"


def test_doctor_prints_extras_as_pip_takes_them(
    lsync: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding("extra quality", "warning", 'pip install "lsync-compile[quality]"')
    monkeypatch.setattr("lsync_compile.doctor.examine", lambda: [finding])
    assert "lsync-compile[quality]" in lsync("doctor")[1]


def test_explain_names_graphs_passes_and_stages(lsync: Callable) -> None:
    code, text, _ = lsync("explain", "--json", "--num-frames", 4)
    explanation = json.loads(text)
    assert code == 0
    graphs = {graph["record"]["target"]: graph["record"] for graph in explanation["graphs"]}
    assert list(graphs) == ["unet", "vae.encoder", "vae.decoder"]
    passes = {done["name"]: done for done in graphs["unet"]["passes"]}
    assert passes.keys() == registered().keys()
    assert "no kernel runs on a CPU" in passes["fuse_geglu"]["reason"]
    # As in a run: what depends on the sound or on the timestep has stages of its own.
    stages = {stage["name"] for stage in graphs["unet"]["stages"]}
    assert {"chunk", "timestep"} <= stages


def test_explain_takes_parts_and_shows_kernels_on_a_cpu(lsync: Callable, tmp_path: Path) -> None:
    code, text, _ = lsync(
        "explain", "--num-frames", 2, "--part", "unet", "--kernels", "on", "--dump", tmp_path
    )
    assert code == 0
    assert "unet.0.0" in text
    assert "vae.encoder.0" not in text
    assert "vae.decoder.0" not in text
    assert "pass fuse_geglu: 22 matches, nodes " in text
    assert "stage timestep: " in text
    assert {path.name.split(".")[-2] for path in (tmp_path / "unet.0.0").iterdir()} == {
        "before",
        "after",
    }
