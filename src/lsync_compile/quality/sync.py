"""Whether a mouth follows the sound, measured from pixels and samples alone.

No landmark model and no sync network is needed, and no identity enters: in an aligned face the
mouth lies at a fixed place, so how far it is open can be read from a strip of rows in the middle
of it, and speech that opens the mouth is loud where its first formants lie. ``docs/quality.md``
gives the correlations of this measure, and of those it was picked from, on real clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[np.float64]

# Fractions of the side of the aligned face. The narrow strip is the gap between the lips, the wide
# one the lips as a whole; the cheek strip above them gives the skin's brightness.
_GAP = (0.566, 0.762, 0.371, 0.582)  # top, bottom, left, right
_LIPS = (0.547, 0.801, 0.371, 0.582)
_SKIN = (0.352, 0.547, 0.234, 0.742)
_SMALLEST_FACE = 64
# Sharpness of the soft minimum over rows.
_SHARPNESS = 12.0
# A lip centre lower by the whole face counts as this much darkness: both parts then move equally
# far in real speech.
_LIP_WEIGHT = 2.7

SPEECH_BAND = (800.0, 3000.0)  # Hz
_WINDOW = 0.08  # s

# Speech moves a mouth 2 to 8 times a second; what is slower is pose and smile, and is taken out.
_SLOW = 0.48  # s, standard deviation of the Gaussian that is subtracted
_FAST = 0.028  # s, of the one that is applied
MAX_OFFSET = 0.4  # s
MIN_DURATION = 2.0  # s


@dataclass(frozen=True)
class Sync:
    """How a mouth follows the sound.

    Attributes:
        correlation: of opening and sound with no offset, in [-1, 1].
        best: the largest correlation within 0.4 s.
        offset: where that is, in frames; positive if the mouth is late.
        chance: what `best` reaches in 95 % of the cases with the sound shifted by more than a
            second, which is what an unrelated mouth of the same liveliness gets.
        movement: standard deviation of the opening; a still mouth has none.
        note: why the figures are NaN, or empty.
    """

    correlation: float
    best: float
    offset: int
    chance: float
    movement: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, None for NaN."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in values.items()
        }


def mouth_opening(faces: Tensor | Iterable[Tensor]) -> Array:
    """How far the mouth is open in each aligned face: (F,) float64, in units of skin brightness.

    Two signs, added: the darkest row between the lips, relative to the skin (a soft minimum, as
    teeth may fill part of the gap), and how low the middle of the lips' redness lies, which sinks
    with the lower jaw. The zero is arbitrary; differences within one clip mean something.

    Args:
        faces: (F, 3, R, R) in [0, 1], aligned as LatentSync aligns them, R at least 64; or pieces
            of a clip one by one.

    Raises:
        ValueError: not such a tensor.
    """
    openings = [_opening(piece) for piece in ([faces] if isinstance(faces, Tensor) else faces)]
    return np.concatenate(openings) if openings else np.zeros(0)


def sound_energy(
    samples: npt.ArrayLike,
    frames: int,
    *,
    sample_rate: int,
    fps: float,
    band: tuple[float, float] = SPEECH_BAND,
) -> Array:
    """Level of the sound around the middle of each video frame: (frames,) float64.

    Root mean square in a Hann window of 80 ms, by default between 800 and 3000 Hz: there lie the
    formants that an open mouth lets out, and neither the hum of a closed one nor the hiss of
    consonants. Silence is appended to a sound that is too short.

    Args:
        samples: (n,) mono.
        frames: how many frames.
        sample_rate: of the samples, at least 6000 Hz.
        fps: frames a second.
        band: lowest and highest frequency in Hz.
    """
    length = round(_WINDOW * sample_rate)
    starts = np.round((np.arange(frames) + 0.5) * sample_rate / fps).astype(int)
    sound = np.asarray(samples, dtype=np.float64)[: int(frames * sample_rate / fps) + length]
    before, after = length // 2, length + max(0, int(starts.max(initial=0)) - len(sound))
    sound = np.pad(sound, (before, after))
    spectrum = np.fft.rfft(sound)
    frequency = np.fft.rfftfreq(len(sound), 1 / sample_rate)
    spectrum[(frequency < band[0]) | (frequency > band[1])] = 0
    sound = np.fft.irfft(spectrum, len(sound))
    window = np.hanning(length + 2)[1:-1]
    window /= window.sum()
    energy = [math.sqrt(float(window @ sound[start : start + length] ** 2)) for start in starts]
    return np.array(energy, dtype=np.float64)


def measure_sync(opening: Array, energy: Array, *, fps: float = 25.0) -> Sync:
    """Correlate the opening of a mouth with the sound, at no offset and at the best one.

    Both are smoothed a little and freed of what is slower than speech. A pair of frames counts only
    where both signals are there.

    Args:
        opening: (F,) of `mouth_opening`.
        energy: (F,) of `sound_energy`.
        fps: frames a second.

    Raises:
        ValueError: the two differ in length.
    """
    if opening.shape != energy.shape:
        raise ValueError(f"{len(opening)} frames of opening, {len(energy)} of sound")
    movement = float(opening.std()) if len(opening) else math.nan
    if len(opening) < MIN_DURATION * fps:
        note = f"{len(opening)} frames; needs {math.ceil(MIN_DURATION * fps)}"
        return Sync(math.nan, math.nan, 0, math.nan, movement, note)
    mouth, sound = speech_band(opening, fps), speech_band(energy, fps)
    if mouth.std() < 1e-9 or sound.std() < 1e-9:
        still = "mouth does not move" if mouth.std() < 1e-9 else "sound is constant or silent"
        return Sync(math.nan, math.nan, 0, math.nan, movement, f"the {still}")
    reach = round(MAX_OFFSET * fps)
    around = correlations(mouth, sound, reach)
    best = int(around.argmax())
    return Sync(
        correlation=float(around[reach]),
        best=float(around[best]),
        offset=best - reach,
        chance=_chance(mouth, sound, reach, math.ceil(fps)),
        movement=movement,
    )


def correlations(mouth: Array, sound: Array, reach: int) -> Array:
    """Correlation for each offset from -reach to reach frames: (2 reach + 1,) float64.

    At offset k frame t of the mouth meets frame t - k of the sound.
    """
    count = len(mouth)
    values = []
    for offset in range(-reach, reach + 1):
        late, early = max(offset, 0), max(-offset, 0)
        pair = np.corrcoef(mouth[late : count - early], sound[early : count - late])
        values.append(pair[0, 1])
    return np.array(values)


def speech_band(signal: Array, fps: float) -> Array:
    """The part of a signal (F,) that moves as fast as speech does."""
    smooth = _gaussian(signal, _FAST * fps)
    result: Array = smooth - _gaussian(smooth, _SLOW * fps)
    return result


def _chance(mouth: Array, sound: Array, reach: int, apart: int) -> float:
    """95th percentile of the best correlation over circular shifts of the sound."""
    shifts = range(apart + reach, len(mouth) - apart - reach)
    best = [correlations(mouth, np.roll(sound, shift), reach).max() for shift in shifts]
    return float(np.percentile(best, 95)) if len(best) >= 20 else math.nan


def _gaussian(signal: Array, sigma: float) -> Array:
    radius = math.ceil(4 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(signal, radius, mode="edge")
    result: Array = np.convolve(padded, weights / weights.sum(), mode="valid")
    return result


def _opening(faces: Tensor) -> Array:
    if faces.ndim != 4 or faces.shape[1] != 3 or faces.shape[2] != faces.shape[3]:
        raise ValueError(f"expected aligned faces (F, 3, R, R), got {tuple(faces.shape)}")
    if faces.shape[-1] < _SMALLEST_FACE:
        raise ValueError(f"aligned faces must have at least {_SMALLEST_FACE} pixels a side")
    pictures = faces.detach().cpu().numpy()
    # Of each frame its own, so that a shadow which passes over the face opens no mouth.
    skin = np.median(_luminance(_strip(pictures, _SKIN)), axis=(1, 2))
    gap = _luminance(_strip(pictures, _GAP)).mean(axis=2) / np.maximum(skin, 1e-3)[:, None]
    darkness = np.log(np.exp(-_SHARPNESS * gap).mean(axis=1)) / _SHARPNESS
    opening: Array = darkness + _LIP_WEIGHT * _lip_centre(_strip(pictures, _LIPS))
    return opening


def _strip(pictures: npt.NDArray[Any], place: tuple[float, float, float, float]) -> Array:
    side = pictures.shape[-1]
    top, bottom, left, right = (round(fraction * side) for fraction in place)
    strip: Array = pictures[:, :, top:bottom, left:right].astype(np.float64)
    return strip


def _luminance(pictures: Array) -> Array:
    """(F, 3, h, w) to (F, h, w), ITU-R BT.601."""
    result: Array = np.einsum("fchw,c->fhw", pictures, np.array([0.299, 0.587, 0.114]))
    return result


def _lip_centre(strip: Array) -> Array:
    """Height of the middle of the redness, (F,): 0 at the top of the strip, 1 a face lower."""
    redness = (strip[:, 0] / (strip.sum(axis=1) + 0.15)).mean(axis=2)
    rows = redness.shape[1]
    side = rows / (_LIPS[1] - _LIPS[0])
    redness = np.stack([_gaussian(row, 0.006 * side) for row in redness])
    lips = np.maximum(redness - np.percentile(redness, 40, axis=1, keepdims=True), 0) ** 2
    centre: Array = lips @ np.arange(rows) / np.maximum(lips.sum(axis=1), 1e-12) / side
    return centre
