"""Four nodes: load a pipeline; sync frames, a video or files with it."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsync_compile.devices import DType
from lsync_compile.errors import LsyncError, OptionError
from lsync_compile.integrations.comfyui.host import (
    find_checkpoint,
    host_folder,
    input_file,
    make_room,
    ordinary_tensors,
    output_file,
    progress,
    sound_file,
    sound_of,
    stop_if_asked,
    video_class,
    video_file,
)
from lsync_compile.loading import load_compiled
from lsync_compile.media.sources import FrameArray
from lsync_compile.options import PRESETS

FPS = 25  # frames/s that come out
PIPELINE = "LSYNC_PIPELINE"
_CATEGORY = "lip sync"

Inputs = dict[str, dict[str, tuple[Any, ...]]]

# Of all runs, whatever they read.
_RUN: dict[str, tuple[Any, ...]] = {
    "seed": (
        "INT",
        {"default": 1247, "min": 0, "max": 2**64 - 1, "control_after_generate": True},
    ),
    "steps": (
        "INT",
        {"default": 20, "min": 1, "max": 1000, "tooltip": "Denoising steps a chunk."},
    ),
    "guidance": (
        "FLOAT",
        {
            "default": 1.5,
            "min": 1.0,
            "max": 10.0,
            "step": 0.1,
            "tooltip": "How much the sound decides; 1 switches guidance off, which is faster.",
        },
    ),
    "on_missing_face": (
        ["pass", "fail"],
        {"tooltip": "Frames without a usable face: pass leaves them unchanged, fail stops."},
    ),
}
_PIPELINE_INPUT = (PIPELINE, {"tooltip": "From 'Lip sync: load'."})


class LoadPipeline:
    """Loads a checkpoint and compiles it; it is kept while the widgets stay the same."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Load LatentSync 1.5 or 1.6, or the bundled small model, compiled."
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "load"

    # Kept even where ComfyUI runs without a cache of its own: (arguments, pipeline).
    _kept: tuple[tuple[Any, ...], Any] | None = None

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802, the host's name
        return {
            "required": {
                "checkpoint": (
                    "STRING",
                    {
                        "default": "mini",
                        "tooltip": "'mini' (bundled), or a folder of LatentSync 1.5/1.6: a whole "
                        "path, or one in ComfyUI's models folder.",
                    },
                ),
                "preset": (list(PRESETS), {"default": "balanced"}),
                "dtype": (["auto", *(each.value for each in DType)], {"default": "auto"}),
            },
            "optional": {
                "device": (["auto", "cuda", "cpu"], {"default": "auto"}),
                "lowering": (
                    ["auto", "inductor", "eager"],
                    {
                        "default": "auto",
                        "tooltip": "inductor compiles, minutes the first time, and needs Triton; "
                        "eager runs the rewritten graphs at once.",
                    },
                ),
                "detector": (["mtcnn", "insightface"], {"default": "mtcnn"}),
                "resolution": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2048,
                        "step": 8,
                        "tooltip": "Side of the face in pixels where the checkpoint does not say; "
                        "0 asks the checkpoint.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, checkpoint: str | None) -> bool | str:  # noqa: N802
        """True, or one line that ComfyUI shows at the node before anything runs."""
        from lsync_compile.models.checkpoint import resolve_checkpoint

        if checkpoint is None:  # comes from another node and is not known yet
            return True
        try:
            resolve_checkpoint(find_checkpoint(checkpoint))
        except LsyncError as error:
            return str(error)
        return True

    def load(
        self,
        checkpoint: str,
        preset: str,
        dtype: str,
        device: str = "auto",
        lowering: str = "auto",
        detector: str = "mtcnn",
        resolution: int = 0,
    ) -> tuple[Any]:
        arguments = (checkpoint, preset, dtype, device, lowering, detector, resolution)
        kept = LoadPipeline._kept
        if kept is None or kept[0] != arguments:
            kept = LoadPipeline._kept = None  # before the next one takes memory
            make_room(device)
            with ordinary_tensors():
                pipeline = load_compiled(
                    find_checkpoint(checkpoint),
                    preset=preset,
                    dtype=None if dtype == "auto" else DType(dtype),
                    device=None if device == "auto" else device,
                    lowering=None if lowering == "auto" else lowering,
                    detector=detector,
                    resolution=resolution or None,
                )
            kept = LoadPipeline._kept = (arguments, pipeline)
        return (kept[1],)


class SyncFrames:
    """Syncs an IMAGE batch to an AUDIO. Both batches are held, the input's and the output's."""

    CATEGORY = _CATEGORY
    DESCRIPTION = (
        "Redraw the mouth in a batch of frames to match a speech. Comes out at 25 frames/s, as "
        "long as the speech; a shorter clip is played back and forth."
    )
    RETURN_TYPES = ("IMAGE", "AUDIO", "FLOAT", "STRING")
    RETURN_NAMES = ("images", "audio", "fps", "report")
    FUNCTION = "sync"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        fps = {"default": 25.0, "min": 1.0, "max": 240.0, "step": 0.001}
        return {
            "required": {
                "pipeline": _PIPELINE_INPUT,
                "images": ("IMAGE",),
                "audio": ("AUDIO",),
                "fps": ("FLOAT", {**fps, "tooltip": "Of the images that go in."}),
                **_RUN,
            }
        }

    def sync(
        self,
        pipeline: Any,
        images: Tensor,
        audio: Mapping[str, Any],
        fps: float,
        **run: Any,
    ) -> tuple[Tensor, Mapping[str, Any], float, str]:
        clip, speech = FrameArray(images, fps), sound_of(audio)
        synced, missing = torch.empty(0), 0
        with _run(pipeline, **run) as arguments:
            for chunk in pipeline.synthesize(clip, speech, video_fps=FPS, **arguments):
                if not len(synced):
                    synced = torch.empty(chunk.total, *chunk.frames[0].shape)
                for index, frame in zip(chunk.frame_indices, chunk.frames, strict=True):
                    synced[index].copy_(torch.from_numpy(frame)).div_(255)
                missing += chunk.has_face.count(False)
                stop_if_asked()
        return synced, audio, float(FPS), _report(pipeline, len(synced), missing)


class SyncVideo:
    """Syncs a VIDEO. It is read and written as a stream, so its length costs no memory."""

    CATEGORY = _CATEGORY
    DESCRIPTION = (
        "Redraw the mouth in a video to match a speech, or its own sound. Needs little memory, "
        "however long the video is."
    )
    RETURN_TYPES = ("VIDEO", "STRING")
    RETURN_NAMES = ("video", "report")
    FUNCTION = "sync"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {"pipeline": _PIPELINE_INPUT, "video": ("VIDEO",), **_RUN},
            "optional": {"audio": ("AUDIO", {"tooltip": "The video's own sound without it."})},
        }

    def sync(
        self, pipeline: Any, video: Any, audio: Mapping[str, Any] | None = None, **run: Any
    ) -> tuple[Any, str]:
        made = video_class()
        out = host_folder("get_temp_directory") / f"lsync_{uuid.uuid4().hex[:12]}.mp4"
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lsync-") as scratch:
            clip = video_file(video, Path(scratch))
            speech = None if audio is None else sound_file(audio, Path(scratch))
            result = _sync_files(pipeline, clip, speech, out, run)
        return made(str(out)), _report(pipeline, result.num_frames, result.missing_faces)


class SyncFiles:
    """Syncs a file and writes another one into ComfyUI's output folder."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Redraw the mouth in a video file to match a sound file; files of any length."
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("path", "report")
    FUNCTION = "sync"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        where = "A whole path, or one in ComfyUI's input folder"
        return {
            "required": {
                "pipeline": _PIPELINE_INPUT,
                "video": ("STRING", {"default": "", "tooltip": f"{where}."}),
                "audio": (
                    "STRING",
                    {"default": "", "tooltip": f"{where}; empty for the video's own sound."},
                ),
                "output": (
                    "STRING",
                    {
                        "default": "lipsync/synced.mp4",
                        "tooltip": "In ComfyUI's output folder; replaced only when finished.",
                    },
                ),
                **_RUN,
            }
        }

    @classmethod
    def IS_CHANGED(cls, video: str, audio: str, **rest: Any) -> tuple[float, ...]:  # noqa: N802
        """When the files were written: ComfyUI runs the node again where that differs."""
        files = [input_file(each) for each in (video, audio) if each]
        return tuple(file.stat().st_mtime if file.is_file() else 0.0 for file in files)

    def sync(
        self, pipeline: Any, video: str, audio: str, output: str, **run: Any
    ) -> dict[str, Any]:
        if not video.strip():
            raise OptionError("video is empty; give the path of a clip")
        out = output_file(output)
        speech = input_file(audio) if audio.strip() else None
        result = _sync_files(pipeline, input_file(video), speech, out, run)
        report = _report(pipeline, result.num_frames, result.missing_faces)
        return {"ui": {"text": [str(out)]}, "result": (str(out), report)}


def _sync_files(
    pipeline: Any, clip: Path, speech: Path | None, out: Path, run: Mapping[str, Any]
) -> Any:
    with _run(pipeline, **run) as arguments:
        return pipeline(
            video_path=clip,
            audio_path=speech,
            video_out_path=out,
            video_fps=FPS,
            **arguments,
        )


@contextlib.contextmanager
def _run(
    pipeline: Any, *, seed: int, steps: int, guidance: float, on_missing_face: str
) -> Iterator[dict[str, Any]]:
    """Everything around a run; yields the pipeline's arguments for it."""
    device = pipeline.device
    make_room(device.type)
    with ordinary_tensors():
        yield {
            "generator": torch.Generator(device).manual_seed(seed),
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "on_missing_face": on_missing_face,
            "progress": progress(),
        }


def _report(pipeline: Any, frames: int, missing: int) -> str:
    without = f", {missing} without a face" if missing else ""
    return f"{frames} frames{without}\n{pipeline.lsync.report()}"


NODE_CLASS_MAPPINGS = {
    "LsyncLoadPipeline": LoadPipeline,
    "LsyncSyncFrames": SyncFrames,
    "LsyncSyncVideo": SyncVideo,
    "LsyncSyncFiles": SyncFiles,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LsyncLoadPipeline": "Lip sync: load",
    "LsyncSyncFrames": "Lip sync: frames",
    "LsyncSyncVideo": "Lip sync: video",
    "LsyncSyncFiles": "Lip sync: files",
}
