"""Does the measure of lip sync see real speech?

    python benchmarks/sync_measure.py clip1.mp4 clip2.mp4

Aligns the faces of talking clips as the pipeline does and correlates the opening of the mouth with
the clip's own sound: as `lsync_compile.quality.sync` does it, with a plainer measure of opening
(mean darkness of the mouth) and in other bands of sound; then with the next clip's speech, and with
the own sound moved by a few frames, which has to be found where it was moved to. No model is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, write_results
from rich.progress import track

from lsync_compile.media.audio import load_audio
from lsync_compile.media.mtcnn import MtcnnDetector
from lsync_compile.media.tracking import FaceTracker, read_chunks
from lsync_compile.media.video import count_frames
from lsync_compile.quality.sync import (
    SPEECH_BAND,
    Array,
    measure_sync,
    mouth_opening,
    sound_energy,
)

RESOLUTION, FPS, SAMPLE_RATE = 256, 25, 16000
BANDS = ((50.0, 7900.0), (250.0, 3500.0), (500.0, 3000.0), SPEECH_BAND, (1500.0, 3500.0))
SHIFTS = (2, 5)  # frames
PIECE = 5 * FPS
MOUTH = (slice(144, 202), slice(95, 149))  # rows and columns of an aligned face of 256 pixels


def openings(video: Path) -> dict[str, Array]:
    """Opening in each frame of a clip by two measures; faces are aligned as in the pipeline."""
    count = count_frames(video, FPS)
    tracker = FaceTracker(MtcnnDetector(), RESOLUTION)
    chunks = read_chunks(video, count, 16, FPS, tracker)
    total = -(-count // 16)
    faces = [
        chunk.faces.float() / 255
        for chunk in track(chunks, f"aligning {video.name}", total=total)
        if chunk.faces is not None
    ]
    clip = torch.cat(faces)
    rows, columns = MOUTH
    dark = -clip[:, :, rows, columns].mean(dim=(1, 2, 3)).double().numpy()
    return {"darkness and lip centre": mouth_opening(clip), "mean darkness": dark}


def row(clip: str, question: str, opening: Array, energy: Array, **more: Any) -> dict[str, Any]:
    found = measure_sync(opening, energy, fps=FPS)
    return {"clip": clip, "question": question, **more, **found.to_dict()}


def rows_of(clip: Path, opened: dict[str, Array], sound: Array, other: Array) -> list[dict]:
    """All rows of one clip. sound, other: samples at 16 kHz."""
    opening = opened["darkness and lip centre"]
    frames = len(opening)

    def level(samples: Array, **given: Any) -> Array:
        return sound_energy(samples, frames, sample_rate=SAMPLE_RATE, fps=FPS, **given)

    own = level(sound)
    rows = [row(clip.name, "own sound", each, own, measure=name) for name, each in opened.items()]
    rows += [row(clip.name, "band", opening, level(sound, band=band), band=band) for band in BANDS]
    repeated = np.tile(other, -(-len(sound) // len(other)))
    rows.append(row(clip.name, "another's speech", opening, level(repeated)))
    for shift in SHIFTS:
        rows.append(row(clip.name, "moved", opening, np.roll(own, -shift), frames=shift))
    for start in range(0, frames - PIECE + 1, PIECE):
        here = slice(start, start + PIECE)
        rows.append(row(clip.name, "5 seconds", opening[here], own[here], start=start))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, nargs="+", help="talking clips with their own sound")
    parser.add_argument("--out", type=Path, default=RESULTS / "sync_measure.json")
    arguments = parser.parse_args()
    opened = [openings(clip) for clip in arguments.clips]
    sounds = [load_audio(clip, sample_rate=SAMPLE_RATE) for clip in arguments.clips]
    rows = []
    for index, clip in enumerate(arguments.clips):
        other = sounds[(index + 1) % len(sounds)]
        rows += rows_of(clip, opened[index], sounds[index], other)
    for each in rows:
        kind = each.get("measure") or each.get("band") or each.get("frames") or each.get("start")
        print(
            f"{each['clip']:20s} {each['question']:18s} {'' if kind is None else kind!s:24s} "
            f"{each['correlation']:.2f}, {each['best']:.2f} at {each['offset']} "
            f"(chance {each['chance'] if each['chance'] is None else round(each['chance'], 2)})"
        )
    write_results(arguments.out, __doc__.splitlines()[0], torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
