"""Runs a pipeline with options on a clip and compares it with its unoptimised run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lsync_compile
from lsync_compile.quality.compare import REFERENCE, Clip
from lsync_compile.quality.runs import Pipeline, Progress, Run, Setting, collect
from lsync_compile.quality.scores import mouth_region, score
from lsync_compile.tune.search import Measured


class Bench:
    """Measures options on one clip; the unoptimised run is made with the first.

    Args:
        pipeline: plain.
        clip: what to sync.
        max_frames: of it.
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
        num_frames: int = 16,
        steps: int = 20,
        lowering: str,
        progress: Callable[[str], Progress] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._clip = clip
        self._max_frames = max_frames
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
            self._reference = self._run(self._pipeline, setting, None)
        return self._reference

    def measure(self, name: str, options: dict[str, Any]) -> Measured:
        """Run the clip with options.

        Raises:
            LsyncError: whatever the pipeline raises.
        """
        reference = self.reference
        full = {**options, "lowering": self._lowering}
        # Not undone in between: what differs in options of the runtime alone is not compiled anew.
        compiled: Any = lsync_compile.compile(self._pipeline, **full)
        self._undo = compiled.lsync.undo
        run = self._run(compiled, Setting(name, options=full, **self._shared), reference)
        scores = score(run.synced, reference.synced, **mouth_region(run))
        return Measured(
            psnr=scores.psnr.value,
            ssim=scores.ssim.value,
            flicker=scores.flicker.value,
            fps=run.frames_per_second,
        )

    def close(self) -> None:
        """Leave the pipeline as it was."""
        if self._undo is not None:
            self._undo()

    def _run(self, pipeline: Pipeline, setting: Setting, beside: Run | None) -> Run:
        return collect(
            pipeline,
            self._clip.video,
            self._clip.audio,
            setting,
            max_frames=self._max_frames,
            beside=beside,
            progress=self._progress(setting.name) if self._progress else None,
        )
