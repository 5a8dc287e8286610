"""What the system around a run does to it: signals, names, folders, other processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lsync_compile
from lsync_compile import cli
from lsync_compile.errors import MediaError, OptionError
from lsync_compile.media.video import count_frames, probe, read_frames
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.runtime.timeline import Timeline

Maker = Callable[..., Path]
SAMPLE = Path(lsync_compile.__file__).parent / "assets" / "sample"
LSYNC = [sys.executable, "-m", "lsync_compile.cli"]


def run(pipeline: Any, clip: Path, speech: Path | None, out: Path) -> int:
    result = pipeline(clip, speech, out, num_frames=4, num_inference_steps=1)
    return int(result.num_frames)


def test_a_signal_leaves_the_old_file_and_nothing_half(tmp_path: Path) -> None:
    """To a whole process, while its film is being written."""
    out = tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    arguments = ["sync", SAMPLE / "talking.mp4", SAMPLE / "speech.wav", "-o", out, "-q"]
    process = subprocess.Popen(
        [*LSYNC, *map(str, arguments), "--no-compile", "--num-frames", "8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, errors = process.communicate(timeout=120)
    assert (process.returncode, text) == (130, "")
    assert errors.count("\n") == 1
    assert "interrupted" in errors
    assert out.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_an_interrupt_while_models_load_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(LatentSyncPipeline, "from_pretrained", load)
    monkeypatch.setattr(sys, "argv", ["lsync", "sync", "clip.mp4", "speech.wav", "-q"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 130
    assert "Traceback" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_output_may_be_the_clip(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    clip = make_clip(8)
    assert run(tiny_pipeline, clip, make_speech(0.2), clip) == 5
    assert count_frames(clip) == 5
    assert probe(clip).has_audio


def test_the_output_is_no_sound_file(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    speech = make_speech(0.2)
    before = speech.read_bytes()
    with pytest.raises(MediaError, match=r"speech\.wav"):
        run(tiny_pipeline, make_clip(8), speech, speech)
    assert speech.read_bytes() == before


def test_links_are_read_through_and_replaced_by_files(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    target, link, clip = tmp_path / "target.mp4", tmp_path / "link.mp4", tmp_path / "clip link.mp4"
    target.write_bytes(b"somewhere else")
    link.symlink_to(target)
    clip.symlink_to(make_clip(4))
    assert run(tiny_pipeline, clip, make_speech(0.16), link) == 4
    assert not link.is_symlink()
    assert count_frames(link) == 4
    assert target.read_bytes() == b"somewhere else"
    around = tmp_path / "around.mp4"
    around.symlink_to(around)
    with pytest.raises(MediaError, match=r"around\.mp4"):
        probe(around)
    folder = tmp_path / "folder"
    folder.symlink_to(tmp_path / "gone", target_is_directory=True)
    with pytest.raises(MediaError, match="does not exist"):
        run(tiny_pipeline, clip, None, folder / "out.mp4")


def test_a_folder_that_takes_no_files_is_one_error(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc, which nobody may write to")
    with pytest.raises(MediaError, match=r"/proc/out\.mp4: cannot be written"):
        run(tiny_pipeline, make_clip(4), make_speech(0.16), Path("/proc/out.mp4"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_error(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o500)
    with pytest.raises(MediaError, match="cannot be written: Permission denied"):
        run(tiny_pipeline, make_clip(4), make_speech(0.16), folder / "out.mp4")


def test_names_with_dashes_spaces_and_other_letters_on_the_command_line(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(LatentSyncPipeline, "from_pretrained", lambda *_, **__: tiny_pipeline)
    monkeypatch.chdir(tmp_path)
    clip, speech = make_clip(4).rename("-my clip.mp4"), make_speech(0.16).rename("größe: 口.wav")
    words = ["--no-compile", "--steps=1", "--num-frames=4", "--output=-new: 1.mp4", "--"]
    monkeypatch.setattr(sys, "argv", ["lsync", "sync", *words, str(clip), str(speech)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 0
    assert "-new: 1.mp4: 4 frames" in capsys.readouterr().out
    assert len(list(read_frames("-new: 1.mp4"))) == 4


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [*LSYNC, "sync", "--jobs", os.fsencode(tmp_path / "größe 口") + b"\xff.csv"],
        env={**os.environ, **plain},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"lsync: --jobs ")


def test_a_trace_that_does_not_fit_on_the_disk_costs_no_film(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def save(timeline: Timeline, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Timeline, "save", save)
    monkeypatch.setattr("lsync_compile.compiled.PipelineHandle.settle", lambda handle: None)
    fast = lsync_compile.compile(
        tiny_pipeline, preset="exact", lowering="eager", trace=tmp_path / "trace.json"
    )
    assert run(fast, make_clip(4), make_speech(0.16), tmp_path / "out.mp4") == 4
    assert "no trace was written" in str(fast.lsync.report())
    fast = lsync_compile.compile(
        tiny_pipeline, preset="exact", lowering="eager", trace=tmp_path / "gone" / "trace.json"
    )
    with pytest.raises(OptionError, match="does not exist"):
        run(fast, make_clip(4), make_speech(0.16), tmp_path / "new.mp4")


WRITER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_clip_cache import encoding, face
from lsync_compile.runtime.clip_cache import ClipCache
for number in range(40):
    store = ClipCache(Path(sys.argv[1]), limit=2 * 2**20).open(f"clip{number % 2}", "mtcnn", "vae")
    for source in range(5):
        found = store.read(source, 4)
        assert found is None or torch.equal(found, encoding(source)), "a wrong encoding"
        store.write(source, 4, encoding(source))
    assert all(each.score == 0.9 for each in store.faces.values()), "a wrong face"
    store.commit({source: face(source) for source in range(number + 1)}, f"clip{number % 2}")
print("fine")
"""


def test_processes_share_a_cache_folder(tmp_path: Path) -> None:
    """Both write the same clips, and remove the other's when the folder is full."""
    helpers = str(Path(__file__).parent / "runtime")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), helpers],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in running:
        assert process.communicate(timeout=120) == ("fine\n", "")
    left = [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert left == []


def test_threads_that_share_a_pipeline_give_what_each_gives_alone(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    """The same plain pipeline, other clips and seeds; the steps are the same."""
    from concurrent.futures import ThreadPoolExecutor

    clips, speech = [make_clip(6), make_clip(9, name="b.mp4", black=(3,))], make_speech(0.36)

    def frames(which: int) -> list[bytes]:
        generator = torch.Generator().manual_seed(which)
        found = tiny_pipeline.synthesize(
            clips[which], speech, num_frames=4, num_inference_steps=2, generator=generator
        )
        return [frame.tobytes() for chunk in found for frame in chunk.frames]

    alone = [frames(which) for which in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(frames, (0, 1))) == alone
