"""Where a run is when the loop that denoises is somebody else's.

Our pipeline says of each UNet call which step of which chunk it is. Others call their scheduler and
their UNet and say nothing; but a schedule is a tensor, and the timestep that such a loop hands to
the UNet is a part of it. Its place in the schedule's memory is the step, known on the host without
reading anything from the device; a place that does not come after the last one begins a chunk.

A UNet that is called more than once in a step (windows of frames, the halves of guidance one by
one) cannot be told apart in this way. From the second such call on nothing is reused in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsync_compile.report import Session
from lsync_compile.runtime.context import Mode, current, step_context
from lsync_compile.runtime.multiscale import MultiScaleProcessor
from lsync_compile.runtime.staged import version_of
from lsync_compile.scoped import scoped

Vouch = Callable[[Tensor, Tensor | None], frozenset[str]]


def vouch_for_nothing(sample: Tensor, sound: Tensor | None) -> frozenset[str]:
    """What is known of the inputs of a UNet of which nothing is known."""
    return frozenset()


@dataclass(frozen=True)
class _Schedule:
    """A scheduler's timesteps, read once."""

    timesteps: Tensor
    version: int | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, timesteps: Tensor) -> _Schedule:
        return cls(timesteps, version_of(timesteps), tuple(timesteps.tolist()))

    def is_of(self, timesteps: Tensor) -> bool:
        return timesteps is self.timesteps and self.version == version_of(timesteps)

    def place(self, timestep: Any, after: int) -> int | None:
        """Which of the timesteps it is, from 0; the first later than ``after`` of equal ones.

        None where it is none of them, or only the device knows.
        """
        if isinstance(timestep, Tensor):
            place = self._place_in_memory(timestep)
            if place is not None or timestep.device.type != "cpu" or timestep.numel() != 1:
                return place
            timestep = timestep.item()
        if not isinstance(timestep, (int, float)):
            return None
        found = [place for place, value in enumerate(self.values) if value == timestep]
        return next((place for place in found if place > after), found[0] if found else None)

    def _place_in_memory(self, timestep: Tensor) -> int | None:
        """Where a view of one timestep, perhaps repeated, begins in the schedule."""
        mine, other = self.timesteps.untyped_storage(), timestep.untyped_storage()
        pairs = zip(timestep.shape, timestep.stride(), strict=True)
        one = all(size == 1 or stride == 0 for size, stride in pairs)
        if not one or mine.data_ptr() != other.data_ptr() or not timestep.numel():
            return None
        if timestep.dtype != self.timesteps.dtype:
            return None
        offset = int(timestep.storage_offset()) - int(self.timesteps.storage_offset())
        place, rest = divmod(offset, self.timesteps.stride(0) or 1)
        return place if rest == 0 and 0 <= place < len(self.values) else None


class StepTracker:
    """Follows the network calls of one run of a pipeline; made anew for each.

    Args:
        scheduler: gives the pipeline's scheduler; one that has ``timesteps`` is followed.
        session: of the compiled pipeline.
        vouch: ``(sample, encoder_hidden_states) -> keys of VOUCHES`` that the pipeline's loop
            gives reason to expect. What can be read off the tensors is checked in the first call
            of each chunk.
        mask: gives the pipeline's mask (1, R, R), 1 where the picture is kept; None where it has
            none. For options that work on what is generated alone.
    """

    def __init__(
        self,
        scheduler: Callable[[], Any],
        session: Session,
        *,
        vouch: Vouch = vouch_for_nothing,
        mask: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._session = session
        self._vouch = vouch
        self._mask = mask
        self._run = object()  # unequal to every other run's
        self._schedule: _Schedule | None = None
        self._chunk = -1
        self._first = 0
        self._last = -1
        self._mode: Mode = "reuse"
        self._vouched: dict[Any, frozenset[str]] = {}
        self._pixels: Tensor | None = None
        self._scales: MultiScaleProcessor | None = None

    def place(
        self, role: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[Any]:
        """What to set around a call of the pipeline's module of this role."""
        options = self._session.options
        if options.lip_attention or options.crop_decode:
            return self._with_region(role, args, kwargs)
        return self._step(args, kwargs) if role == "unet" else nullcontext()

    @contextmanager
    def _with_region(
        self, role: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        """The step and, where the pipeline has a mask, the region that is generated."""
        step = self._step(args, kwargs) if role == "unet" else nullcontext()
        sample = args[0] if args else kwargs.get("sample")
        if role == "vae.encoder":  # last the faces as they are, after those masked
            self._pixels = sample
        mask = self._mask()
        if mask is not None and role == "unet" and self._pixels is None:
            self._session.note(
                "lip_attention and crop_decode do nothing: faces are known only where the VAE is "
                "compiled too (option compile_vae)"
            )
        if role == "vae.encoder" or mask is None or self._pixels is None:
            with step:
                yield
            return
        if self._scales is None:
            assert isinstance(sample, Tensor)  # latents, of the UNet or the decoder
            self._scales = MultiScaleProcessor(mask, sample.shape[-1], self._session)
        with step, self._scales.telling(self._pixels):
            yield

    def _step(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[Any]:
        if current() is not None:  # a loop that says where it is
            return nullcontext()
        schedule = self._current_schedule()
        sample, timestep, sound = (
            args[index] if len(args) > index else kwargs.get(name)
            for index, name in enumerate(("sample", "timestep", "encoder_hidden_states"))
        )
        place = None if schedule is None else schedule.place(timestep, self._last)
        if schedule is None or place is None:
            self._session.note(
                "unet: a call's timestep is none of the scheduler's, so nothing is known of its "
                "step and nothing is reused"
            )
            return nullcontext()
        self._advance(place, len(schedule.values))
        return step_context(
            self._run,
            self._chunk,
            place - self._first,
            len(schedule.values) - self._first,
            self._mode,
            timestep=float(schedule.values[place]),
            vouched=self._checked(sample, sound),
        )

    def _current_schedule(self) -> _Schedule | None:
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.dim() != 1 or not len(timesteps):
            return None
        if self._schedule is None or not self._schedule.is_of(timesteps):
            self._schedule = _Schedule.of(timesteps)
            self._last = -1
        return self._schedule

    def _advance(self, place: int, steps: int) -> None:
        """Count the call: the same step once more, the next one, or the first of a chunk."""
        again = place == self._last
        if again and place < steps - 1:
            if self._mode == "reuse":
                self._session.note(
                    "unet: called more than once in a step, so features are not reused"
                )
            self._mode = "recompute"
        elif place <= self._last or self._last < 0:
            self._chunk += 1
            self._first = place
            self._vouched.clear()
        self._last = place

    def _checked(self, sample: Any, sound: Any) -> frozenset[str]:
        """What holds of the inputs, looked at once a chunk for inputs of one shape."""
        if not isinstance(sample, Tensor):
            return frozenset()
        sound = sound if isinstance(sound, Tensor) else None
        key = sample.shape, None if sound is None else sound.shape
        if key not in self._vouched:
            expected = self._vouch(sample, sound)
            wrong = frozenset(name for name in expected if not _holds(name, sample, sound))
            for name in sorted(wrong):
                self._session.note(f"unet: {name} was expected of its inputs and does not hold")
            self._vouched[key] = expected - wrong
        return self._vouched[key]


_tracker: ContextVar[StepTracker | None] = ContextVar("lsync_step_tracker", default=None)


def tracking(tracker: StepTracker | None) -> AbstractContextManager[Any]:
    """Have a tracker follow the block's network calls, in this thread and asyncio task only."""
    return scoped(_tracker, tracker)


def placed(
    role: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AbstractContextManager[Any]:
    """What the tracker of the run under way, if there is one, sets around a network call."""
    tracker = _tracker.get()
    return nullcontext() if tracker is None else tracker.place(role, args, kwargs)


def _holds(name: str, sample: Tensor, sound: Tensor | None) -> bool:
    """Whether what would be vouched for is true of these tensors; waits for the device."""
    if name == "guidance":
        half = len(sample) // 2
        return len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:])
    if name == "null_audio":
        return sound is not None and not bool(sound[: len(sound) // 2].any())
    return True  # of several steps: a single call does not show it
