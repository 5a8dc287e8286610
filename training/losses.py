"""Loss terms of the two training stages; all take and return fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Where the mouth is in an aligned face, as shares of the height and width: top, bottom, left,
# right. Between the nose and the chin of the alignment's template.
MOUTH_BOX = (0.53, 0.86, 0.25, 0.75)


def mouth_map(size: int, *, device: torch.device | str = "cpu", soft: float = 0.04) -> Tensor:
    """``(1, 1, size, size)`` in [0, 1]: 1 at the mouth, falling off over ``soft`` of the size."""
    line = (torch.arange(size, device=device) + 0.5) / size
    top, bottom, left, right = MOUTH_BOX

    def window(low: float, high: float) -> Tensor:
        return torch.sigmoid((line - low) / soft * 2) * torch.sigmoid((high - line) / soft * 2)

    return (window(top, bottom)[:, None] * window(left, right)[None, :])[None, None]


def mouth_box(size: int) -> tuple[slice, slice]:
    """Rows and columns of the mouth in a face of ``size`` pixels."""
    top, bottom, left, right = (round(size * v) for v in MOUTH_BOX)
    return slice(top, bottom), slice(left, right)


def weighted_l1(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return ((a - b).abs() * weight).mean() / weight.mean()


def gradient_loss(a: Tensor, b: Tensor, weight: Tensor, *, scales: int = 3) -> Tensor:
    """L1 between the horizontal and vertical differences at several scales: edges and texture."""
    total = a.new_zeros(())
    error = a - b
    for scale in range(scales):
        if scale:
            error, weight = F.avg_pool2d(error, 2), F.avg_pool2d(weight, 2)
        dx = (error[..., 1:] - error[..., :-1]).abs() * weight[..., 1:]
        dy = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
        total = total + (dx.mean() + dy.mean()) / weight.mean()
    return total / scales


def ssim_loss(a: Tensor, b: Tensor, weight: Tensor, *, scales: int = 3) -> Tensor:
    """1 - SSIM with a 7x7 box window, the mean over ``scales`` halvings. Values in [-1, 1]."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    total = a.new_zeros(())
    for scale in range(scales):
        if scale:
            a, b, weight = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2), F.avg_pool2d(weight, 2)

        def pool(x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 7, stride=1, padding=3, count_include_pad=False)

        mean_a, mean_b = pool(a), pool(b)
        var_a = pool(a * a) - mean_a * mean_a
        var_b = pool(b * b) - mean_b * mean_b
        both = pool(a * b) - mean_a * mean_b
        similarity = ((2 * mean_a * mean_b + c1) * (2 * both + c2)) / (
            (mean_a * mean_a + mean_b * mean_b + c1) * (var_a + var_b + c2)
        )
        total = total + ((1 - similarity) * weight).mean() / weight.mean()
    return total / scales


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean over the latent values of the divergence from a standard normal distribution."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def reconstruction(
    output: Tensor, target: Tensor, mean: Tensor, log_variance: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """All terms of the VAE; ``loss`` is their weighted sum.

    output, target: ``(B, 3, H, W)`` in [-1, 1]; mean, log_variance: ``(B, 4, h, w)``;
    weight: ``(1, 1, H, W)``, how much a pixel counts.
    """
    output, target = output.float(), target.float()
    l1 = weighted_l1(output, target, weight)
    edges = gradient_loss(output, target, weight)
    structure = ssim_loss(output, target, weight)
    kl = kl_loss(mean.float(), log_variance.float())
    loss = l1 + 0.5 * edges + 0.1 * structure + KL_WEIGHT * kl
    return {"loss": loss, "l1": l1, "edges": edges, "ssim": structure, "kl": kl}


KL_WEIGHT = 2e-4


def noise_loss_weight(alpha_bar: Tensor, *, gamma: float = 5.0, cap: float = 20.0) -> Tensor:
    """Weight of the squared noise error at cumulative signal level ``alpha_bar``.

    In terms of the implied clean latents this is ``min(SNR, gamma) + 1`` (the weighting of
    velocity prediction with the cap of min-SNR, https://arxiv.org/abs/2303.09556). Plain noise
    prediction gives the noisiest steps next to no weight, and those are where the sound decides
    how far the mouth is open. ``cap`` bounds it: the noisiest steps magnify any error.
    """
    snr = alpha_bar / (1 - alpha_bar)
    return ((snr.clamp(max=gamma) + 1) / snr).clamp(max=cap)


def denoising(
    predicted: Tensor, noise: Tensor, alpha_bar: Tensor, region: Tensor, *, motion: float = 0.25
) -> dict[str, Tensor]:
    """Weighted squared error of the predicted noise, and of its change from frame to frame.

    predicted, noise: ``(B, 4, F, h, w)``; alpha_bar: ``(B,)``; region: ``(1, 1, 1, h, w)``.
    ``motion`` weighs the error of frame differences: it is movement that follows the sound.
    """
    error = predicted.float() - noise.float()
    weight = noise_loss_weight(alpha_bar)
    per_clip = (error.square() * region).mean(dim=(1, 2, 3, 4)) / region.mean()
    loss = (weight * per_clip).mean()
    terms = {"mse": per_clip.mean()}
    if motion and error.shape[2] > 1:
        change = error[:, :, 1:] - error[:, :, :-1]
        moved = (change.square() * region).mean(dim=(1, 2, 3, 4)) / region.mean()
        loss = loss + motion * (weight * moved).mean()
    return {"loss": loss} | terms
