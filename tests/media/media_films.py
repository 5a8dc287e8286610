"""Small films made on the spot, whose frames carry their own number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BLOCK = 16
BITS = 8
Film = Callable[..., Path]


def numbered_picture(number: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: the number in black and white blocks over a moving pattern."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack(
        [(2 * rows + 5 * number) % 256, (columns + rows) % 256, (3 * columns) % 256], axis=-1
    ).astype(np.uint8)
    for bit in range(BITS):
        level = 235 if number >> bit & 1 else 20
        picture[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = level
    return picture


def read_number(picture: np.ndarray) -> int:
    """The number that a picture made by `numbered_picture` carries."""
    blocks = picture[: BLOCK - 2, : BITS * BLOCK].reshape(BLOCK - 2, BITS, BLOCK, 3)
    bright = blocks[2:, :, 3:-3].mean(axis=(0, 2, 3)) > 128
    return int(sum(1 << bit for bit, on in enumerate(bright) if on))


def film_maker(folder: Path) -> Film:
    """A function that writes a film of numbered pictures into a folder and returns its path."""

    def make(
        frames: int = 20,
        *,
        name: str = "film.mp4",
        size: tuple[int, int] = (128, 64),
        fps: int = 25,
        times: Sequence[Fraction] | None = None,
        codec: str = "libx264",
        options: dict[str, str] | None = None,
        rotation: int = 0,
        sound: np.ndarray | None = None,
        sound_rate: int = 48_000,
        sound_delay: Fraction = Fraction(0),
        lossless: bool = False,
    ) -> Path:
        path = folder / name
        clock = Fraction(1, 12_800 if times is not None else fps)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(
                codec, rate=fps, options=options or ({"crf": "0"} if lossless else {"crf": "10"})
            )
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.codec_context.time_base = clock
            if rotation:
                stream.set_display_rotation(rotation)
            voice = None
            if sound is not None:
                voice = container.add_stream("aac", rate=sound_rate, layout="mono")
            for number in range(frames):
                picture = numbered_picture(number, *size)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                time = times[number] if times is not None else Fraction(number, fps)
                frame.time_base, frame.pts = clock, round(time / clock)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if voice is not None and sound is not None:
                block = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(sound[None]), format="fltp", layout="mono"
                )
                block.sample_rate = sound_rate
                block.time_base = Fraction(1, sound_rate)
                block.pts = round(sound_delay * sound_rate)
                container.mux(voice.encode(block))
                container.mux(voice.encode(None))
        return path

    return make


def sweep(seconds: float, rate: int) -> np.ndarray:
    """A sine that rises from 200 to 2000 Hz, float32: every moment of it sounds different."""
    time = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (200 * time + 900 * time**2 / max(seconds, 1e-9))
    return (0.5 * np.sin(phase)).astype(np.float32)


def lag(heard: np.ndarray, played: np.ndarray) -> int:
    """By how many samples `heard` comes later than `played`."""
    size = len(heard) + len(played)
    spectrum = np.fft.rfft(heard, size) * np.conj(np.fft.rfft(played, size))
    best = int(np.argmax(np.fft.irfft(spectrum, size)))
    return best if best < size // 2 else best - size
