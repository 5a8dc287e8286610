"""Runs a pipeline with options on a clip and compares it with its unoptimised run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lsync_compile
from lsync_compile.quality.compare import REFERENCE, Clip
from lsync_compile.quality.runs import Pipeline, Progress, Run, Setting, collect
from lsync_compile.quality.scores import mouth_region, score
from lsync_compile.tune.search import Measured


class Bench:
    """Measures options on the first part of a clip and confirms them on the rest.

    The unoptimised run, of both parts, is made when it is first needed.

    Args:
        pipeline: plain.
        clip: what to sync.
        max_frames: to choose by.
        held_out: frames after those to confirm on; of a clip that is too short, its last third.
        num_frames: a chunk.
        steps: of a chunk.
        lowering: ``inductor`` or ``eager``.
        progress: for a name, what to call with the denoising steps done and their total.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        clip: Clip,
        *,
        max_frames: int,
        held_out: int = 0,
        num_frames: int = 16,
        steps: int = 20,
        lowering: str,
        progress: Callable[[str], Progress] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._clip = clip
        self._chunk = num_frames
        self._wanted = _whole(max_frames, num_frames), _whole(held_out, num_frames)
        self._shared: dict[str, Any] = {"num_frames": num_frames, "steps": steps}
        self._lowering = lowering
        self._progress = progress
        self._undo: Callable[[], Any] | None = None
        self._reference: Run | None = None

    @property
    def reference(self) -> Run:
        """The unoptimised run."""
        if self._reference is None:
            setting = Setting(REFERENCE.name, **self._shared)
            self._reference = self._run(self._pipeline, setting, None, sum(self._wanted))
        return self._reference

    @property
    def tuned(self) -> int:
        """Frames that options are chosen by: the first ones; the others of the run are held out."""
        wanted, held_out = self._wanted
        there = len(self.reference)
        if not held_out or there >= wanted + self._chunk:
            return min(wanted, there)
        two_thirds = there * 2 // 3 // self._chunk * self._chunk
        return two_thirds or there

    @property
    def held_out(self) -> int:
        """Frames to confirm on."""
        return len(self.reference) - self.tuned

    def unoptimised(self) -> Measured:
        """The reference itself."""
        run = self.reference
        return Measured(math.inf, 1.0, 0.0, run.frames_per_second, run.speed_error)

    def measure(self, name: str, options: dict[str, Any]) -> Measured:
        """Run the first part of the clip with options.

        Raises:
            LsyncError: whatever the pipeline raises.
        """
        whole = self.reference
        return self._compared(name, options, whole.part(0, self.tuned), 0)

    def confirm(self, name: str, options: dict[str, Any]) -> Measured:
        """Run the whole clip with options and compare the part that was held out.

        Raises:
            LsyncError: whatever the pipeline raises.
        """
        return self._compared(name, options, self.reference, self.tuned)

    def close(self) -> None:
        """Leave the pipeline as it was."""
        if self._undo is not None:
            self._undo()

    def _compared(self, name: str, options: dict[str, Any], reference: Run, start: int) -> Measured:
        """The run of as many frames as the reference has, compared from one of them on."""
        full = {**options, "lowering": self._lowering}
        # Not undone in between: what differs in options of the runtime alone is not compiled anew.
        compiled: Any = lsync_compile.compile(self._pipeline, **full)
        self._undo = compiled.lsync.undo
        stop = len(reference)
        setting = Setting(name, options=full, **self._shared)
        run = self._run(compiled, setting, reference, stop).part(start, stop)
        scores = score(run.synced, reference.part(start, stop).synced, **mouth_region(run))
        return Measured(
            psnr=scores.psnr.value,
            ssim=scores.ssim.value,
            flicker=scores.flicker.value,
            fps=run.frames_per_second,
            fps_error=run.speed_error,
        )

    def _run(self, pipeline: Pipeline, setting: Setting, beside: Run | None, frames: int) -> Run:
        return collect(
            pipeline,
            self._clip.video,
            self._clip.audio,
            setting,
            max_frames=frames,
            beside=beside,
            progress=self._progress(setting.name) if self._progress else None,
        )


def _whole(frames: int, chunk: int) -> int:
    """Frames rounded up to whole chunks."""
    return -(-frames // chunk) * chunk
