"""Noise floors: how far two runs differ that nobody would call different.

A figure against the unoptimised run means little alone. Beside it stand two differences that every
user accepts without knowing: half precision against single precision, and the frames before
against those after the video codec.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsync_compile.media.align import crop_face
from lsync_compile.media.faces import FaceDetector
from lsync_compile.media.tracking import FaceTracker
from lsync_compile.media.video import VideoWriter, read_frames
from lsync_compile.quality.footage import Footage
from lsync_compile.quality.runs import FPS, Pipeline, Progress, Run, collect
from lsync_compile.quality.scores import Scores, compare_runs, score

CRF = 18


@dataclass(frozen=True)
class Floor:
    """A difference that is accepted without a thought.

    Attributes:
        name: heads its row in tables.
        scores: region to scores.
    """

    name: str
    scores: dict[str, Scores]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        scores = {region: value.to_dict() for region, value in self.scores.items()}
        return {"name": self.name, "scores": scores}


def precision_floor(
    pipeline: Pipeline,
    video: str | Path,
    audio: str | Path | None,
    reference: Run,
    *,
    progress: Progress | None = None,
) -> Floor:
    """Repeat the reference in the other number format, with the same noise, and compare.

    A pipeline in half precision is repeated in float32, one in float32 in float16.

    Args:
        pipeline: the plain pipeline that made the reference; has ``unet`` and ``vae``.
        video: the clip.
        audio: the speech, as in `collect`.
        reference: what it made.
        progress: called with the denoising steps done and their total.
    """
    given = pipeline.unet.dtype
    other = torch.float16 if given == torch.float32 else torch.float32
    name = f"floor: {str(other).removeprefix('torch.')}"
    setting = dataclasses.replace(reference.setting, name=name)
    with _number_format(pipeline, other):
        repeated = collect(
            pipeline,
            video,
            audio,
            setting,
            max_frames=len(reference),
            beside=reference,
            progress=progress,
        )
    return Floor(name, compare_runs(reference, repeated))


def codec_floor(run: Run, detector: FaceDetector, *, crf: int = CRF) -> Floor:
    """Encode and decode the finished frames as `VideoWriter` does, and compare.

    The mouth region is cut from the frames before and after the codec with the same alignment, at
    the model's resolution; where that is below the size of the face in the frame, some of the
    codec's noise is averaged away.

    Args:
        run: whose frames to encode.
        detector: finds the faces once more.
        crf: the codec's quality setting.
    """
    height, width = run.frames.size
    decoded, before, after = Footage(), Footage(), Footage()
    side = run.mask.shape[-1]
    tracker = FaceTracker(detector, side)
    has_face = []
    with tempfile.TemporaryDirectory(prefix="lsync-quality-") as folder:
        path = Path(folder) / "codec.mp4"
        with VideoWriter(path, width, height, fps=FPS, crf=crf) as writer:
            for index in range(len(run)):
                writer.write(run.frames.picture(index))
        for index, read in enumerate(read_frames(path, fps=FPS)):
            # The codec takes even sizes only and repeats the last row or column for that.
            picture = read[:height, :width]
            decoded.append(picture)
            matrix = tracker.matrix(index, run.originals.picture(index))
            has_face.append(matrix is not None and run.has_face[index])
            for footage, frame in ((before, run.frames.picture(index)), (after, picture)):
                # A frame without a face is not counted; any crop keeps the count of frames.
                footage.append(
                    frame[:1, :1].repeat(side, 0).repeat(side, 1)
                    if matrix is None
                    else crop_face(frame, matrix, side)
                )
    return Floor(
        f"floor: x264 crf {crf}",
        {
            "mouth": score(after, before, region=run.mask < 0.5, valid=has_face, starts=run.starts),
            "frame": score(decoded, run.frames, starts=run.starts),
        },
    )


@contextlib.contextmanager
def _number_format(pipeline: Pipeline, dtype: torch.dtype) -> Iterator[None]:
    """Exchange UNet and VAE for copies in another number format.

    Copies, as casting back would not restore weights that were rounded.
    """
    before = pipeline.unet, pipeline.vae
    # Module.to and not diffusers' own, which warns on every cast of a whole model.
    pipeline.unet, pipeline.vae = (
        torch.nn.Module.to(copy.deepcopy(module), dtype) for module in before
    )
    try:
        yield
    finally:
        pipeline.unet, pipeline.vae = before
