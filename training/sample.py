"""Makes the bundled sample: a talking clip with its own sound, and another speech to sync it to.

    pip download --no-deps scikit-image
    python -m training.sample --portrait scikit_image-*.whl

Needs the program espeak-ng. The portrait of Eileen Collins (NASA, public domain) is read out of
scikit-image's wheel, or from an image file. The result is the same each time with the same
versions of espeak-ng and of the encoders.
"""

from __future__ import annotations

import argparse
import wave
import zipfile
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lsync_compile.media.video import VideoWriter
from training.portrait import animate_portrait
from training.speech import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    mouth_tracks,
    normalise,
    speak,
)

FRAMES = 50
SPEECH_FRAMES = 48  # whole chunks of 16: a short one would be compiled for itself
SIZE = (384, 480)
SEED = 7
FOLDER = Path(__file__).resolve().parents[1] / "src/lsync_compile/assets/sample"
IN_WHEEL = "skimage/data/astronaut.png"

# What the portrait says in the clip, and what it can be made to say.
OWN_WORDS = {"text": "Good morning. Far above us, a new star is calling.", "voice": "en-us+f3"}
OTHER_WORDS = {"text": "Home, at last! Tomorrow we move to the mountains.", "voice": "en-gb+f2"}


def load_portrait(path: Path) -> NDArray[np.uint8]:
    """(512, 512, 3) uint8 RGB from an image file, or from scikit-image's wheel."""
    data = path.read_bytes()
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            data = wheel.read(IN_WHEEL)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise SystemExit(f"{path}: not an image")
    return np.ascontiguousarray(image[..., ::-1])


def say(words: dict[str, str], *, frames: int) -> Tensor:
    """Words spoken in exactly `frames` video frames: (frames * 640,) float32.

    The rate of speech is raised until they fit; a rest is left silent.
    """
    room = frames * SAMPLES_PER_FRAME
    for speed in range(130, 300, 5):
        sound = trim(speak(**words, speed=speed, pitch=55))
        if len(sound) <= room - SAMPLES_PER_FRAME:
            lead = (room - len(sound)) // 2
            padded = sound.new_zeros(room)
            padded[lead : lead + len(sound)] = sound
            return normalise(padded[None])[0]
    raise SystemExit(f"too many words for {frames} frames: {words['text']}")


def trim(sound: Tensor) -> Tensor:
    """`sound` without the silence at its ends."""
    loud = (sound.abs() > 0.005).nonzero()[:, 0]
    return sound[int(loud[0]) : int(loud[-1]) + 1]


def write_wave(path: Path, sound: Tensor) -> None:
    """16-bit mono WAV at 16 kHz."""
    pcm = (sound.clamp(-1, 1) * 32767).round().numpy().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(pcm.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--portrait", type=Path, required=True, help="scikit-image wheel or image")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    portrait = load_portrait(args.portrait)
    own, other = say(OWN_WORDS, frames=FRAMES), say(OTHER_WORDS, frames=SPEECH_FRAMES)
    opening, width = mouth_tracks(own[None], FRAMES)
    frames = animate_portrait(portrait, opening[0].numpy(), width[0].numpy(), size=SIZE, seed=SEED)
    with VideoWriter(args.out / "talking.mp4", *SIZE, audio=own.numpy(), crf=17) as clip:
        for frame in frames:
            clip.write(frame)
    write_wave(args.out / "speech.wav", other)
    for name in ("talking.mp4", "speech.wav"):
        print(f"{args.out / name}: {(args.out / name).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
