"""A pipeline that draws talking faces instead of denoising them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lsync_compile.media.mask import mouth_mask

from .faces import syllables, talking_faces

SIDE = 64
FRAMES = 60


class StandIn:
    """Pastes a drawn face at a fixed place of a grey frame; fewer steps mean more error.

    Attributes:
        runs: what `synthesize` was called with.
        missing: frames that show no face.
    """

    def __init__(self, *, missing: tuple[int, ...] = (), side: int = SIDE) -> None:
        self.scheduler: Any = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        self.resolution = side
        self.missing = missing
        self.runs: list[dict[str, Any]] = []

    @property
    def mask(self) -> Tensor:
        return mouth_mask(self.resolution)

    def synthesize(
        self, video_path: str | Path, audio_path: str | Path | None = None, **arguments: Any
    ) -> Iterator[SimpleNamespace]:
        self.runs.append({**arguments, "scheduler": type(self.scheduler).__name__})
        count = arguments["max_frames"] or FRAMES
        faces = talking_faces(syllables(count), side=self.resolution)
        noise = torch.randn(faces.shape, generator=arguments["generator"])
        error = noise * 0.2 / arguments["num_inference_steps"] ** 2
        generated = faces + error * (1 - self.mask)
        size = arguments["num_frames"]
        for index, start in enumerate(range(0, count, size)):
            chunk = list(range(start, min(start + size, count)))
            original = [_frame(faces[i]) for i in chunk]
            has_face = [i not in self.missing for i in chunk]
            frames = [
                _frame(generated[i]) if i not in self.missing else _frame(faces[i]) for i in chunk
            ]
            arguments["progress"](index + 1, -(-count // size))
            yield SimpleNamespace(
                index=index,
                original=original,
                faces=(faces[chunk] * 255).round().byte() if any(has_face) else None,
                synced=generated[chunk] * 2 - 1 if any(has_face) else None,
                frames=frames,
                has_face=has_face,
                seconds=0.01 * arguments["num_inference_steps"],
            )


def _frame(face: Tensor) -> np.ndarray:
    frame = np.full((100, 90, 3), 90, dtype=np.uint8)
    side = face.shape[-1]
    frame[20 : 20 + side, 10 : 10 + side] = (face.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return frame
