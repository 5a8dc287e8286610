"""The ComfyUI nodes in a stand-in of its executor, on a tiny random pipeline."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_standin import (
    Host,
    InterruptProcessingException,
    Link,
    RefusedError,
    VideoFromFile,
    execute,
    installed,
)

from lsync_compile.errors import CheckpointError, MediaError, NoFaceError, OptionError
from lsync_compile.integrations.comfyui import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    nodes,
)
from lsync_compile.media.audio import load_audio
from lsync_compile.media.video import probe, read_frames
from lsync_compile.models.pipeline import LatentSyncPipeline

Maker = Callable[..., Path]
RUN = {"seed": 7, "steps": 2, "guidance": 1.5, "on_missing_face": "pass"}
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "comfyui"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    root = tmp_path / "ComfyUI"
    root.mkdir()
    return installed(Host(root), monkeypatch)


@pytest.fixture
def held(tiny_pipeline: LatentSyncPipeline) -> Link:
    """A pipeline as the load node gives it, but for what compiling would take."""
    vars(tiny_pipeline)["lsync"] = SimpleNamespace(report=lambda: "what was done")
    return Link("LSYNC_PIPELINE", tiny_pipeline)


def images(path: Path) -> Link:
    """The frames of a file as an IMAGE, made in inference mode as everything there is."""
    with torch.inference_mode():
        return Link("IMAGE", torch.from_numpy(np.stack(list(read_frames(path)))).float() / 255)


def audio(path: Path, channels: int = 2) -> Link:
    with torch.inference_mode():
        waveform = torch.from_numpy(load_audio(path)).repeat(1, channels, 1)
        return Link("AUDIO", {"waveform": waveform, "sample_rate": 16_000})


def test_the_classes_are_nodes() -> None:
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node, node.FUNCTION))
        assert node.CATEGORY
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        for group in node.INPUT_TYPES().values():
            for kind, *settings in group.values():
                assert isinstance(kind, (str, list))
                widget = settings[0] if settings else {}
                if isinstance(kind, list) and "default" in widget:
                    assert widget["default"] in kind


def test_the_folder_for_custom_nodes_gives_them() -> None:
    """As ComfyUI loads it: a package by its path, under a name that is no identifier."""
    spec = importlib.util.spec_from_file_location(str(EXAMPLE), EXAMPLE / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS is NODE_DISPLAY_NAME_MAPPINGS


def test_nothing_of_comfyui_is_imported() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, lsync_compile.integrations.comfyui\n"
            "print([name for name in sys.modules if name.startswith(('comfy', 'folder_paths'))])",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.strip() == "[]"


def test_frames_come_out_as_the_pipeline_makes_them(
    host: Host, held: Link, make_clip: Maker, make_speech: Maker
) -> None:
    """An odd size, a looped clip, stereo: 25 frames/s, as long as the sound, the inputs as is."""
    clip, speech = make_clip(6), make_speech(0.36)
    given = images(clip)
    given = Link("IMAGE", given.value[:, :127, :159])
    before = given.value.clone()
    sound = audio(speech)
    values = {"pipeline": held, "images": given, "audio": sound, "fps": 25.0, **RUN}
    synced, heard, fps, report = execute(nodes.SyncFrames, values)
    assert synced.shape == (9, 127, 159, 3)
    assert synced.dtype == torch.float32
    assert not synced.is_inference()
    assert 0 <= float(synced.min()) < float(synced.max()) <= 1
    assert heard is sound.value
    assert fps == 25
    assert report.splitlines() == ["9 frames", "what was done"]
    assert torch.equal(given.value, before)
    expected = [
        frame
        for chunk in held.value.synthesize(
            nodes.FrameArray(given.value, 25),
            speech,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(7),
        )
        for frame in chunk.frames
    ]
    assert np.array_equal((synced * 255).round().byte().numpy(), np.stack(expected))
    (bar,) = host.bars
    assert bar[-1] == (2, 2)
    assert host.unloaded == 0  # on a CPU there is nothing to make room on


@pytest.mark.parametrize(("fps", "shown"), [(12.5, [0, 0, 1, 1]), (50.0, [0, 2, 4, 4])])
def test_the_rate_of_the_frames_is_honoured(
    host: Host, held: Link, make_clip: Maker, make_speech: Maker, fps: float, shown: list[int]
) -> None:
    """A corner, far from the face, says which frame it is."""
    given = images(make_clip(6)).value.clone()
    given[:, :8, :8] = torch.arange(6).view(6, 1, 1, 1) * 20 / 255
    values = {
        "pipeline": held,
        "images": Link("IMAGE", given),
        "audio": audio(make_speech(0.16)),
        "fps": fps,
        **RUN,
    }
    synced, *_ = execute(nodes.SyncFrames, values)
    assert (synced[:, 4, 4, 0] * 255 / 20).round().tolist() == shown


def test_cancel_ends_the_run_with_the_hosts_exception(
    host: Host, held: Link, make_clip: Maker, make_speech: Maker
) -> None:
    host.cancel_at = 2
    values = {
        "pipeline": held,
        "images": images(make_clip(6)),
        "audio": audio(make_speech(2.0)),
        "fps": 25.0,
        **RUN,
    }
    with pytest.raises(InterruptProcessingException):
        execute(nodes.SyncFrames, values)
    assert len(host.bars[0]) == 2


def test_errors_are_one_line(host: Host, held: Link, make_clip: Maker, make_speech: Maker) -> None:
    good = {
        "pipeline": held,
        "images": images(make_clip(6)),
        "audio": audio(make_speech(0.2)),
        "fps": 25.0,
        **RUN,
    }

    def fails(error: type[Exception], said: str, **changed: Any) -> None:
        with pytest.raises(error, match=said) as caught:
            execute(nodes.SyncFrames, {**good, **changed})
        assert "\n" not in str(caught.value)

    black = Link("IMAGE", torch.zeros(4, 64, 64, 3))
    fails(NoFaceError, "no usable face in any", images=black)
    fails(NoFaceError, "frame 0", images=black, on_missing_face="fail")
    fails(MediaError, "no frame", images=Link("IMAGE", torch.zeros(0, 64, 64, 3)))
    fails(OptionError, "frames must be", images=Link("IMAGE", torch.zeros(4, 64, 64)))
    empty = {"waveform": torch.zeros(1, 2, 0), "sample_rate": 44_100}
    fails(MediaError, "sound in memory: is empty", audio=Link("AUDIO", empty))
    two = {"waveform": torch.zeros(2, 2, 99), "sample_rate": 44_100}
    fails(OptionError, "give one sound", audio=Link("AUDIO", two))
    fails(RefusedError, "fps", fps=0.0)
    fails(RefusedError, "steps", steps=0)
    fails(RefusedError, "seed", seed="many")
    fails(RefusedError, "not in list", on_missing_face="guess")
    fails(RefusedError, "wanted LSYNC_PIPELINE", pipeline=Link("MODEL", None))


def test_a_video_is_read_from_its_file_and_becomes_another(
    host: Host, held: Link, make_clip: Maker, make_speech: Maker
) -> None:
    clip = make_clip(6)
    video = VideoFromFile(str(clip))
    values = {"pipeline": held, "video": Link("VIDEO", video), **RUN}
    made, report = execute(nodes.SyncVideo, values)
    assert video.saved == 0
    written = Path(made.get_stream_source())
    assert written.parent == host.root / "temp"
    assert len(list(read_frames(written))) == 6
    assert report.startswith("6 frames\n")
    made, _ = execute(nodes.SyncVideo, {**values, "audio": audio(make_speech(0.36), channels=6)})
    assert probe(made.get_stream_source()).has_audio
    assert len(list(read_frames(made.get_stream_source()))) == 9


def test_what_is_shown_of_a_video_is_what_is_synced(
    host: Host, held: Link, make_clip: Maker, make_speech: Maker
) -> None:
    clip, sound = make_clip(10), audio(make_speech(0.3))
    given = {"pipeline": held, "audio": sound, **RUN}
    trimmed = VideoFromFile(str(clip), duration=0.2)
    execute(nodes.SyncVideo, {**given, "video": Link("VIDEO", trimmed)})
    assert trimmed.saved == 1
    in_memory = VideoFromFile(io.BytesIO(clip.read_bytes()))
    made, _ = execute(nodes.SyncVideo, {**given, "video": Link("VIDEO", in_memory)})
    assert in_memory.saved == 0
    assert probe(made.get_stream_source()).width == 160


def test_a_comfyui_without_video_says_so(
    host: Host, held: Link, make_clip: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    video = Link("VIDEO", VideoFromFile(str(make_clip(3))))
    with pytest.raises(OptionError, match="no VIDEO type"):
        execute(nodes.SyncVideo, {"pipeline": held, "video": video, **RUN})


def test_files_are_found_and_written_in_the_hosts_folders(
    host: Host, held: Link, make_clip: Maker, make_speech: Maker
) -> None:
    make_clip(6).rename(host.root / "input" / "clip.mp4")
    speech = make_speech(0.2)
    values = {
        "pipeline": held,
        "video": "clip.mp4",
        "audio": f' "{speech}" ',  # as Windows copies a path
        "output": "new/out.mp4",
        **RUN,
    }
    path, _ = execute(nodes.SyncFiles, values)
    assert Path(path) == host.root / "output" / "new" / "out.mp4"
    assert len(list(read_frames(path))) == 5
    execute(nodes.SyncFiles, {**values, "audio": "", "output": "own.mp4"})
    assert len(list(read_frames(host.root / "output" / "own.mp4"))) == 6
    before = nodes.SyncFiles.IS_CHANGED(**values)
    assert before == nodes.SyncFiles.IS_CHANGED(**values)
    (host.root / "input" / "clip.mp4").unlink()
    assert before != nodes.SyncFiles.IS_CHANGED(**values)
    with pytest.raises(MediaError, match=r"clip\.mp4: no such file"):
        execute(nodes.SyncFiles, values)
    with pytest.raises(OptionError, match="video is empty"):
        execute(nodes.SyncFiles, {**values, "video": " "})


@pytest.mark.parametrize("name", ["../x.mp4", "/tmp/x.mp4", "a/../../x.mp4", ""])
def test_nothing_is_written_outside_the_output_folder(host: Host, held: Link, name: str) -> None:
    values = {"pipeline": held, "video": "clip.mp4", "audio": "", "output": name, **RUN}
    with pytest.raises(OptionError, match="not in ComfyUI's output folder"):
        execute(nodes.SyncFiles, values)


def test_models_load_once_and_again_only_for_other_widgets(
    host: Host, tiny_pipeline: LatentSyncPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[tuple[Any, dict[str, Any], bool]] = []

    def load(checkpoint: str, **arguments: Any) -> Any:
        loads.append((checkpoint, arguments, torch.is_inference_mode_enabled()))
        return tiny_pipeline

    monkeypatch.setattr(nodes, "load_compiled", load)
    monkeypatch.setattr(nodes.LoadPipeline, "_kept", None)
    widgets = {"checkpoint": "mini", "preset": "balanced", "dtype": "auto"}
    assert execute(nodes.LoadPipeline, widgets) == (tiny_pipeline,)
    assert execute(nodes.LoadPipeline, {**widgets, "device": "auto"}) == (tiny_pipeline,)
    assert len(loads) == 1
    execute(nodes.LoadPipeline, {**widgets, "dtype": "float16", "resolution": 512})
    (_, first, mode), (_, second, _) = loads
    assert not mode
    assert first["dtype"] is first["device"] is first["lowering"] is first["resolution"] is None
    assert (second["dtype"], second["resolution"]) == ("float16", 512)
    assert host.unloaded == 2  # "auto" may be a GPU


def test_checkpoints_are_looked_for_in_the_models_folder(host: Host) -> None:
    widgets = {"preset": "exact", "dtype": "auto"}
    with pytest.raises(RefusedError, match="latentsync"):
        execute(nodes.LoadPipeline, {"checkpoint": "latentsync", **widgets})
    (host.root / "models" / "latentsync").mkdir()
    with pytest.raises(RefusedError, match=re.escape(str(host.root / "models"))) as caught:
        execute(nodes.LoadPipeline, {"checkpoint": "latentsync", **widgets})
    assert "\n" not in str(caught.value)
    assert nodes.LoadPipeline.VALIDATE_INPUTS("mini") is True
    assert nodes.LoadPipeline.VALIDATE_INPUTS(None) is True
    with pytest.raises(CheckpointError):
        execute(nodes.LoadPipeline, {"checkpoint": Link("STRING", "none"), **widgets})
