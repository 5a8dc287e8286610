"""How far a clip is from another one, frame by frame.

All functions take clips as (F, 3, H, W) tensors with values in [0, 1], of any float dtype and on
any device, and work in float64 on the CPU. A region is a mask (1, H, W) or (H, W), true where
pixels count; None is the whole frame. Nothing here knows how a clip was made.

Structural similarity is computed here and not by torchmetrics, whose two-dimensional window takes
seconds for a large frame and cannot be limited to a region; the tests hold the two equal. LPIPS
comes from torchmetrics.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsync_compile.quality.extra import MissingExtraError, require

Array = NDArray[np.float64]

# Wang et al. 2004: an 11-tap Gaussian window of sigma 1.5, and the two stabilising constants.
_TAPS, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
# Wang et al. 2003: the weights of the five scales.
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The window must still fit into the coarsest scale.
MS_SSIM_MIN_SIDE = _TAPS * 2 ** (len(_SCALES) - 1)
# Where torchmetrics' LPIPS (net "alex") looks for its backbone, which it would download.
_LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"


@dataclass(frozen=True)
class Measure:
    """One figure, or the reason why there is none.

    Attributes:
        value: the figure; NaN where it cannot be had, infinite for the PSNR of equal clips.
        note: why it is NaN or infinite, or how it is to be read; empty if there is nothing to say.
    """

    value: float
    note: str = ""

    @classmethod
    def missing(cls, reason: str) -> Measure:
        """No figure, because of ``reason``."""
        return cls(math.nan, reason)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither NaN nor infinity: those become None."""
        return {"value": self.value if math.isfinite(self.value) else None, "note": self.note}


def squared_error(candidate: Tensor, reference: Tensor, region: Tensor | None = None) -> Tensor:
    """Mean squared error of each frame over the region: (F,) float64.

    Raises:
        ValueError: shapes differ, are no clip's, or the region is empty.
    """
    pair = _focus(candidate, reference, region)
    errors = [_mean((c - r) ** 2, pair.weight) for c, r in pair]
    return torch.tensor(errors, dtype=torch.float64)


def psnr(candidate: Tensor, reference: Tensor, region: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB: (F,) float64, infinite for equal frames.

    Raises:
        ValueError: as `squared_error`.
    """
    return -10 * torch.log10(squared_error(candidate, reference, region))


def pooled_psnr(squared_errors: Tensor) -> Measure:
    """PSNR in dB of a whole clip from its frames' mean squared errors.

    The mean is taken before the logarithm: some bad frames among good ones count.
    """
    if squared_errors.numel() == 0:
        return Measure.missing("no frame to compare")
    error = squared_errors.double().mean().item()
    return Measure(-10 * math.log10(error)) if error > 0 else Measure(math.inf, "identical")


def ssim(candidate: Tensor, reference: Tensor, region: Tensor | None = None) -> Tensor:
    """Structural similarity of each frame: (F,) float64, 1 for equal frames.

    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity":
    Gaussian window, borders reflected, mean over the three channels and the region's pixels.

    Raises:
        ValueError: as `squared_error`, or the frames are smaller than the window.
    """
    pair = _focus(candidate, reference, region, margin=_TAPS - 1)
    if min(candidate.shape[-2:]) < _TAPS:
        raise ValueError(f"SSIM needs frames of at least {_TAPS} x {_TAPS} pixels")
    losses = [_mean(1 - _structure(c, r)[0], pair.weight) for c, r in pair]
    return 1 - torch.tensor(losses, dtype=torch.float64)


def ms_ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """Multi-scale structural similarity of each frame: (F,) float64, 1 for equal frames.

    Wang, Simoncelli, Bovik 2003, five scales. Pooled over whole pictures at each scale, so a region
    is given as its bounding box (`crop`).

    Raises:
        ValueError: shapes differ, or a side is below `MS_SSIM_MIN_SIDE`.
    """
    height, width = candidate.shape[-2:]
    if reason := ms_ssim_reason(height, width):
        raise ValueError(reason)
    coarsest = 2 ** (len(_SCALES) - 1)
    margin = (_TAPS - 1) * coarsest
    pair = _focus(candidate, reference, None, margin=margin, multiple=coarsest)
    values = [_multiscale(c, r, height, width) for c, r in pair]
    return torch.tensor(values, dtype=torch.float64)


def ms_ssim_reason(height: int, width: int) -> str:
    """Why pictures of this size have no MS-SSIM; empty if they have."""
    if min(height, width) >= MS_SSIM_MIN_SIDE:
        return ""
    return f"{width}x{height} pixels; five scales need {MS_SSIM_MIN_SIDE} in both directions"


def flicker(candidate: Tensor, reference: Tensor, region: Tensor | None = None) -> Tensor:
    """Error of the change from each frame to the next: (F - 1,) float64, in 8-bit levels.

    Root mean square over the region of (c[t] - c[t-1]) - (r[t] - r[t-1]), times 255. A constant
    error of colour does not flicker; an error that comes and goes does.

    Raises:
        ValueError: as `squared_error`.
    """
    pair = _focus(candidate, reference, region)
    errors = (c - r for c, r in pair)
    values = [
        255 * math.sqrt(_mean((now - before) ** 2, pair.weight))
        for before, now in itertools.pairwise(errors)
    ]
    return torch.tensor(values, dtype=torch.float64)


def rms(values: Tensor) -> Measure:
    """Root mean square of a clip's flicker."""
    if values.numel() == 0:
        return Measure.missing("needs two consecutive frames")
    return Measure(values.double().square().mean().sqrt().item())


def seams(steps: Tensor, at_border: Tensor) -> Measure:
    """How much larger the flicker is where one chunk ends and the next begins; 1 is no seam.

    Args:
        steps: (N,) flicker of N steps from a frame to the next.
        at_border: (N,) bool, whether the step crosses from one chunk to the next.
    """
    border, inside = rms(steps[at_border]), rms(steps[~at_border])
    if at_border.sum() == 0 or at_border.all():
        return Measure.missing("needs two chunks with consecutive frames inside")
    if inside.value == 0:
        return Measure.missing("no flicker to compare with" if border.value else "identical")
    return Measure(border.value / inside.value)


def lpips_reason() -> str:
    """Why LPIPS is not available here; empty if it is. Never downloads anything."""
    for package in ("torchmetrics", "torchvision"):
        if importlib.util.find_spec(package) is None:
            return f"not available: {package} is not installed"
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_BACKBONE
    return "" if backbone.is_file() else f"not available: no AlexNet weights at {backbone}"


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018), AlexNet, by torchmetrics.

    Raises:
        MissingExtraError: with the reason of `lpips_reason`.
    """

    def __init__(self) -> None:
        require("torchmetrics")
        if reason := lpips_reason():
            raise MissingExtraError(f"LPIPS is {reason}")
        module = importlib.import_module("torchmetrics.image.lpip")
        self._metric = module.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    @torch.no_grad()
    def __call__(self, candidate: Tensor, reference: Tensor) -> Tensor:
        """Distance of each frame: (F,) float64, 0 for equal frames."""
        pairs = zip(candidate.float().cpu(), reference.float().cpu(), strict=True)
        values = [self._metric(c[None], r[None]).item() for c, r in pairs]
        return torch.tensor(values, dtype=torch.float64)


def crop(clip: Tensor, region: Tensor) -> Tensor:
    """The clip cut to the bounding box of a region.

    Raises:
        ValueError: the region is empty.
    """
    rows, columns = bounding_box(region)
    return clip[..., rows, columns]


def bounding_box(region: Tensor) -> tuple[slice, slice]:
    """Rows and columns of the smallest box around a region (..., H, W).

    Raises:
        ValueError: the region is empty.
    """
    inside = region.reshape(-1, *region.shape[-2:]).bool().any(0)
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    if len(rows) == 0:
        raise ValueError("the region is empty")
    return (
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )


@dataclass(frozen=True)
class _Pair:
    """Two clips cut to where they may differ; gives their frames (h, w, 3) in float64.

    Attributes:
        candidate: (F, 3, h, w).
        reference: (F, 3, h, w).
        weight: (h, w, 1), what a pixel counts; sums to one over the uncut frame.
    """

    candidate: Tensor
    reference: Tensor
    weight: Array

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for c, r in zip(self.candidate, self.reference, strict=True):
            yield _picture(c), _picture(r)


def _focus(
    candidate: Tensor,
    reference: Tensor,
    region: Tensor | None,
    margin: int = 0,
    multiple: int = 1,
) -> _Pair:
    """Check two clips and a region, and cut all to the box around what differs.

    Most of a synced frame is the original. Where no window sees a difference there is no loss, so
    nothing has to be computed there.

    Args:
        candidate: (F, 3, H, W).
        reference: (F, 3, H, W).
        region: which pixels count; None is all.
        margin: how far around a difference its effect reaches, in pixels.
        multiple: the box begins and ends on multiples of this, or at the frame's border.
    """
    if candidate.shape != reference.shape or candidate.ndim != 4 or candidate.shape[1] != 3:
        raise ValueError(
            f"expected two clips (F, 3, H, W), got {tuple(candidate.shape)} "
            f"and {tuple(reference.shape)}"
        )
    weight = _weight(region, *candidate.shape[-2:])
    different = torch.zeros(candidate.shape[-2:], dtype=torch.bool, device=candidate.device)
    for c, r in zip(candidate, reference.to(candidate.device), strict=True):
        different |= (c != r).any(dim=0)
    if not different.any():
        different[0, 0] = True  # some box, of a loss of zero
    box = []
    for span in bounding_box(different):
        start = max(0, span.start - margin) // multiple * multiple
        stop = span.stop + margin
        box.append(slice(start, -(-stop // multiple) * multiple))
    rows, columns = box
    return _Pair(
        candidate[..., rows, columns], reference[..., rows, columns], weight[rows, columns]
    )


def _weight(region: Tensor | None, height: int, width: int) -> Array:
    if region is None:
        return np.broadcast_to(np.float64(1 / (height * width)), (height, width, 1))
    if tuple(region.shape[-2:]) != (height, width) or region.numel() != height * width:
        raise ValueError(f"region {tuple(region.shape)} does not fit {height} x {width} pixels")
    inside = region.reshape(height, width, 1).cpu().double().numpy()
    if not inside.sum() > 0:
        raise ValueError("the region is empty")
    weight: Array = inside / inside.sum()
    return weight


def _picture(frame: Tensor) -> Array:
    """(3, H, W) tensor to (H, W, 3) float64."""
    return np.ascontiguousarray(frame.detach().cpu().double().numpy().transpose(1, 2, 0))


def _mean(values: Array, weight: Array) -> float:
    return float((values * weight).sum() / 3)


def _blur(values: Array) -> Array:
    offsets = np.arange(_TAPS) - _TAPS // 2
    window = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    window /= window.sum()
    result: Array = cv2.sepFilter2D(values, -1, window, window, borderType=cv2.BORDER_REFLECT_101)
    return result


def _structure(a: Array, b: Array) -> tuple[Array, Array]:
    """Maps (H, W, 3) of the similarity, and of its contrast and structure part."""
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = np.maximum(_blur(a * a) - mean_a**2, 0)
    var_b = np.maximum(_blur(b * b) - mean_b**2, 0)
    covariance = _blur(a * b) - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (var_a + var_b + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return luminance * contrast, contrast


def _multiscale(a: Array, b: Array, height: int, width: int) -> float:
    """Product over the scales. Outside a and b, which are parts of larger frames, all is equal."""
    value = 1.0
    for scale, exponent in enumerate(_SCALES):
        similarity, contrast = _structure(a, b)
        loss = 1 - (similarity if scale == len(_SCALES) - 1 else contrast)
        mean = 1 - loss.sum() / (3 * height * width)
        value *= max(float(mean), 0.0) ** exponent
        a, b = _halve(a), _halve(b)
        height, width = height // 2, width // 2
    return value


def _halve(picture: Array) -> Array:
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    even = picture[:height, :width]
    result: Array = even.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    return result
