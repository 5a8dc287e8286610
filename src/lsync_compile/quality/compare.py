"""Judging runs of a pipeline by its unoptimised run, and by the clip itself.

Every figure is taken before the video codec: aligned faces as the model decoded them, and finished
frames as they went to the encoder. The mouth region is the part of the aligned face that the model
generates; the full frame is shown beside it but flatters, as most of it is the original.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lsync_compile
from lsync_compile.media.audio import load_audio
from lsync_compile.quality.floors import Floor
from lsync_compile.quality.footage import Footage
from lsync_compile.quality.runs import FPS, SAMPLE_RATE, Pipeline, Progress, Run, Setting, collect
from lsync_compile.quality.scores import Scores, compare_runs, mouth_region, score
from lsync_compile.quality.sync import Array, Sync, measure_sync, mouth_opening, sound_energy

REFERENCE = Setting("reference")
REGIONS = ("mouth", "frame")


@dataclass(frozen=True)
class Clip:
    """What is synced.

    Attributes:
        video: the file.
        audio: the speech; None is the clip's own, and then the original frames are the truth.
    """

    video: Path
    audio: Path | None = None

    @property
    def has_truth(self) -> bool:
        """Whether the original frames show what was said."""
        return self.audio is None


@dataclass(frozen=True)
class Result:
    """One setting on one clip.

    Attributes:
        setting: how it was run.
        frames: how many.
        seconds: wall time of all chunks, reading and pasting back included.
        frames_per_second: of a typical chunk.
        against_reference: region to scores; empty for the reference itself.
        against_original: region to scores; empty unless the sound is the clip's own.
        sync: how the generated mouth follows the sound.
        opening: (F,) of the generated mouth.
    """

    setting: Setting
    frames: int
    seconds: float
    frames_per_second: float
    against_reference: dict[str, Scores]
    against_original: dict[str, Scores]
    sync: Sync
    opening: Array

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "setting": self.setting.to_dict(),
            "frames": self.frames,
            "seconds": round(self.seconds, 3),
            "frames_per_second": round(self.frames_per_second, 3),
            "against_reference": _scores_dict(self.against_reference),
            "against_original": _scores_dict(self.against_original),
            "sync": self.sync.to_dict(),
            "opening": [round(float(value), 5) for value in self.opening],
        }


@dataclass(frozen=True)
class Study:
    """A reference and candidates on one clip.

    Attributes:
        clip: what was synced.
        reference: the unoptimised run.
        candidates: the others, in the order in which they were asked for.
        original_sync: how the mouth of the clip itself follows the sound.
        original_opening: (F,) of the clip's own mouth.
        energy: (F,) of the sound.
        floors: noise floors of the reference, where they were asked for.
        frames_without_face: left out of every figure of the mouth region.
        machine: device, versions and date.
    """

    clip: Clip
    reference: Result
    candidates: list[Result]
    original_sync: Sync
    original_opening: Array
    energy: Array
    floors: list[Floor]
    frames_without_face: int
    machine: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "video": str(self.clip.video),
            "audio": None if self.clip.audio is None else str(self.clip.audio),
            "machine": self.machine,
            "frames_without_face": self.frames_without_face,
            "original_sync": self.original_sync.to_dict(),
            "reference": self.reference.to_dict(),
            "floors": [floor.to_dict() for floor in self.floors],
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


def compare(
    pipeline: Pipeline,
    clip: Clip,
    candidates: Iterable[Setting],
    *,
    reference: Setting = REFERENCE,
    prepare: Callable[[Pipeline, Setting], Pipeline] | None = None,
    measure_floors: Callable[[Run], list[Floor]] | None = None,
    max_frames: int | None = None,
    progress: Callable[[Setting], Progress] | None = None,
    keep: Callable[[Run], None] | None = None,
) -> Study:
    """Run the reference and each candidate on the same inputs with the same noise, and measure.

    Args:
        pipeline: the plain pipeline; the reference is run first.
        clip: what to sync.
        candidates: the settings to judge.
        reference: the setting to judge by.
        prepare: gives the pipeline to run a candidate with, such as a compiled one; the plain
            pipeline for None.
        measure_floors: called with the reference's run, before anything is compiled.
        max_frames: stop each run after so many frames.
        progress: for a setting, what to call with the denoising steps done and their total.
        keep: called with each run while its pictures exist, the reference's first.

    Raises:
        NoFaceError: no frame shows a face.
        LsyncError: whatever the pipeline raises.
    """

    def run(pipe: Pipeline, setting: Setting, beside: Run | None) -> Run:
        made = collect(
            pipe,
            clip.video,
            clip.audio,
            setting,
            max_frames=max_frames,
            beside=beside,
            progress=progress(setting) if progress else None,
        )
        if keep is not None:
            keep(made)
        return made

    base = run(pipeline, reference, None)
    energy = clip_energy(clip, len(base))
    floors = measure_floors(base) if measure_floors else []
    results = []
    for setting in candidates:
        made = run(prepare(pipeline, setting) if prepare else pipeline, setting, base)
        results.append(judge(made, clip, energy, base))
    own_opening = opening_of(base.faces, base.has_face)
    return Study(
        clip=clip,
        reference=judge(base, clip, energy),
        candidates=results,
        original_sync=measure_sync(own_opening, energy),
        original_opening=own_opening,
        energy=energy,
        floors=floors,
        frames_without_face=base.has_face.count(False),
        machine=describe_machine(pipeline),
    )


class Compiler:
    """Gives `compare` the pipeline for each setting: compiled with its options, or plain.

    Compiling works in place, so each setting starts from the pipeline as it was.
    """

    def __init__(self) -> None:
        self._undo: Callable[[], Any] | None = None

    def __call__(self, pipeline: Pipeline, setting: Setting) -> Pipeline:
        """The pipeline to run a setting with."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        if setting.options is None:
            return pipeline
        compiled: Any = lsync_compile.compile(pipeline, **setting.options)
        self._undo = compiled.lsync.undo
        result: Pipeline = compiled
        return result


def judge(run: Run, clip: Clip, energy: Array, reference: Run | None = None) -> Result:
    """Measure a run against the reference, if there is one, and the truth, if there is one.

    Args:
        run: what is judged.
        clip: what it was made from.
        energy: (F,) of the sound.
        reference: the unoptimised run.
    """
    against_reference = {} if reference is None else compare_runs(run, reference)
    against_original = {}
    if clip.has_truth:
        against_original = {
            "mouth": score(run.synced, run.faces, **mouth_region(run)),
            "frame": score(run.frames, run.originals, starts=run.starts),
        }
    opening = opening_of(run.synced, run.has_face)
    return Result(
        setting=run.setting,
        frames=len(run),
        seconds=run.seconds,
        frames_per_second=run.frames_per_second,
        against_reference=against_reference,
        against_original=against_original,
        sync=measure_sync(opening, energy),
        opening=opening,
    )


def clip_energy(clip: Clip, frames: int) -> Array:
    """Level of the sound at each frame, see `sound_energy`."""
    samples = load_audio(clip.audio or clip.video, sample_rate=SAMPLE_RATE)
    return sound_energy(samples, frames, sample_rate=SAMPLE_RATE, fps=FPS)


def opening_of(faces: Footage, has_face: list[bool]) -> Array:
    """Mouth opening of each frame; one without a face takes that of the frame before it."""
    opening = mouth_opening(faces.pieces())
    last = opening[has_face.index(True)] if any(has_face) else 0.0
    for index, there in enumerate(has_face):
        last = opening[index] if there else last
        opening[index] = last
    return opening


def describe_machine(pipeline: Any = None) -> dict[str, str]:
    """Device, versions and the date, for tables and JSON."""
    device = torch.device(getattr(pipeline, "device", "cpu"))
    unet = getattr(pipeline, "unet", None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "dtype": str(getattr(unet, "dtype", "unknown")).removeprefix("torch."),
        "lsync_compile": lsync_compile.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    cores = torch.get_num_threads()
    return f"CPU {platform.machine()}, {cores} thread{'s' if cores != 1 else ''}"


def _scores_dict(scores: dict[str, Scores]) -> dict[str, Any]:
    return {region: value.to_dict() for region, value in scores.items()}
