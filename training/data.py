"""Reads the folder that `training.prepare` makes.

Needs numpy, torch and one of OpenCV and Pillow: the machine that trains may have little else.

The folder holds `manifest.json`, and for each clip its frames (JPEG files one after another in an
`.npz`) and its sound (`.npz`, 16-bit); speech without pictures is kept the same way.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MANIFEST = "manifest.json"
VERSION = 1


@dataclass
class Clip:
    """A run of aligned faces of one person with the sound that belongs to them.

    Attributes:
        name: such as ``demo2/1``: the second part of that recording in which a face shows.
        kind: ``real`` or ``portrait`` (an animated photograph).
        frames: (n, 3, 256, 256) uint8 RGB, 25 a second.
        sound: (n * 640,) float32 at 16 kHz.
        train_frames: frames that may be trained on.
        heldout: frames kept for evaluation: those from the last fifth of a real recording.
    """

    name: str
    kind: str
    frames: Tensor
    sound: Tensor
    train_frames: range
    heldout: range


class TrainingData:
    """All clips and all speech of a prepared folder, in memory.

    Args:
        folder: made by `training.prepare`.

    Attributes:
        clips: the clips, real ones first.
        speech: name -> (m,) float32 at 16 kHz: voices that drive drawn people.

    Raises:
        FileNotFoundError: there is no manifest in the folder.
        ValueError: the manifest is of another version.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            raise ValueError(
                f"{folder}: version {manifest['version']}, not {VERSION}; run training.prepare"
            )
        self.clips = [
            Clip(
                name=entry["name"],
                kind=entry["kind"],
                frames=read_pictures(folder / entry["frames"]),
                sound=read_sound(folder / entry["sound"]),
                train_frames=range(*entry["train"]),
                heldout=range(*entry["heldout"]),
            )
            for entry in manifest["clips"]
        ]
        self.speech = {
            entry["name"]: read_sound(folder / entry["sound"]) for entry in manifest["speech"]
        }

    def __str__(self) -> str:
        frames = {
            kind: sum(len(c.frames) for c in self.clips if c.kind == kind)
            for kind in ("real", "portrait")
        }
        heldout = sum(len(c.heldout) for c in self.clips)
        seconds = sum(len(s) for s in self.speech.values()) / 16000
        return (
            f"{frames['real']} real frames ({heldout} held out), "
            f"{frames['portrait']} of portraits, {seconds:.0f} s of speech"
        )


def write_pictures(path: Path, pictures: list[bytes]) -> None:
    """Stores encoded pictures one after another."""
    ends = np.cumsum([len(p) for p in pictures])
    np.savez(path, data=np.frombuffer(b"".join(pictures), np.uint8), ends=ends)


def read_pictures(path: Path) -> Tensor:
    """(n, 3, H, W) uint8 RGB."""
    with np.load(path) as stored:
        data, ends = stored["data"], stored["ends"]
    decode = _decoder()
    starts = np.concatenate([[0], ends[:-1]])
    pictures = [decode(data[a:b]) for a, b in zip(starts, ends, strict=True)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def write_sound(path: Path, sound: Tensor) -> None:
    """Stores (m,) float32 in [-1, 1] as 16-bit numbers."""
    np.savez(path, pcm=(sound.clamp(-1, 1) * 32767).round().numpy().astype(np.int16))


def read_sound(path: Path) -> Tensor:
    """(m,) float32 in [-1, 1]."""
    with np.load(path) as stored:
        return torch.from_numpy(stored["pcm"].astype(np.float32) / 32767)


def _decoder() -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """A function from JPEG bytes to (H, W, 3) uint8 RGB, with what is installed."""
    if importlib.util.find_spec("cv2"):
        import cv2

        return lambda data: np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB), np.uint8)
    from PIL import Image

    return lambda data: np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
