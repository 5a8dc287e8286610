"""Log-mel spectrograms as Whisper defines them, for sounds of any length.

Frames of 25 ms every 10 ms, power spectra, and triangular filters on Slaney's mel scale with equal
area (Radford et al., 2022, https://arxiv.org/abs/2212.04356; the scale is that of the Auditory
Toolbox, Slaney, 1998).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .audio import SAMPLE_RATE

N_FFT = 400  # samples a frame
HOP = 160  # samples between frames
MOST_BANDS = N_FFT  # more than there are frequencies make no sense
FLOOR = 1e-10  # power below this counts as silence: -10 in log10


def mel_filters(bands: int) -> Tensor:
    """Filter bank ``(bands, N_FFT // 2 + 1)`` float32 from 0 to 8000 Hz."""
    top = _hertz_to_mel(torch.tensor(SAMPLE_RATE / 2, dtype=torch.float64))
    edges = _mel_to_hertz(torch.linspace(0, float(top), bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


class LogMel(nn.Module):
    """``log10`` of the mel power spectrum, without any scaling that depends on the whole sound."""

    window: Tensor
    filters: Tensor

    def __init__(self, bands: int = 80) -> None:
        super().__init__()
        if not 1 <= bands <= MOST_BANDS:
            raise ValueError(f"{bands} mel bands; 1 to {MOST_BANDS} are possible")
        self.bands = bands
        # Made and not loaded, so real also where modules are made without memory for weights.
        default = torch.get_default_device()
        with torch.device("cpu") if default.type == "meta" else default:
            self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)
            self.register_buffer("filters", mel_filters(bands), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        """``(..., n)`` with n a multiple of 160, at least 320 -> ``(..., bands, n / 160)``."""
        return self.frames(samples, 0, samples.shape[-1] // HOP)

    def frames(self, samples: Tensor, start: int, stop: int) -> Tensor:
        """Frames ``start <= i < stop`` of ``forward(samples)``, from the samples they need only.

        Frame i is centred on sample 160 i; the sound is mirrored at its ends.
        """
        length = samples.shape[-1]
        left, right = start * HOP - N_FFT // 2, (stop - 1) * HOP + N_FFT // 2
        part = samples[..., max(left, 0) : min(right, length)].float().to(self.window.device)
        if left < 0:
            mirrored = samples[..., 1 : 1 - left].flip(-1).to(part)
            part = torch.cat([mirrored, part], dim=-1)
        if right > length:
            mirrored = samples[..., length - 1 - (right - length) : length - 1].flip(-1).to(part)
            part = torch.cat([part, mirrored], dim=-1)
        leading = part.shape[:-1]
        spectrum = torch.stft(
            part.reshape(-1, part.shape[-1]),
            N_FFT,
            HOP,
            window=self.window.float(),
            center=False,
            return_complex=True,
        )  # (N, N_FFT / 2 + 1, frames)
        power = spectrum.abs().square().contiguous()
        logs = (self.filters.float() @ power).clamp(min=FLOOR).log10()
        return logs.reshape(*leading, *logs.shape[1:])


# Slaney's mel scale: linear below 1 kHz (15 mels), logarithmic above.
_LINEAR = 200 / 3  # Hz a mel
_BREAK_HERTZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = math.log(6.4) / 27  # of ln(Hz) a mel


def _hertz_to_mel(hertz: Tensor) -> Tensor:
    upper = _BREAK_MEL + (hertz.clamp(min=_BREAK_HERTZ) / _BREAK_HERTZ).log() / _LOG_STEP
    return torch.where(hertz < _BREAK_HERTZ, hertz / _LINEAR, upper)


def _mel_to_hertz(mel: Tensor) -> Tensor:
    upper = _BREAK_HERTZ * ((mel - _BREAK_MEL) * _LOG_STEP).exp()
    return torch.where(mel < _BREAK_MEL, mel * _LINEAR, upper)
