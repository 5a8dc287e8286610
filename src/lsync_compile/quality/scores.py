"""All measures of one region of a clip, gathered frame by frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsync_compile.quality import metrics
from lsync_compile.quality.footage import Footage
from lsync_compile.quality.metrics import Measure
from lsync_compile.quality.runs import Run

# Frames that are in memory at once; the measures walk over a clip in such pieces.
_PIECE = 8
MEASURES = ("psnr", "worst_psnr", "ssim", "ms_ssim", "lpips", "flicker", "seams")


@dataclass(frozen=True)
class Scores:
    """A clip against another one, in one region.

    Attributes:
        psnr: dB, from the mean squared error of all frames.
        worst_psnr: dB of the worst frame, whose number is in the note.
        ssim: mean over the frames.
        ms_ssim: mean over the frames, over the region's bounding box.
        lpips: mean over the frames, over the region's bounding box.
        flicker: root mean square error of frame differences, 8-bit levels.
        seams: flicker at chunk borders over flicker elsewhere.
        frames_psnr: dB of each frame of the clip; NaN where it was left out.
    """

    psnr: Measure
    worst_psnr: Measure
    ssim: Measure
    ms_ssim: Measure
    lpips: Measure
    flicker: Measure
    seams: Measure
    frames_psnr: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, None for what is not finite."""
        values: dict[str, Any] = {name: getattr(self, name).to_dict() for name in MEASURES}
        values["frames_psnr"] = [v if math.isfinite(v) else None for v in self.frames_psnr]
        return values


def score(
    candidate: Footage,
    reference: Footage,
    *,
    region: Tensor | None = None,
    valid: list[bool] | None = None,
    starts: list[int] | None = None,
) -> Scores:
    """Compare two clips of the same size.

    Args:
        candidate: what is judged.
        reference: what it is judged by.
        region: (1, H, W) bool, true where pixels count; None is the whole frame.
        valid: which frames count; None is all. A step from a frame to the next counts if both do.
        starts: first frames of the chunks, for the seams between them.

    Raises:
        ValueError: lengths or sizes differ.
    """
    count = len(reference)
    if len(candidate) != count:
        raise ValueError(f"{len(candidate)} frames against {count}")
    counted = torch.tensor([True] * count if valid is None else valid, dtype=torch.bool)
    if not counted.any():
        empty = dict.fromkeys(MEASURES, Measure.missing("no frame to compare"))
        return Scores(**empty, frames_psnr=[math.nan] * count)
    errors, similarities, multiscale, perceptual, steps = _walk(candidate, reference, region)
    frames_psnr = (-10 * torch.log10(errors)).masked_fill(~counted, math.nan)
    both = counted[1:] & counted[:-1]
    at_border = torch.zeros(count, dtype=torch.bool)
    at_border[[start for start in starts or [] if start > 0]] = True
    return Scores(
        psnr=metrics.pooled_psnr(errors[counted]),
        worst_psnr=_worst(frames_psnr),
        ssim=Measure(similarities[counted].mean().item()),
        ms_ssim=_mean_of(multiscale, counted),
        lpips=_mean_of(perceptual, counted),
        flicker=metrics.rms(steps[both]),
        seams=metrics.seams(steps[both], at_border[1:][both]),
        frames_psnr=frames_psnr.tolist(),
    )


def compare_runs(run: Run, reference: Run) -> dict[str, Scores]:
    """Scores of a run against another one, for the mouth region and for the full frame."""
    return {
        "mouth": score(run.synced, reference.synced, **mouth_region(run)),
        "frame": score(run.frames, reference.frames, starts=run.starts),
    }


def mouth_region(run: Run) -> dict[str, Any]:
    """The arguments of `score` for the part of the aligned face that the model generates."""
    return {"region": run.mask < 0.5, "valid": run.has_face, "starts": run.starts}


def _walk(
    candidate: Footage, reference: Footage, region: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | str, Tensor | str, Tensor]:
    """Each measure for each frame (F,), or why it is missing; flicker for each step (F - 1,)."""
    whole = torch.ones(1, *reference.size, dtype=torch.bool)
    rows, columns = metrics.bounding_box(whole if region is None else region)
    no_multiscale = metrics.ms_ssim_reason(rows.stop - rows.start, columns.stop - columns.start)
    no_lpips = metrics.lpips_reason()
    lpips = None if no_lpips else metrics.Lpips()
    errors, similarities, multiscale, perceptual, steps = [], [], [], [], []
    for start in range(0, len(reference), _PIECE):
        stop = min(start + _PIECE, len(reference))
        ours, theirs = candidate.clip(start, stop), reference.clip(start, stop)
        errors.append(metrics.squared_error(ours, theirs, region))
        similarities.append(metrics.ssim(ours, theirs, region))
        boxed = ours[..., rows, columns], theirs[..., rows, columns]
        if not no_multiscale:
            multiscale.append(metrics.ms_ssim(*boxed))
        if lpips is not None:
            perceptual.append(lpips(*boxed))
        # From the last frame of the piece before on, or no step between pieces would count.
        before = max(0, start - 1)
        steps.append(
            metrics.flicker(candidate.clip(before, stop), reference.clip(before, stop), region)
        )
    return (
        torch.cat(errors),
        torch.cat(similarities),
        no_multiscale or torch.cat(multiscale),
        no_lpips or torch.cat(perceptual),
        torch.cat(steps),
    )


def _mean_of(values: Tensor | str, counted: Tensor) -> Measure:
    if isinstance(values, str):
        return Measure.missing(values)
    return Measure(values[counted].mean().item())


def _worst(frames_psnr: Tensor) -> Measure:
    worst = int(frames_psnr.nan_to_num(nan=math.inf, posinf=math.inf).argmin())
    value = frames_psnr[worst].item()
    return Measure(value, f"frame {worst}" if math.isfinite(value) else "identical")
