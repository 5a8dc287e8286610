"""Makes the data folder for training: aligned faces with their sound, and voices.

    python -m training.prepare --clips CLIP.mp4 CLIP2.mp4 --portrait scikit_image-*.whl --out .train

Real clips bring their own sound track. Of each, the last fifth of the frames is marked as held
out. The portrait is animated with voices that are neither of the two of the bundled sample. Needs
espeak-ng. The folder stays below 45 MiB, so that it can be carried to the machine that trains.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsync_compile.media.align import FaceAligner, crop_face
from lsync_compile.media.audio import load_audio
from lsync_compile.media.mtcnn import MtcnnDetector
from lsync_compile.media.video import read_frames
from training.data import MANIFEST, VERSION, TrainingData, write_pictures, write_sound
from training.portrait import animate_portrait
from training.sample import SIZE, load_portrait
from training.sentences import PITCHES, SENTENCES, SPEEDS, VARIANTS
from training.speech import FPS, SAMPLES_PER_FRAME, mouth_tracks, normalise, speak

RESOLUTION = 256
QUALITY = 95
HELDOUT = 0.2
# A run of faces shorter than this is of no use to a model that works on 16 frames at once.
SHORTEST = 24
# A jump of the mean colour between two frames by more than this (of 255) is a cut.
CUT = 30.0
LIMIT = 45 * 2**20

Image = NDArray[np.uint8]


@dataclass
class Run:
    """Consecutive frames of a recording that show a face: the first one's index, and the faces."""

    first: int
    faces: list[bytes] = field(default_factory=list)


def aligned_runs(frames: Iterable[Image], *, label: str) -> Iterator[Run]:
    """Runs of aligned faces; a frame without a face, or a cut, ends one."""
    detector, aligner = MtcnnDetector(), FaceAligner(RESOLUTION)
    run, previous, started = Run(0), None, time.monotonic()
    for index, frame in enumerate(frames):
        small = cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        cut = previous is not None and np.abs(small - previous).mean() > CUT
        previous = small
        face = detector.detect(frame)
        if face is None or cut:
            if len(run.faces) >= SHORTEST:
                yield run
            aligner.reset()
            run = Run(index)
        if face is None:
            run.first = index + 1
            continue
        crop = crop_face(frame, aligner.matrix(face.landmarks), RESOLUTION)
        _, data = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        run.faces.append(data.tobytes())
        if index % 50 == 0:
            print(f"{label}: frame {index}, {time.monotonic() - started:.0f} s", flush=True)
    if len(run.faces) >= SHORTEST:
        yield run


class Folder:
    """The data folder while it is made."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._manifest: dict[str, Any] = {
            "version": VERSION, "resolution": RESOLUTION, "fps": FPS, "clips": [], "speech": [],
        }  # fmt: skip

    def add_clip(self, name: str, kind: str, run: Run, sound: Tensor, kept_from: int) -> None:
        """A run with its recording's whole sound; frames from `kept_from` on are held out."""
        count = len(run.faces)
        begin = run.first * SAMPLES_PER_FRAME
        part = torch.nn.functional.pad(sound, (0, begin + count * SAMPLES_PER_FRAME))
        split = min(max(kept_from - run.first, 0), count)
        stem = name.replace("/", "_")
        write_pictures(self._path / f"{stem}.frames.npz", run.faces)
        write_sound(
            self._path / f"{stem}.sound.npz", part[begin : begin + count * SAMPLES_PER_FRAME]
        )
        self._manifest["clips"].append(
            {
                "name": name, "kind": kind, "first_frame": run.first, "count": count,
                "frames": f"{stem}.frames.npz", "sound": f"{stem}.sound.npz",
                "train": [0, split], "heldout": [split, count],
            }
        )  # fmt: skip

    def add_speech(self, name: str, sound: Tensor, origin: str) -> None:
        stem = f"speech_{name.replace('/', '_')}"
        write_sound(self._path / f"{stem}.npz", sound)
        self._manifest["speech"].append(
            {"name": name, "sound": f"{stem}.npz", "seconds": len(sound) / 16000, "origin": origin}
        )

    def close(self) -> None:
        text = json.dumps(self._manifest, indent=1)
        (self._path / MANIFEST).write_text(text + "\n")


def add_recording(folder: Folder, path: Path) -> None:
    """A real clip with its own sound; its trained part also serves as speech."""
    sound = torch.from_numpy(load_audio(path))
    total = sum(1 for _ in read_frames(path))
    kept_from = round((1 - HELDOUT) * total)
    name = path.stem.removesuffix("_video")
    for part, run in enumerate(aligned_runs(read_frames(path), label=name)):
        folder.add_clip(f"{name}/{part}", "real", run, sound, kept_from)
    trained = sound[: kept_from * SAMPLES_PER_FRAME]
    folder.add_speech(name, normalise(trained[None])[0], f"sound track, first {kept_from} frames")


def voices() -> Iterator[tuple[str, Tensor]]:
    """All sentences of each language; voice, speed and pitch change with every sentence.

    English, the largest part, is spoken twice, by other voices the second time.
    """
    variant, speed, pitch = cycle(VARIANTS), cycle(SPEEDS), cycle(PITCHES)
    for language, sentences in SENTENCES.items():
        said = [
            speak(text, voice=f"{language}+{next(variant)}", speed=next(speed), pitch=next(pitch))
            for text in sentences * (2 if language.startswith("en") else 1)
        ]
        levelled = [normalise(s[None])[0] for s in said]
        yield language, torch.cat(levelled)


def add_portrait(folder: Folder, portrait: Image, sounds: list[Tensor], *, seconds: float) -> None:
    """Pairs of takes: the same motion of the head, different words."""
    frames = int(seconds * FPS)
    for take, sound in enumerate(sounds):
        part = sound[: frames * SAMPLES_PER_FRAME]
        opening, width = mouth_tracks(part[None], frames)
        pictures = animate_portrait(
            portrait, opening[0].numpy(), width[0].numpy(), size=SIZE, seed=100 + take // 2
        )
        name = f"portrait/{take // 2}{'ab'[take % 2]}"
        for run in aligned_runs(pictures, label=name):
            folder.add_clip(name, "portrait", run, part, frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, nargs="*", default=[], help="talking clips")
    parser.add_argument("--portrait", type=Path, help="scikit-image wheel or image")
    parser.add_argument("--out", type=Path, default=Path(".train"))
    args = parser.parse_args()

    folder = Folder(args.out)
    spoken = dict(voices())
    for language, sound in spoken.items():
        folder.add_speech(f"espeak/{language}", sound, "espeak-ng")
    for clip in args.clips:
        add_recording(folder, clip)
    if args.portrait:
        said = [spoken[k] for k in ("en-us", "en-gb", "it", "es", "fr-fr", "de")]
        add_portrait(folder, load_portrait(args.portrait), said, seconds=4)
    folder.close()

    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 2**20:.1f} MiB; {TrainingData(args.out)}")
    if size > LIMIT:
        raise SystemExit(f"{args.out} is larger than {LIMIT >> 20} MiB")


if __name__ == "__main__":
    main()
