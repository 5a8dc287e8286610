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

# Whole frames are large, and mostly the original: the costly measures take so many of a clip.
SAMPLED = 16
MEASURES = ("psnr", "worst_psnr", "ssim", "ms_ssim", "lpips", "flicker", "seams")


@dataclass(frozen=True)
class Scores:
    """A clip against another one, in one region.

    Attributes:
        psnr: dB, from the mean squared error of all frames.
        worst_psnr: dB of the worst frame, whose number is in the note.
        ssim: mean over the frames; of a long clip's whole frames, over 16 evenly spread ones.
        ms_ssim: as `ssim`, over the region's bounding box.
        lpips: as `ssim`, over the region's bounding box.
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
    errors, steps = _pixels(candidate, reference, region)
    frames_psnr = (-10 * torch.log10(errors)).masked_fill(~counted, math.nan)
    both = counted[1:] & counted[:-1]
    at_border = torch.zeros(count, dtype=torch.bool)
    at_border[[start for start in starts or [] if start > 0]] = True
    places = counted.nonzero().flatten()
    if region is None and len(places) > SAMPLED:
        places = places[torch.linspace(0, len(places) - 1, SAMPLED).round().long()]
    return Scores(
        psnr=metrics.pooled_psnr(errors[counted]),
        worst_psnr=_worst(frames_psnr),
        flicker=metrics.rms(steps[both]),
        seams=metrics.seams(steps[both], at_border[1:][both]),
        frames_psnr=frames_psnr.tolist(),
        **_structure(candidate, reference, region, places.tolist()),
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


def _pixels(candidate: Footage, reference: Footage, region: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared error of each frame (F,), flicker of each step from a frame to the next (F - 1,)."""
    errors, steps = [], []
    before: tuple[Tensor, Tensor] | None = None
    for ours, theirs in zip(candidate.pieces(), reference.pieces(), strict=True):
        errors.append(metrics.squared_error(ours, theirs, region))
        # With the last frame before the piece, or no step between pieces would count.
        joined = (ours, theirs) if before is None else _join(before, (ours, theirs))
        steps.append(metrics.flicker(*joined, region))
        before = ours[-1:], theirs[-1:]
    return torch.cat(errors), torch.cat(steps)


def _join(before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([before[0], now[0]]), torch.cat([before[1], now[1]])


def _structure(
    candidate: Footage, reference: Footage, region: Tensor | None, places: list[int]
) -> dict[str, Measure]:
    """The costly measures, as means over some frames."""
    whole = torch.ones(1, *reference.size, dtype=torch.bool)
    rows, columns = metrics.bounding_box(whole if region is None else region)
    too_small = metrics.ms_ssim_reason(rows.stop - rows.start, columns.stop - columns.start)
    no_lpips = metrics.lpips_reason()
    lpips = None if no_lpips else metrics.Lpips()
    values: dict[str, list[Tensor]] = {"ssim": [], "ms_ssim": [], "lpips": []}
    for place in places:
        ours, theirs = (footage.clip(place, place + 1) for footage in (candidate, reference))
        values["ssim"].append(metrics.ssim(ours, theirs, region))
        boxed = ours[..., rows, columns], theirs[..., rows, columns]
        if not too_small:
            values["ms_ssim"].append(metrics.ms_ssim(*boxed))
        if lpips is not None:
            values["lpips"].append(lpips(*boxed))
    reasons = {"ms_ssim": too_small, "lpips": no_lpips}
    return {
        name: Measure(torch.cat(found).mean().item()) if found else Measure.missing(reasons[name])
        for name, found in values.items()
    }


def _worst(frames_psnr: Tensor) -> Measure:
    worst = int(frames_psnr.nan_to_num(nan=math.inf, posinf=math.inf).argmin())
    value = frames_psnr[worst].item()
    return Measure(value, f"frame {worst}" if math.isfinite(value) else "identical")
