"""Each measure against a plain reference, a closed form or an invariance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.quality import metrics
from lsync_compile.quality.extra import MissingExtraError, require


def noisy_pair(frames: int = 3, height: int = 40, width: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(frames, 3, height, width, generator=generator, dtype=torch.float64)
    # Smooth, so that there is structure to lose.
    reference = F.avg_pool2d(F.pad(reference, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    noise = torch.randn(reference.shape, generator=generator, dtype=torch.float64)
    return (reference + 0.03 * noise).clamp(0, 1), reference


def box_region(height: int, width: int, box: tuple[slice, slice]) -> Tensor:
    region = torch.zeros(1, height, width, dtype=torch.bool)
    region[0, box[0], box[1]] = True
    return region


def test_psnr_of_a_constant_error_is_known() -> None:
    reference = torch.full((2, 3, 8, 9), 0.25)
    candidate = torch.stack([reference[0] + 0.1, reference[1] + 0.01])
    torch.testing.assert_close(
        metrics.psnr(candidate, reference), torch.tensor([20.0, 40.0]).double(), atol=1e-4, rtol=0
    )


def test_psnr_equals_numpy_in_a_region() -> None:
    candidate, reference = noisy_pair()
    region = box_region(40, 48, (slice(5, 20), slice(7, 31)))
    expected = [
        -10 * np.log10(np.mean((c - r) ** 2))
        for c, r in zip(
            candidate[:, :, 5:20, 7:31].numpy(), reference[:, :, 5:20, 7:31].numpy(), strict=True
        )
    ]
    assert metrics.psnr(candidate, reference, region).tolist() == pytest.approx(expected, abs=1e-9)


def test_pixels_outside_the_region_do_not_count() -> None:
    candidate, reference = noisy_pair()
    box = (slice(5, 20), slice(7, 31))
    candidate[:, :, box[0], box[1]] = reference[:, :, box[0], box[1]]
    region = box_region(40, 48, box)
    assert metrics.psnr(candidate, reference, region).isposinf().all()
    assert metrics.flicker(candidate, reference, region).max() == 0
    assert metrics.psnr(candidate, reference).max() < 40


def test_float32_clips_lose_nothing() -> None:
    """A mean over a million equal float32 errors is exact only with a wide accumulator."""
    reference = torch.zeros(1, 3, 600, 600)
    candidate = torch.full_like(reference, 0.1)
    expected = float(torch.tensor(0.1, dtype=torch.float32).double() ** 2)
    assert metrics.squared_error(candidate, reference).item() == pytest.approx(expected, rel=1e-13)


def test_pooled_psnr_counts_bad_frames() -> None:
    pooled = metrics.pooled_psnr(torch.tensor([1e-2, 1e-6]))
    assert pooled.value == pytest.approx(-10 * math.log10((1e-2 + 1e-6) / 2))
    assert pooled.value < (20 + 60) / 2
    assert metrics.pooled_psnr(torch.zeros(3)) == metrics.Measure(math.inf, "identical")
    assert math.isnan(metrics.pooled_psnr(torch.zeros(0)).value)


def test_ssim_equals_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    candidate, reference = noisy_pair()
    _, maps = torchmetrics.structural_similarity_index_measure(
        candidate, reference, data_range=1.0, reduction="none", return_full_image=True
    )
    ours = metrics.ssim(candidate, reference)
    torch.testing.assert_close(ours, maps.mean(dim=(1, 2, 3)), atol=1e-9, rtol=0)
    assert 0.3 < ours.mean() < 0.98
    region = box_region(40, 48, (slice(0, 11), slice(30, 48)))
    torch.testing.assert_close(
        metrics.ssim(candidate, reference, region),
        maps[:, :, 0:11, 30:48].mean(dim=(1, 2, 3)),
        atol=1e-9,
        rtol=0,
    )


def test_ssim_of_a_changed_patch_equals_the_whole_computation() -> None:
    """Only the box around what differs is computed; the rest has similarity 1."""
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    noise, reference = noisy_pair(height=64, width=72)
    for rows, columns in ((slice(20, 30), slice(31, 40)), (slice(0, 3), slice(60, 72))):
        candidate = reference.clone()
        candidate[:, :, rows, columns] = noise[:, :, rows, columns]
        _, maps = torchmetrics.structural_similarity_index_measure(
            candidate, reference, data_range=1.0, reduction="none", return_full_image=True
        )
        ours = metrics.ssim(candidate, reference)
        torch.testing.assert_close(ours, maps.mean(dim=(1, 2, 3)), atol=1e-9, rtol=0)
    assert metrics.ssim(reference, reference).tolist() == [1.0] * 3


def plain_ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Wang et al. 2003 written down with a two-dimensional window, (F, 3, H, W) to (F,)."""
    line = torch.exp(-0.5 * ((torch.arange(11).double() - 5) / 1.5) ** 2)
    window = torch.outer(line, line) / line.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        x = F.pad(x, (5, 5, 5, 5), mode="reflect")
        return F.conv2d(x, window.expand(3, 1, 11, 11), groups=3)

    value = torch.ones(len(a), dtype=torch.float64)
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mean_a, mean_b = blur(a), blur(b)
        variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        term = (2 * (blur(a * b) - mean_a * mean_b) + 9e-4) / (variance_a + variance_b + 9e-4)
        if scale == 4:
            term = term * (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        value = value * term.mean(dim=(1, 2, 3)) ** exponent
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return value


def test_ms_ssim_equals_its_definition() -> None:
    candidate, reference = noisy_pair(frames=1, height=179, width=190)
    expected = plain_ms_ssim(candidate, reference)
    torch.testing.assert_close(metrics.ms_ssim(candidate, reference), expected, atol=1e-9, rtol=0)
    assert expected.item() < 0.99


def test_ms_ssim_of_a_changed_patch_equals_the_whole_computation() -> None:
    noise, reference = noisy_pair(frames=1, height=401, width=230)
    candidate = reference.clone()
    candidate[:, :, 210:230, 20:60] = noise[:, :, 210:230, 20:60]
    torch.testing.assert_close(
        metrics.ms_ssim(candidate, reference),
        plain_ms_ssim(candidate, reference),
        atol=1e-9,
        rtol=0,
    )


def test_ms_ssim_is_that_of_torchmetrics_but_for_the_borders() -> None:
    """torchmetrics leaves the outer 5 pixels of each scale out of the contrast term."""
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    candidate, reference = noisy_pair(frames=1, height=352, width=352)
    theirs = torchmetrics.multiscale_structural_similarity_index_measure(
        candidate.float(), reference.float(), data_range=1.0
    )
    assert metrics.ms_ssim(candidate, reference).item() == pytest.approx(theirs.item(), abs=2e-3)


def test_ms_ssim_refuses_small_pictures() -> None:
    small = torch.zeros(1, 3, 148, 236)
    with pytest.raises(ValueError, match="236x148 pixels; five scales need 176"):
        metrics.ms_ssim(small, small)
    assert metrics.ms_ssim_reason(176, 176) == ""


def test_flicker_sees_change_and_not_colour() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.rand(6, 3, 16, 16, generator=generator, dtype=torch.float64) * 0.5
    assert metrics.flicker(reference + 0.2, reference).max() == pytest.approx(0, abs=1e-9)
    sign = torch.tensor([1.0, -1.0] * 3).double().view(6, 1, 1, 1)
    blinking = metrics.flicker(reference + 0.01 * sign, reference)
    assert blinking.tolist() == pytest.approx([255 * 0.02] * 5)


def test_one_bad_frame_makes_two_bad_steps() -> None:
    reference = torch.full((5, 3, 8, 8), 0.5, dtype=torch.float64)
    candidate = reference.clone()
    candidate[2] += 0.1
    steps = metrics.flicker(candidate, reference)
    assert steps.tolist() == pytest.approx([0, 25.5, 25.5, 0])
    assert metrics.rms(steps).value == pytest.approx(25.5 / math.sqrt(2))
    assert math.isnan(metrics.rms(metrics.flicker(candidate[:1], reference[:1])).value)


def test_seams_compare_borders_with_the_rest() -> None:
    steps = torch.tensor([1.0, 1.0, 3.0, 1.0])
    border = torch.tensor([False, False, True, False])
    assert metrics.seams(steps, border).value == pytest.approx(3.0)
    assert metrics.seams(torch.ones(4), border).value == pytest.approx(1.0)
    assert metrics.seams(torch.zeros(4), border).note == "identical"
    assert math.isnan(metrics.seams(steps, torch.zeros(4, dtype=torch.bool)).value)


@pytest.mark.parametrize("measure", [metrics.squared_error, metrics.ssim, metrics.flicker])
def test_wrong_shapes_are_refused(measure: object) -> None:
    assert callable(measure)
    clip = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="expected two clips"):
        measure(clip, clip[:1])
    with pytest.raises(ValueError, match="expected two clips"):
        measure(clip[:, :1], clip[:, :1])
    with pytest.raises(ValueError, match="does not fit"):
        measure(clip, clip, torch.ones(1, 8, 16))
    with pytest.raises(ValueError, match="empty"):
        measure(clip, clip, torch.zeros(1, 16, 16))


def test_bounding_box_and_crop() -> None:
    region = box_region(20, 30, (slice(4, 9), slice(11, 23)))
    assert metrics.bounding_box(region) == (slice(4, 9), slice(11, 23))
    assert metrics.crop(torch.zeros(2, 3, 20, 30), region).shape == (2, 3, 5, 12)


def test_lpips_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "torchvision" else object()
    )
    assert metrics.lpips_reason() == "not available: torchvision is not installed"
    with pytest.raises(MissingExtraError, match="torchvision is not installed"):
        metrics.Lpips()


def test_lpips_never_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert "no AlexNet weights at" in metrics.lpips_reason()


def test_lpips_is_zero_for_equal_frames_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchmetrics' own head on an AlexNet of random weights, as nothing is downloaded."""
    pytest.importorskip("torchmetrics")
    from torch import nn
    from torchmetrics.functional.image import lpips
    from torchmetrics.image import lpip

    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for channels in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(*channels, 3, padding=1), nn.ReLU()]
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *args: nn.Sequential(*layers))
    monkeypatch.setattr(lpip, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(metrics, "lpips_reason", lambda: "")
    _, reference = noisy_pair(frames=2, height=64, width=80)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(2)).double()
    measure = metrics.Lpips()
    assert measure(reference, reference).tolist() == [0.0, 0.0]
    little, much = (measure((reference + a * noise).clamp(0, 1), reference) for a in (0.01, 0.2))
    assert little.shape == (2,)
    assert (little > 0).all()
    assert (little < much).all()


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(
        MissingExtraError, match=r"no_such_package is not.*lsync-compile\[quality\]"
    ):
        require("no_such_package", "json")


def test_measures_become_json() -> None:
    assert metrics.Measure(1.5).to_dict() == {"value": 1.5, "note": ""}
    assert metrics.Measure.missing("why").to_dict() == {"value": None, "note": "why"}
    assert metrics.Measure(math.inf, "identical").to_dict()["value"] is None
