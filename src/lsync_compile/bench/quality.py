"""How good a row is: the trained model's mouths beside those of its unoptimised 20 steps.

Aligned faces and sound of a clip are recorded once, with what finds faces and reads videos; from
then on a file of tensors is all that is needed. Figures are before paste-back and the video codec.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lsync_compile
from lsync_compile.bench.engines import Networks
from lsync_compile.bench.rows import LSYNC, Row
from lsync_compile.errors import CheckpointError
from lsync_compile.models.checkpoint import load_unet, load_vae, resolve_checkpoint
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.runtime.running import current_session
from lsync_compile.runtime.timesteps import make_solver

SEED = 1247


@dataclass(frozen=True)
class Recording:
    """What a trained model is given of a clip.

    Attributes:
        faces: (F, 3, R, R) uint8, aligned.
        audio: (F, S, D), the sound of each frame.
        mask: (1, R, R), 1 where the face is kept.
    """

    faces: Tensor
    audio: Tensor
    mask: Tensor


def record(clip: Path, audio: Path | None, frames: int, target: Path) -> Recording:
    """Find and cut the faces of a clip's first frames, and hear its sound; keep both in a file.

    Raises:
        NoFaceError, MediaError: as a run of the pipeline.
    """
    pipeline = lsync_compile.LatentSyncPipeline.from_pretrained("mini")
    pipeline.set_progress_bar_config(disable=True)
    heard: list[Tensor] = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    faces: list[Tensor] = []
    try:
        for chunk in pipeline.synthesize(
            clip, audio, num_inference_steps=1, guidance_scale=1.0, max_frames=frames
        ):
            if chunk.faces is not None:
                faces.append(chunk.faces)
    finally:
        hook.remove()
    recording = Recording(torch.cat(faces), torch.cat(heard).float(), pipeline.mask)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in vars(recording).items()}, target)
    return recording


def load_recording(path: Path) -> Recording:
    """A recording from its file.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        return Recording(**load_file(path))
    except (SafetensorError, TypeError, OSError) as error:
        raise CheckpointError(f"{path}: is no recording of `lsync bench`: {error}") from error


class Judge:
    """Runs the bundled model on a recording and compares mouths.

    Args:
        recording: faces and sound.
        device, dtype: of the model.
        frames: a chunk.
        steps: of the reference; other rows take their part of them.
    """

    def __init__(
        self,
        recording: Recording,
        device: torch.device,
        dtype: torch.dtype,
        *,
        frames: int = 16,
        steps: int = 20,
    ) -> None:
        checkpoint = resolve_checkpoint("mini")
        unet = load_unet(checkpoint.unet_file, checkpoint.unet_config, dtype=dtype)
        vae = load_vae(checkpoint, dtype=dtype)
        for module in (unet, vae):
            module.to(device).eval().requires_grad_(False)
        self.networks = Networks(unet, vae)
        self.recording = recording
        self.frames = frames
        self.steps = steps
        self.region = recording.mask < 0.5
        self._reference: Tensor | None = None

    @property
    def reference(self) -> Tensor:
        """(F, 3, R, R) in [0, 1]: what the plain networks make in 20 steps."""
        if self._reference is None:
            self._reference = self._made(self.networks, Row("reference", "eager"))
        return self._reference

    def judge(self, row: Row) -> dict[str, Any]:
        """Figures of a row. What compiles is run eagerly: that leaves rounding out alone."""
        reference, begin = self.reference, time.perf_counter()
        if row.engine == LSYNC:
            options = {**(row.options or {}), "lowering": "eager"}
            fast: Any = lsync_compile.compile(self.networks, **options)
            try:
                made = fast(lambda: self._made(self.networks, row))
                features = fast.lsync.report().features
            finally:
                fast.lsync.undo()
        else:
            made, features = self._made(self.networks, row), {}
        seconds = round(time.perf_counter() - begin, 2)
        return {**self._scores(made, reference), "seconds": seconds, "features": features}

    def floors(self) -> list[dict[str, Any]]:
        """What nobody would call a difference: half against single precision, and the codec."""
        given = self.networks.unet.dtype
        other = torch.float16 if given == torch.float32 else torch.float32
        wide = Networks(
            *(
                nn.Module.to(copy.deepcopy(module), other)
                for module in (self.networks.unet, self.networks.vae)
            )
        )
        made = self._made(wide, Row("floor", "eager"))
        name = f"floor: {str(other).removeprefix('torch.')}"
        return [{"row": name, **self._scores(self.reference, made)}]

    @torch.no_grad()
    def _made(self, networks: Networks, row: Row) -> Tensor:
        unet, device = networks.unet, networks.unet.device
        job: Any = SimpleNamespace(
            generator=torch.Generator().manual_seed(SEED), mask=self.recording.mask.to(device),
            guidance_scale=1.5, guided=True, eta=0.0, callback=None, callback_steps=1,
            num_frames=self.frames, num_inference_steps=row.part_of(self.steps),
            session=current_session(),
        )  # fmt: skip
        scheduler = make_solver(networks.scheduler, row.solver)
        run = ChunkSynthesizer(networks.vae, unet, scheduler, job, device)
        pieces = zip(
            self.recording.faces.split(self.frames),
            self.recording.audio.split(self.frames),
            strict=True,
        )
        made = [
            run(number, faces, audio, lambda step: None)
            for number, (faces, audio) in enumerate(pieces)
        ]
        return (torch.cat(made).float().cpu() / 2 + 0.5).clamp(0, 1)

    def _scores(self, made: Tensor, reference: Tensor) -> dict[str, Any]:
        from lsync_compile.quality import metrics

        errors = metrics.squared_error(made, reference, self.region)
        pooled = metrics.pooled_psnr(errors).value
        worst = float((-10 * torch.log10(errors)).min())
        return {
            "mouth_psnr": plain(pooled, 2),
            "worst_frame_psnr": plain(worst, 2),
            "mouth_ssim": plain(float(metrics.ssim(made, reference, self.region).mean()), 5),
            "flicker": plain(metrics.rms(metrics.flicker(made, reference, self.region)).value, 3),
        }


def plain(value: float, digits: int) -> float | None:
    """Rounded for JSON; None for what is not finite, as the PSNR of equal pictures."""
    return round(value, digits) if math.isfinite(value) else None
