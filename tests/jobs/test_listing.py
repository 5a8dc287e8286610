"""Lists of clips: what is read, skipped, failed and done again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lsync_compile import cli
from lsync_compile.errors import Interrupted, MediaError, OptionError
from lsync_compile.jobs.listing import ListedJob, read_jobs, run_jobs
from lsync_compile.models.job import LipsyncOutput
from lsync_compile.models.pipeline import LatentSyncPipeline

Maker = Callable[..., Path]


def listing(folder: Path, *lines: str, head: str = "video,audio,output") -> Path:
    path = folder / "list.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def test_paths_are_from_the_lists_folder_and_sound_may_be_left_out(tmp_path: Path) -> None:
    jobs = read_jobs(listing(tmp_path, "a.mp4,a.wav,x.mp4", "/b.mp4,,y.mp4"))
    assert jobs == [
        ListedJob(2, tmp_path / "a.mp4", tmp_path / "a.wav", tmp_path / "x.mp4"),
        ListedJob(3, Path("/b.mp4"), None, tmp_path / "y.mp4"),
    ]


@pytest.mark.parametrize(
    ("lines", "head", "said"),
    [
        ((), "video,audio,output", "lists no clip"),
        (("a,b,c",), "video,sound,output", "audio missing"),
        (("a.mp4,a.wav,",), "video,audio,output", "line 2: video and output"),
        (("a,,x", "b,,x"), "video,audio,output", "line 3: x is written by line 2"),
    ],
)
def test_a_bad_list_is_refused(
    tmp_path: Path, lines: tuple[str, ...], head: str, said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        read_jobs(listing(tmp_path, *lines, head=head))


def test_a_missing_list_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"none\.csv"):
        read_jobs(tmp_path / "none.csv")


def test_a_failure_does_not_stop_the_others_and_an_interrupt_does(tmp_path: Path) -> None:
    jobs = read_jobs(listing(tmp_path, "a,,1.mp4", "b,,2.mp4", "c,,3.mp4"))
    jobs[2].output.write_bytes(b"")

    def sync(job: ListedJob) -> LipsyncOutput:
        if job.video.name == "a":
            raise MediaError("a: no such file")
        return LipsyncOutput(str(job.output), 5, 1, 2.0)

    states = [outcome.state for outcome in run_jobs(jobs, sync)]
    assert states == ["failed", "done", "skipped"]
    assert [each.state for each in run_jobs(jobs, sync, redo=True)] == ["failed", "done", "done"]

    def stop(job: ListedJob) -> LipsyncOutput:
        raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        run_jobs(jobs, stop)


def test_the_command_does_a_list_with_one_pipeline(
    monkeypatch: pytest.MonkeyPatch,
    tiny_pipeline: LatentSyncPipeline,
    capsys: pytest.CaptureFixture[str],
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
) -> None:
    loads = []
    monkeypatch.setattr(
        LatentSyncPipeline,
        "from_pretrained",
        classmethod(lambda *_, **__: loads.append(1) or tiny_pipeline),
    )
    make_clip(4)
    make_speech(0.16)
    path = listing(
        tmp_path, "clip.mp4,speech.wav,1.mp4", "gone.mp4,,2.mp4", "clip.mp4,speech.wav,3.mp4"
    )
    options = ["--steps", "1", "--num-frames", "4", "--no-compile", "--json"]
    monkeypatch.setattr(sys, "argv", ["lsync", "sync", "--jobs", str(path), *options])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    summary = json.loads(capsys.readouterr().out)
    assert leaving.value.code == 1
    assert (summary["done"], summary["failed"], loads) == (2, 1, [1])
    assert "gone.mp4" in summary["jobs"][1]["error"]
    assert (tmp_path / "1.mp4").exists()
    assert not (tmp_path / "2.mp4").exists()


def test_a_clip_or_a_list_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lsync", "sync"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "VIDEO or --jobs" in capsys.readouterr().err
