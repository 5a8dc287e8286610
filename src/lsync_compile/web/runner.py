"""Jobs one after the other, with models that are loaded once, watched and cancelled from outside.

Knows nothing of pages. One thread does all the work, so whoever asks second waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from lsync_compile.errors import Interrupted
from lsync_compile.media.audio import SoundReader
from lsync_compile.media.faces import Frame
from lsync_compile.media.video import probe
from lsync_compile.media.writer import VideoWriter
from lsync_compile.progress import WORTH_SAYING, Compiling, listening

FPS = 25  # frames/s that come out
_BESIDE_HEIGHT = 720  # pixels at most, of the original to compare with
_WINDOW = 20.0  # seconds of the past from which the time left is told
_SOONEST = 2.0  # seconds of progress before it is


@dataclass(frozen=True)
class Order:
    """What is to be done.

    Attributes:
        video: clip with one talking face.
        audio: speech; None for the clip's own sound.
        preset: "exact", "balanced" or "turbo".
        seed: of all random draws.
        steps: denoising steps a chunk.
        guidance: 1.0 switches it off.
    """

    video: Path
    audio: Path | None
    preset: str = "balanced"
    seed: int = 1247
    steps: int = 20
    guidance: float = 1.5


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        synced: the finished file.
        original: the same frames of the clip as they were, without sound, to compare with.
        frames: how many.
        missing: frames without a usable face, unchanged.
        seconds: wall time.
        times: seconds by kind of work, in the order of a chunk's way; overlapping work counts in
            each.
        notes: what the report remarks on.
        report: what was compiled and applied, in words.
    """

    synced: Path
    original: Path
    frames: int
    missing: int
    seconds: float
    times: dict[str, float]
    notes: list[str]
    report: str


@dataclass(frozen=True)
class Moment:
    """How far a job is.

    Attributes:
        ahead: jobs that have to end before it begins.
        doing: what is under way, in words; empty while frames are synced.
        share: of the work that is done, 0 to 1.
        left: seconds, None where that cannot be told yet.
    """

    ahead: int
    doing: str
    share: float
    left: float | None


class Job:
    """One order, from its place in the queue to its outcome."""

    def __init__(self, order: Order, folder: Path) -> None:
        self.order = order
        self.folder = folder
        self.future: Future[Outcome] = Future()
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._doing = ""
        self._done, self._total = 0, 0
        self._past: deque[tuple[float, int]] = deque()

    def cancel(self) -> None:
        """End it at its next step, or before it begins."""
        self._cancelled.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within this time."""
        return bool(wait([self.future], seconds).done)

    def check(self) -> None:
        """Called between pieces of work.

        Raises:
            Interrupted: it was cancelled.
        """
        if self._cancelled.is_set():
            raise Interrupted("cancelled; no output was made")

    def advance(self, done: int, total: int) -> None:
        """Called by the pipeline after each denoising step.

        Raises:
            Interrupted: the job was cancelled.
        """
        self.check()
        now = time.monotonic()
        with self._lock:
            self._done, self._total = done, total
            self._past.append((now, done))
            while now - self._past[0][0] > _WINDOW and len(self._past) > 2:
                self._past.popleft()

    def hear(self, compiling: Compiling, seconds: float | None) -> None:
        """Called when the compilation of a graph begins, and when it has ended."""
        self.check()
        waiting = seconds is None and compiling.typical_seconds >= WORTH_SAYING
        news = f"Compiling {compiling.name}, {compiling.typically} or less" if waiting else ""
        with self._lock:
            self._doing = news
            if seconds is not None:
                self._past.clear()  # what it took says nothing of what comes

    def moment(self, ahead: int = 0) -> Moment:
        """How far it is now."""
        with self._lock:
            share = self._done / self._total if self._total else 0.0
            return Moment(
                ahead, self._doing or "Preparing" * (not self._total), share, self._left()
            )

    def _left(self) -> float | None:
        if len(self._past) < 2:
            return None
        (first, before), (last, done) = self._past[0], self._past[-1]
        if last - first < _SOONEST or done == before:
            return None
        rate = (done - before) / (last - first)
        return max(0.0, (self._total - done) / rate - (time.monotonic() - last))


class Runner:
    """Does the jobs.

    Args:
        compiled: gives the pipeline, compiled with the options of a preset.
    """

    def __init__(self, compiled: Callable[[str], Any]) -> None:
        self._compiled = compiled
        self._worker = ThreadPoolExecutor(1, "lsync-web")
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, who: str, order: Order, folder: Path) -> Job:
        """Queue an order; an earlier one of the same person is cancelled.

        Args:
            who: the person.
            order: what to do.
            folder: where to put the files; cleared up by the caller.
        """
        job = Job(order, folder)
        with self._lock:
            if who in self._jobs:
                self._jobs.pop(who).cancel()
            self._jobs[who] = job
        job.future = self._worker.submit(self._carry_out, job)
        job.future.add_done_callback(lambda future: self._forget(who, job))
        return job

    def moment(self, job: Job) -> Moment:
        """How far a job is, with those before it."""
        with self._lock:
            others = list(self._jobs.values())
        return job.moment(others.index(job) if job in others else 0)

    def cancel(self, who: str) -> None:
        """Cancel a person's job, if there is one."""
        with self._lock:
            job = self._jobs.get(who)
        if job is not None:
            job.cancel()

    def close(self) -> None:
        """Cancel everything and wait for the thread."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        self._worker.shutdown(wait=True)

    def _forget(self, who: str, job: Job) -> None:
        with self._lock:
            if self._jobs.get(who) is job:
                del self._jobs[who]

    def _carry_out(self, job: Job) -> Outcome:
        job.check()
        order, begin = job.order, time.perf_counter()
        with listening(job.hear):
            pipeline = self._compiled(order.preset)
            earlier = pipeline.lsync.report().times
            synced = job.folder / f"{order.video.stem}_synced.mp4"
            original = job.folder / f"{order.video.stem}_original.mp4"
            info = probe(order.video)
            small = _beside_size(info.width, info.height)
            look: dict[str, Any] = {
                "fps": FPS,
                "colour": info.colour,
                "pixel_aspect": info.pixel_aspect,
            }
            chunks = pipeline.synthesize(
                order.video,
                order.audio,
                video_fps=FPS,
                num_inference_steps=order.steps,
                guidance_scale=order.guidance,
                generator=torch.Generator(pipeline.device).manual_seed(order.seed),
                progress=job.advance,
            )
            missing = 0
            with (
                VideoWriter(
                    synced,
                    info.width,
                    info.height,
                    audio=SoundReader(order.audio or order.video),
                    **look,
                ) as writer,
                VideoWriter(original, *small, crf=22, preset="veryfast", **look) as beside,
            ):
                for chunk in chunks:
                    job.check()
                    missing += chunk.has_face.count(False)
                    for frame, before in zip(chunk.frames, chunk.original, strict=True):
                        writer.write(frame)
                        beside.write(_shrunk(before, small))
        report = pipeline.lsync.report()
        return Outcome(
            synced=synced,
            original=original,
            frames=writer.frames_written,
            missing=missing,
            seconds=time.perf_counter() - begin,
            times={
                work: record.seconds - (earlier[work].seconds if work in earlier else 0.0)
                for work, record in report.times.items()
            },
            notes=report.notes,
            report=str(report),
        )


def _beside_size(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, _BESIDE_HEIGHT / height)
    return max(2, round(width * scale)), max(2, round(height * scale))


def _shrunk(frame: Frame, size: tuple[int, int]) -> Frame:
    if frame.shape[1::-1] == size:
        return frame
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
