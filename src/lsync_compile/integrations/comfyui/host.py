"""What ComfyUI offers its nodes and hands them: progress, cancelling, folders, AUDIO and VIDEO.

Nothing of ComfyUI is imported before a node needs it: what it has loaded is looked up, so that the
nodes are plain classes where it is not there.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import torch

from lsync_compile.errors import OptionError
from lsync_compile.media.sources import SoundArray

_BLOCK = 2**20  # samples at a time


def progress() -> Callable[[int, int], None]:
    """Moves the node's bar, and ends the run where ComfyUI's user wants that."""
    utils = sys.modules.get("comfy.utils")
    bar = None if utils is None else utils.ProgressBar(1)

    def advance(done: int, total: int) -> None:
        if bar is not None:
            bar.update_absolute(done, total)
        stop_if_asked()

    return advance


def stop_if_asked() -> None:
    """Raise ComfyUI's own exception where its user has pressed Cancel."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


def make_room(device: str) -> None:
    """Have ComfyUI take its models off the GPU, as it does itself before it loads others."""
    management = sys.modules.get("comfy.model_management")
    if management is not None and device != "cpu":
        management.unload_all_models()
        management.soft_empty_cache()


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """ComfyUI runs nodes in inference mode, which threads do not inherit and compiling forbids."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def sound_of(audio: Mapping[str, Any]) -> SoundArray:
    """The sound of an AUDIO, whose waveform is (batch, channels, samples)."""
    waveform = audio["waveform"]
    if waveform.ndim != 3 or len(waveform) != 1:
        raise OptionError(
            f"audio holds a batch of shape {tuple(waveform.shape)}; give one sound, "
            "(1, channels, samples)"
        )
    return SoundArray(waveform[0], int(audio["sample_rate"]))


def sound_file(audio: Mapping[str, Any], folder: Path) -> Path:
    """An AUDIO as a WAV file of as many channels, or of one for more than two."""
    path = folder / "speech.wav"
    rate = sound_of(audio).sample_rate
    waveform = audio["waveform"][0].float().cpu()
    if len(waveform) > 2:
        waveform = waveform.mean(dim=0, keepdim=True)
    layout = "mono" if len(waveform) == 1 else "stereo"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=rate, layout=layout)
        for part in waveform.split(_BLOCK, dim=1):
            samples = part.T.reshape(1, -1).contiguous().numpy()
            frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
            frame.sample_rate = rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def video_file(video: Any, folder: Path) -> Path:
    """A VIDEO as a file: its own where that is all of it, else one that ComfyUI writes."""
    source = video.get_stream_source()
    path = folder / "clip.mp4"
    if not _is_whole(video, source):
        video.save_to(str(path))  # trimmed or cropped
        return path
    if isinstance(source, io.BytesIO):
        path.write_bytes(source.getbuffer())
        return path
    return Path(source)


def _is_whole(video: Any, source: str | io.BytesIO) -> bool:
    """Whether a VIDEO shows its source from end to end and from edge to edge."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        with av.open(source, "r") as container:
            track = container.streams.video[0]
            size = sorted((track.width, track.height))
            seconds = (container.duration or 0) / av.time_base
    except (av.error.FFmpegError, IndexError):
        return True  # the pipeline says what is wrong with it
    return sorted(video.get_dimensions()) == size and abs(video.get_duration() - seconds) < 0.02


def video_class() -> Callable[[str], Any]:
    """What makes a VIDEO of a file."""
    try:
        made: Callable[[str], Any] = importlib.import_module(
            "comfy_api.latest"
        ).InputImpl.VideoFromFile
    except (ImportError, AttributeError) as error:
        raise OptionError(
            "this ComfyUI has no VIDEO type; update it, or use 'Lip sync: frames' or 'Lip sync: "
            "files'"
        ) from error
    return made


def host_folder(name: str) -> Path:
    """One of ComfyUI's folders; the current one without ComfyUI."""
    paths = sys.modules.get("folder_paths")
    return Path() if paths is None else Path(getattr(paths, name)())


def find_checkpoint(name: str) -> str:
    """A checkpoint's folder, looked for in ComfyUI's models folder too."""
    paths = sys.modules.get("folder_paths")
    name = name.strip()
    if paths is None or name == "mini" or Path(name).exists():
        return name
    inside = Path(paths.models_dir) / name
    return str(inside) if inside.exists() else name


def input_file(name: str) -> Path:
    """A file by its whole path, or by its name in the input folder."""
    path = Path(name.strip().strip('"'))
    inside = host_folder("get_input_directory") / path
    return inside if not path.is_absolute() and inside.exists() else path


def output_file(name: str) -> Path:
    """A file in the output folder. Workflows come from strangers, so nowhere else.

    Raises:
        OptionError: it would lie outside.
    """
    folder = host_folder("get_output_directory").resolve()
    path = (folder / name.strip().strip('"')).resolve()
    if not path.is_relative_to(folder) or path == folder:
        raise OptionError(f"output {name!r} is not in ComfyUI's output folder; give a name in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
