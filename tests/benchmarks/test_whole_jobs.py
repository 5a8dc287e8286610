"""The end-to-end benchmark on a tiny pipeline: its rows, its timelines, its budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pipeline as bench
import pytest
from trace_picture import draw

from lsync_compile.media.audio import load_audio
from lsync_compile.models.pipeline import LatentSyncPipeline


@pytest.fixture
def call(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Callable[..., Path],
    make_speech: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[dict[str, Any]]]:
    """A function that runs the script and gives the rows on file."""
    monkeypatch.setattr(bench, "make_pipeline", lambda *of: tiny_pipeline)
    # What is compiled has its own tests, and takes half a minute here.
    monkeypatch.setattr("lsync_compile.compiled.PipelineHandle.settle", lambda handle: None)
    clip, speech, out = make_clip(20), make_speech(0.3), tmp_path / "rows.json"
    files = ["--clip", clip, "--sound", speech, "--out", out, "--traces", tmp_path]

    def run(*words: str) -> list[dict[str, Any]]:
        shown = ["pipeline.py", "--device", "cpu", "--warm-up", "2", *map(str, files), *words]
        monkeypatch.setattr("sys.argv", shown)
        bench.main()
        return json.loads(out.read_text())["rows"] if out.exists() else []

    return run


def test_rows_timelines_and_going_on(
    call: Callable[..., list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = ["--settings", "exact", "path", "--with", "steps=4", "parallel_stages=on"]
    assert call(*few, "--lengths", "2", "--seconds", "0.0001") == []
    assert "out of time;" in capsys.readouterr().out
    rows = call(*few, "--lengths", "2")
    assert [(row["setting"].split("+")[0], row["frames"]) for row in rows] == [
        ("exact", 48),
        ("path", 48),
    ]
    for row in rows:
        assert row["frames_per_s"] > 0
        assert row["steady_frames_per_s"] > 0
        assert {"read", "faces", "encode", "denoise", "decode", "paste", "write"} == set(
            row["stage_ms"]
        )
        assert row["host_mib"]["peak"] >= max(row["host_mib"]["by_quarter"]) > 100
        assert row["graphs_compiled"] == row["recompiles"] == 0
        assert str(tmp_path) not in row["command"]
    assert rows[1]["options"]["temporal_start"] == "path"
    picture = (tmp_path / "path.clip.2s.svg").read_text()
    assert {"read", "denoise", "write"} <= {
        text.text for text in ElementTree.fromstring(picture).iter() if text.tag.endswith("text")
    }
    capsys.readouterr()
    # What is on file is not measured again.
    assert call(*few, "--lengths", "2") == rows
    assert capsys.readouterr().out == ""


def test_settings_say_what_differs() -> None:
    options, arguments = bench.parse_setting("exact+few_steps=5+lip_pool=2", ["guidance=1.0"])
    assert options == {"preset": "exact", "strict": True, "few_steps": 5, "lip_pool": "2"}
    assert arguments == {"num_inference_steps": 20, "guidance_scale": 1.0}
    for name in bench.NAMED:
        assert bench.parse_setting(name, [])[0]["preset"] == "exact"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fast", "no setting 'fast'"),
        ("exact+few_step=3", "did you mean 'few_steps'"),
        ("exact+strict", "not name=value"),
        ("exact+few_steps=x", "few_steps='x' must be"),
    ],
)
def test_other_settings_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bench.parse_setting(text, [])


def test_jobs_are_whole_chunks() -> None:
    assert [bench.whole_chunks(length) for length in (0.1, 0.64, 10, 60)] == [16, 16, 240, 1488]


def test_the_sound_is_repeated_to_the_length(
    make_speech: Callable[..., Path], tmp_path: Path
) -> None:
    path = bench.repeat_sound(make_speech(0.3), 1.0, tmp_path / "long.wav")
    sound = load_audio(path)
    assert len(sound) == 16_000
    assert sound[4800:9600] == pytest.approx(sound[:4800])


def test_a_picture_shows_a_part_and_needs_work_in_it() -> None:
    trace = {
        "traceEvents": [
            {"ph": "M", "tid": 0, "args": {"name": "read <1>"}},
            *(
                {"ph": "X", "tid": 0, "name": f"read {i}", "ts": 1e6 * i, "dur": 5e5,
                 "args": {"chunk": i}}
                for i in range(4)
            ),
        ]
    }  # fmt: skip
    assert draw(trace).count("<title>") == 4
    assert draw(trace, begin=1.2, end=2.1).count("<title>") == 2
    with pytest.raises(ValueError, match="nothing was done"):
        draw(trace, begin=9)
