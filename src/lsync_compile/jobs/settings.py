"""How clips are synced, as plain values that travel to other processes and machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lsync_compile.cores import fit_threads
from lsync_compile.devices import DType, choose_device, peak_device_mib
from lsync_compile.jobs.listing import ListedJob
from lsync_compile.loading import load_plain, usual_lowering

if TYPE_CHECKING:
    from lsync_compile.models.job import LipsyncOutput

log = logging.getLogger(__name__)

Advance = Callable[[int, int], None]  # called with the denoising steps done and their total


@dataclass(frozen=True)
class SyncSettings:
    """Which models, which options, which arguments: the same for all clips of a list.

    Attributes:
        checkpoint: "mini" or the folder of a LatentSync checkpoint.
        resolution: side of the face in pixels, for folders in which nothing says so.
        detector: "mtcnn" or "insightface".
        dtype: of the UNet and the VAE; None is float16 on a GPU and float32 on a CPU.
        options: of ``torch.compile(pipe, backend="lsync")``; None runs the plain pipeline. Without
            a lowering among them it is inductor on a GPU and eager on a CPU.
        measured_with: the conditions that the options were measured under, from
            :func:`lsync_compile.tune.configuration.read_conditions`; where they are not those of
            the run, the report and the log say so.
        seed: of all random draws of each clip, so that a clip does not depend on the others.
        arguments: further ones of the pipeline's call, such as ``num_inference_steps``.
    """

    checkpoint: str = "mini"
    resolution: int | None = None
    detector: str = "mtcnn"
    dtype: DType | None = None
    options: Mapping[str, Any] | None = field(default_factory=dict)
    measured_with: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1247
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self, device: str | None = None) -> Syncer:
        """Load the models onto a device, the first GPU or else the CPU for None.

        Raises:
            CheckpointError, OptionError: what cannot be loaded, or not with these options.
        """
        import torch

        place = choose_device(device)
        pipe = load_plain(
            self.checkpoint,
            place,
            dtype=self.dtype,
            detector=self.detector,
            resolution=self.resolution,
        )
        if self.options is not None:
            options = {"lowering": usual_lowering(place), **self.options}
            pipe = torch.compile(pipe, backend="lsync", options=options)
            self._check_conditions(pipe)
        return Syncer(self, pipe, place)

    def prepare(self, device: str, workers: int) -> Syncer:
        """:meth:`load`, in one of several processes that share the machine's cores."""
        fit_threads(workers)
        return self.load(device)

    def _check_conditions(self, pipe: Any) -> None:
        """Say where options were measured under other conditions than they are used."""
        if not self.measured_with:
            return
        from lsync_compile.tune.configuration import conditions_of, misfits

        here = conditions_of(
            pipe,
            lowering=pipe.lsync.options.lowering,
            steps=self.arguments.get("num_inference_steps", 20),
            num_frames=self.arguments.get("num_frames", 16),
        )
        for line in misfits(self.measured_with, here):
            pipe.lsync.note(f"tuned options: {line}")
            log.warning("tuned options: %s", line)


class Syncer:
    """Loaded models that sync one clip after the other; made by :meth:`SyncSettings.load`.

    Attributes:
        settings: how.
        pipeline: plain or compiled.
        device: the torch device of the models.
    """

    def __init__(self, settings: SyncSettings, pipeline: Any, device: Any) -> None:
        self.settings = settings
        self.pipeline = pipeline
        self.device = device

    def __call__(self, job: ListedJob, advance: Advance | None = None) -> LipsyncOutput:
        """Sync a clip and write its output.

        Args:
            job: what to read and to write.
            advance: told of the progress instead of a bar on the terminal.

        Raises:
            LsyncError: whatever the pipeline raises; nothing is written then.
        """
        import torch

        settings, on_gpu = self.settings, self.device.type == "cuda"
        # Kernels of Triton's go to the current GPU, wherever their tensors are.
        with torch.cuda.device(self.device) if on_gpu else nullcontext():
            result: LipsyncOutput = self.pipeline(
                video_path=job.video,
                audio_path=job.audio,
                video_out_path=job.output,
                generator=torch.Generator(self.device).manual_seed(settings.seed),
                progress=advance,
                **settings.arguments,
            )
        return result

    def report(self) -> Any:
        """The :class:`lsync_compile.report.Report` of a compiled pipeline, None of a plain one."""
        return None if self.settings.options is None else self.pipeline.lsync.report()

    def about(self) -> dict[str, Any]:
        """Device, peak device memory so far in MiB and the report, as plain values for JSON."""
        report = self.report()
        return {
            "device": str(self.device),
            "peak_device_mib": peak_device_mib(self.device),
            "report": None if report is None else report.to_dict(),
        }
