"""Speech with the mouth motion that belongs to it.

The motion is computed from the sound: how far the mouth opens follows the energy of the voice
and the first formant, how wide it is drawn follows the balance of the upper and the middle
formants (/i e s/ wide, /o u/ round). A drawn face that moves so is learnable from sound alone,
and its truth is known exactly.

Sounds are 16 kHz mono in [-1, 1]; tracks have 25 values a second, each for the middle of its
video frame.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import wave
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16000
FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS

_HOP = 160
_WINDOW = 512
# Root mean square of the spoken parts after `normalise`.
LEVEL = 0.08


def _bands(sound: Tensor, edges: Sequence[tuple[float, float]]) -> list[Tensor]:
    """Energy in frequency bands, each (n, 1 + m // 160), for sounds (n, m)."""
    spectrum = torch.stft(
        sound,
        _WINDOW,
        _HOP,
        window=torch.hann_window(_WINDOW, device=sound.device),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs() ** 2
    hertz = torch.arange(power.shape[1], device=sound.device) * (SAMPLE_RATE / _WINDOW)
    return [power[:, (hertz >= low) & (hertz < high)].sum(1) for low, high in edges]


def _smooth(track: Tensor, sigma: float) -> Tensor:
    """Gaussian average over time of (n, t), `sigma` in samples of the track."""
    reach = int(3 * sigma) + 1
    offsets = torch.arange(-reach, reach + 1, device=track.device, dtype=track.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    padded = F.pad(track[:, None], (reach, reach), mode="replicate")
    return F.conv1d(padded, (kernel / kernel.sum())[None, None])[:, 0]


def _hold(track: Tensor, decay: float, reach: int) -> Tensor:
    """Follows rises at once and falls by `decay` a step: the largest of the decayed past."""
    powers = decay ** torch.arange(reach, -1, -1, device=track.device, dtype=track.dtype)
    past = F.pad(track, (reach, 0)).unfold(1, reach + 1, 1)
    return (past * powers).amax(-1)


def normalise(sound: Tensor) -> Tensor:
    """Sounds (n, m) scaled so that their spoken parts have the RMS `LEVEL`; silence stays."""
    frames = F.pad(sound, (0, -sound.shape[1] % SAMPLES_PER_FRAME)).unflatten(
        1, (-1, SAMPLES_PER_FRAME)
    )
    rms = frames.pow(2).mean(-1).sqrt()
    loud = torch.quantile(rms, 0.9, dim=1, keepdim=True)
    return torch.where(loud > 1e-5, sound * (LEVEL / loud.clamp(min=1e-5)), sound)


def mouth_tracks(sound: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Opening in [0, 1] and width in [-1, 1] of a mouth that says `sound`.

    Args:
        sound: (n, m) float32. The loudest parts of each sound open the mouth fully, so a sound
            should be long enough (a second or more) to hold some speech.
        frames: number of video frames; the tracks of a shorter sound end closed.

    Returns:
        opening and width, each (n, frames).
    """
    sound = F.pad(sound, (0, max(0, frames * SAMPLES_PER_FRAME - sound.shape[1])))
    voice, low, first, middle, high = _bands(
        sound, [(200, 3000), (200, 450), (500, 1100), (600, 1300), (1700, 5000)]
    )
    amplitude = voice.sqrt()
    reference = torch.quantile(amplitude, 0.93, dim=1, keepdim=True)
    # What is 34 dB below the loudest, or below hearing, is silence.
    loudness = amplitude / reference.clamp(min=1e-2)
    envelope = ((loudness - 0.04).clamp(min=0) / 0.96) ** 0.6
    envelope = _smooth(_hold(envelope, 0.86, 14), 2.0).clamp(0, 1)
    # /a/ has a high first formant, /i/ and /u/ a low one.
    openness = torch.sigmoid(1.5 * torch.log((first + 1e-6) / (low + 1e-6)))
    opening = envelope * (0.5 + 0.5 * _smooth(openness, 3.0))
    spoken = envelope / (envelope + 0.08)

    balance = torch.log((high + 1e-6) / (middle + 1e-6))
    weight = spoken.sum(1, keepdim=True).clamp(min=1e-3)
    usual = (balance * spoken).sum(1, keepdim=True) / weight
    spread = (((balance - usual) ** 2 * spoken).sum(1, keepdim=True) / weight).sqrt()
    width = torch.tanh((balance - usual) / spread.clamp(min=0.3)) * spoken
    width = _smooth(width, 4.0)

    steps = (torch.arange(frames, device=sound.device) + 0.5) * SAMPLES_PER_FRAME / _HOP
    steps = steps.round().long()
    return opening[:, steps].clamp(0, 1), width[:, steps].clamp(-1, 1)


@dataclass
class Speech:
    """n pieces of speech with mouth motion.

    Attributes:
        sound: (n, (frames + 2 * margin) * 640) float32.
        opening, width: (n, frames), for the frames between the margins.
    """

    sound: Tensor
    opening: Tensor
    width: Tensor


class SpeechSampler:
    """Draws random, varied pieces of given recordings, with the mouth motion of each.

    A piece is cut from several seconds of a recording played 0.8 to 1.25 times as fast, with
    parts silenced at times. The motion comes from that; noise, gain and colour of sound are
    added afterwards, so that they do not move the mouth.

    Args:
        sounds: recordings, each (m,) float32 at 16 kHz; drawn in proportion to their length.
        device: where the drawn pieces are made.
    """

    _SECONDS = 4.0

    def __init__(
        self, sounds: Sequence[Tensor], *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        if not sounds:
            raise ValueError("no sounds to draw from")
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        need = int(1.25 * self._SECONDS * SAMPLE_RATE) + 2
        # Short recordings are repeated, so that every start has enough sound after it.
        long = [s.repeat(1 + need // len(s)) if len(s) < need else s for s in sounds]
        self._tape = torch.cat([normalise(s[None])[0] for s in long]).to(self.device)
        lengths = torch.tensor([len(s) for s in long])
        self._first = torch.cumsum(lengths, 0) - lengths
        self._starts = (lengths - need).clamp(min=1)

    def _uniform(self, n: int, low: float, high: float) -> Tensor:
        drawn = low + (high - low) * torch.rand(n, 1, generator=self._generator)
        return drawn.to(self.device)

    def _chance(self, n: int, chance: float) -> Tensor:
        return (torch.rand(n, 1, generator=self._generator) < chance).to(self.device)

    def batch(self, n: int, frames: int, *, margin: int = 0) -> Speech:
        """n pieces of `frames` video frames, with `margin` more frames of sound on each side."""
        total = (frames + 2 * margin) * SAMPLES_PER_FRAME
        length = int(self._SECONDS * SAMPLE_RATE)
        if total > length:
            raise ValueError(
                f"{frames} frames with a margin of {margin} are longer than {self._SECONDS} s"
            )
        which = torch.multinomial(self._starts.float(), n, True, generator=self._generator)
        offset = (torch.rand(n, generator=self._generator) * self._starts[which]).long()
        first = (self._first[which] + offset).to(self.device)
        speed = self._uniform(n, 0.8, 1.25)
        where = torch.arange(length, device=self.device) * speed
        whole = where.long()
        index = first[:, None] + whole
        part = where - whole
        clean = self._tape[index] * (1 - part) + self._tape[index + 1] * part
        clean = normalise(self._silence(clean))

        opening, width = mouth_tracks(clean, length // SAMPLES_PER_FRAME)
        slack = (length - total) // SAMPLES_PER_FRAME
        begin = torch.randint(slack + 1, (n, 1), generator=self._generator).to(self.device)
        inner = begin + margin + torch.arange(frames, device=self.device)
        outer = begin * SAMPLES_PER_FRAME + torch.arange(total, device=self.device)
        sound = self._colour(clean.gather(1, outer))
        return Speech(sound, opening.gather(1, inner), width.gather(1, inner))

    def _silence(self, sound: Tensor) -> Tensor:
        """Sounds (n, m) in which, at times, a stretch of 0.2 to 1 s is silent."""
        n, length = sound.shape
        time = torch.arange(length, device=self.device) / SAMPLE_RATE
        for _ in range(2):
            centre = self._uniform(n, 0, length / SAMPLE_RATE)
            half = self._uniform(n, 0.1, 0.5)
            kept = (((time - centre).abs() - half) / 0.02).clamp(0, 1)
            sound = torch.where(self._chance(n, 0.4), sound * kept, sound)
        return sound

    def _colour(self, sound: Tensor) -> Tensor:
        """Adds what a microphone and a room add: tilt of the spectrum, noise, gain."""
        n, length = sound.shape
        hertz = torch.fft.rfftfreq(length, 1 / SAMPLE_RATE).to(self.device)
        tilt = self._uniform(n, -0.5, 0.5)
        sound = torch.fft.irfft(
            torch.fft.rfft(sound) * (hertz.clamp(min=60) / 1000) ** tilt, n=length
        )
        hiss = torch.randn(n, length, generator=self._generator).to(self.device)
        loud = 10 ** (self._uniform(n, -45, -18) / 20) * LEVEL
        sound = sound + torch.where(self._chance(n, 0.6), loud, 0.0) * hiss
        return (sound * 10 ** (self._uniform(n, -6, 6) / 20)).clamp(-1, 1)


def speak(text: str, *, voice: str = "en-us", speed: int = 160, pitch: int = 50) -> Tensor:
    """Text spoken by the program espeak-ng: (m,) float32 at 16 kHz.

    Args:
        voice: an espeak-ng voice with an optional variant, such as ``en-gb+f3``.
        speed: words a minute.
        pitch: 0 to 99.

    Raises:
        RuntimeError: espeak-ng is not installed, or does not know the voice.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError("espeak-ng is not installed; try: apt-get install espeak-ng")
    command = [program, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"espeak-ng -v {voice}: {done.stderr.decode().strip()}")
    with wave.open(io.BytesIO(done.stdout)) as file:
        rate = file.getframerate()
        # The header of a piped file promises more samples than follow.
        data = file.readframes(len(done.stdout) // 2)
    sound = torch.from_numpy(np.frombuffer(data, np.int16).astype(np.float32) / 32768)
    return resample(sound, rate, SAMPLE_RATE)


def resample(sound: Tensor, rate: int, new_rate: int) -> Tensor:
    """(m,) at `rate` to (round(m * new_rate / rate),) at `new_rate`, by its Fourier transform."""
    length = round(len(sound) * new_rate / rate)
    spectrum = torch.fft.rfft(sound)
    bins = length // 2 + 1
    spectrum = F.pad(spectrum, (0, max(0, bins - len(spectrum))))[:bins]
    resampled: Tensor = torch.fft.irfft(spectrum, n=length) * (new_rate / rate)
    return resampled
