"""Running a pipeline in one way or another and keeping what it made.

The comparison needs little of a pipeline: `Pipeline` and `Chunk` say what. `LatentSyncPipeline`
and its compiled form have it.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsync_compile.errors import NoFaceError, OptionError
from lsync_compile.media.audio import load_audio
from lsync_compile.options import nearest
from lsync_compile.quality.footage import Footage
from lsync_compile.runtime.timesteps import SOLVERS, make_solver

Progress = Callable[[int, int], None]

FPS = 25
SAMPLE_RATE = 16_000
SPACINGS = ("leading", "linspace", "trailing")


class Chunk(Protocol):
    """What is read of a finished chunk of f frames, see `models.job.ChunkResult`."""

    index: int
    original: list[NDArray[np.uint8]]  # (H, W, 3)
    faces: Tensor | None  # (f, 3, R, R) uint8
    synced: Tensor | None  # (f, 3, R, R) in [-1, 1]
    frames: list[NDArray[np.uint8]]  # (H, W, 3)
    has_face: list[bool]
    seconds: float


class Pipeline(Protocol):
    """What is used of a pipeline."""

    scheduler: Any
    unet: Any
    vae: Any

    @property
    def resolution(self) -> int:
        """Side R of the aligned face."""
        ...

    @property
    def mask(self) -> Tensor:
        """(1, R, R), 1 where the face is kept, 0 where it is generated."""
        ...

    def synthesize(
        self, video_path: str | Path, audio_path: str | Path | None = None, **arguments: Any
    ) -> Iterator[Chunk]:
        """Finished chunks, one by one."""
        ...


@dataclass(frozen=True)
class Setting:
    """One way to run a pipeline.

    Attributes:
        name: heads its row in tables.
        steps: denoising steps a chunk.
        solver: a key of `SOLVERS`.
        spacing: how the solver spreads its steps, one of `SPACINGS`; None keeps the pipeline's.
        guidance_scale: 1 and below switch guidance off.
        num_frames: frames a chunk.
        seed: of all random draws.
        muted: replace the sound by silence: the control that shows what the sound does.
        options: of `lsync_compile.compile`; None runs the plain pipeline.

    Raises:
        OptionError: unknown solver or spacing.
    """

    name: str
    steps: int = 20
    solver: str = "ddim"
    spacing: str | None = None
    guidance_scale: float = 1.5
    num_frames: int = 16
    seed: int = 1247
    muted: bool = False
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise OptionError(
                f"unknown solver {self.solver!r}{nearest(self.solver, SOLVERS)}; "
                f"solvers are {', '.join(SOLVERS)}"
            )
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise OptionError(
                f"unknown spacing {self.spacing!r}{nearest(self.spacing, SPACINGS)}; "
                f"spacings are {', '.join(SPACINGS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.options is not None:
            values["options"] = {key: _plain(value) for key, value in self.options.items()}
        return values


@dataclass
class Run:
    """What one run of a setting made.

    Attributes:
        setting: how it was run.
        mask: (1, R, R), 1 where the aligned face is kept.
        originals: the clip's frames.
        frames: the finished frames.
        faces: the clip's aligned faces; grey where there is none.
        synced: the generated aligned faces, not rounded to 8 bits.
        has_face: whether each frame shows a face.
        starts: the first frame of each chunk.
        chunk_seconds: wall time of each chunk.
    """

    setting: Setting
    mask: Tensor
    originals: Footage = field(default_factory=Footage)
    frames: Footage = field(default_factory=Footage)
    faces: Footage = field(default_factory=Footage)
    synced: Footage = field(default_factory=Footage)
    has_face: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.has_face)

    @property
    def seconds(self) -> float:
        """Wall time of all chunks."""
        return sum(self.chunk_seconds)

    @property
    def frames_per_second(self) -> float:
        """Speed of a typical chunk: the median over the full ones, so warm-up does not count."""
        size, seconds = self._full_chunks()
        typical = statistics.median(seconds)
        return size / typical if typical > 0 else float("inf")

    @property
    def speed_error(self) -> float:
        """Standard error of the speed as a share of it, by how much chunks differ."""
        _, seconds = self._full_chunks()
        typical = statistics.median(seconds)
        if typical <= 0:
            return 0.0
        apart = statistics.median(abs(each - typical) for each in seconds)
        # Of normally spread values: 1.48 median deviations are a standard deviation, and a median
        # is off by 1.25 of them over the root of their number.
        return float(1.48 * apart / typical * 1.25 / len(seconds) ** 0.5)

    def part(self, start: int, stop: int) -> Run:
        """Frames [start, stop) of it, both at borders of chunks or at the end."""
        chunks = [place for place, first in enumerate(self.starts) if start <= first < stop]
        return Run(
            self.setting,
            self.mask,
            originals=self.originals.part(start, stop),
            frames=self.frames.part(start, stop),
            faces=self.faces.part(start, stop),
            synced=self.synced.part(start, stop),
            has_face=self.has_face[start:stop],
            starts=[self.starts[place] - start for place in chunks],
            chunk_seconds=[self.chunk_seconds[place] for place in chunks],
        )

    def _full_chunks(self) -> tuple[int, list[float]]:
        """Frames of a full chunk, and the wall time of each."""
        sizes = [stop - start for start, stop in zip(self.starts, self._stops(), strict=True)]
        full = max(sizes)
        timed = zip(self.chunk_seconds, sizes, strict=True)
        return full, [seconds for seconds, size in timed if size == full]

    def _stops(self) -> list[int]:
        return [*self.starts[1:], len(self)]


def collect(
    pipeline: Pipeline,
    video: str | Path,
    audio: str | Path | None,
    setting: Setting,
    *,
    max_frames: int | None = None,
    beside: Run | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> Run:
    """Run a pipeline as a setting says and keep every picture.

    Args:
        pipeline: plain or compiled; its scheduler is put back afterwards.
        video: the clip.
        audio: the speech; None takes the clip's own.
        setting: steps, solver, seed and so on. Its options are the caller's business: pass the
            compiled pipeline.
        max_frames: stop after so many frames.
        beside: an earlier run on the same clip, whose originals and aligned faces are shared.
        progress: called with the denoising steps done and their total.
        **arguments: further ones of ``synthesize``.

    Raises:
        NoFaceError: no frame shows a face, so there is no mouth to measure.
        ValueError: `beside` has another number of frames.
        LsyncError: whatever the pipeline raises.
    """
    run = Run(setting, pipeline.mask.detach().float().cpu())
    if beside is not None:
        run.originals, run.faces = beside.originals, beside.faces
    # On the CPU, the same numbers whatever device the pipeline is on.
    generator = torch.Generator("cpu").manual_seed(setting.seed)
    with solver(pipeline, setting), sound(video, audio, muted=setting.muted) as heard:
        for chunk in pipeline.synthesize(
            video,
            heard,
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance_scale,
            num_frames=setting.num_frames,
            generator=generator,
            max_frames=max_frames,
            progress=progress or _silent,
            **arguments,
        ):
            _keep(run, chunk, with_input=beside is None)
    if beside is not None and len(beside) != len(run):
        raise ValueError(f"{len(run)} frames beside a run of {len(beside)}")
    if not any(run.has_face):
        raise NoFaceError(f"{video}: no frame shows a usable face; there is no mouth to measure")
    return run


@contextlib.contextmanager
def solver(pipeline: Pipeline, setting: Setting) -> Iterator[None]:
    """Give a pipeline the setting's solver, made from its own scheduler's configuration."""
    before = pipeline.scheduler
    pipeline.scheduler = make_solver(before, setting.solver, setting.spacing)
    try:
        yield
    finally:
        pipeline.scheduler = before


@contextlib.contextmanager
def sound(
    video: str | Path, audio: str | Path | None, *, muted: bool
) -> Iterator[str | Path | None]:
    """The sound to sync to: as given, or a file of as much silence."""
    if not muted:
        yield audio
        return
    length = len(load_audio(audio or video, sample_rate=SAMPLE_RATE))
    with tempfile.TemporaryDirectory(prefix="lsync-quality-") as folder:
        path = Path(folder) / "silence.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes(bytes(2 * length))
        yield path


def _keep(run: Run, chunk: Chunk, *, with_input: bool) -> None:
    run.starts.append(len(run))
    run.has_face.extend(chunk.has_face)
    run.chunk_seconds.append(chunk.seconds)
    side = run.mask.shape[-1]
    grey = np.full((side, side, 3), 0.5, dtype=np.float32)
    for index, (original, frame) in enumerate(zip(chunk.original, chunk.frames, strict=True)):
        run.frames.append(frame)
        run.synced.append(grey if chunk.synced is None else _aligned(chunk.synced[index]))
        if with_input:
            run.originals.append(original)
            run.faces.append(grey if chunk.faces is None else _aligned(chunk.faces[index]))


def _aligned(face: Tensor) -> NDArray[np.float32]:
    """(3, R, R), uint8 or in [-1, 1], to (R, R, 3) in [0, 1]."""
    scaled = face.float() / 255 if face.dtype == torch.uint8 else face.float() / 2 + 0.5
    return scaled.clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def _silent(done: int, total: int) -> None:
    """Keeps the pipeline from drawing its own bar."""


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
