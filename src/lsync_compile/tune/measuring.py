"""Runs a pipeline with options on a clip and compares it with its unoptimised run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lsync_compile.quality.compare import REFERENCE, Clip, Compiler
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
        self._compiler = Compiler()
        self._reference: Run | None = None

    @property
    def reference(self) -> Run:
        """The unoptimised run."""
        if self._reference is None:
            setting = Setting(REFERENCE.name, **self._shared)
            self._reference = self._run(setting, None)
        return self._reference

    def measure(self, name: str, options: dict[str, Any]) -> Measured:
        """Run the clip with options.

        Raises:
            LsyncError: whatever the pipeline raises.
        """
        reference = self.reference
        full = {**options, "lowering": self._lowering}
        run = self._run(Setting(name, options=full, **self._shared), reference)
        scores = score(run.synced, reference.synced, **mouth_region(run))
        return Measured(
            psnr=scores.psnr.value,
            ssim=scores.ssim.value,
            flicker=scores.flicker.value,
            fps=run.frames_per_second,
        )

    def close(self) -> None:
        """Leave the pipeline as it was."""
        self._compiler(self._pipeline, REFERENCE)

    def _run(self, setting: Setting, beside: Run | None) -> Run:
        return collect(
            self._compiler(self._pipeline, setting),
            self._clip.video,
            self._clip.audio,
            setting,
            max_frames=self._max_frames,
            beside=beside,
            progress=self._progress(setting.name) if self._progress else None,
        )
