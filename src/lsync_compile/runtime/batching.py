"""Chunks that are denoised in the same steps share their calls of the UNet.

A call for n chunks has n samples in its batch, with guidance 2 n: first all halves without sound,
then all with. Frames stay where they are. Nothing in the network looks across samples (temporal
attention and group norms are of one sample), so a chunk's result is what it is alone, but for
rounding: libraries pick convolutions and matrix products by the size of the batch.

What shares a call must have as many frames and the same timesteps. Nothing is padded: a short last
chunk, or one in another number of steps, has calls of its own. Sizes are ``batch_chunks`` and its
halves, so that few shapes are compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsync_compile.report import Session
from lsync_compile.runtime.memory import free_on_gpu, readable
from lsync_compile.runtime.pace import Walk

if TYPE_CHECKING:
    from lsync_compile.models.conditions import Conditions, Prepared

# What a call keeps at its worst moment, in tensors of the UNet's outermost width and resolution:
# the gate of a feed-forward (8), the skips, what is added to. The plan of LatentSync's graph says
# 19 (1.5 GiB for a guided chunk at 512 pixels in half precision).
LIVE_TENSORS = 20

Denoise = Callable[[list["Lane"]], list[Tensor]]
# (step of the walk, latents of each lane) -> predicted noise of each, all (1, 4, f, h, w)
Predict = Callable[[int, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Lane:
    """A chunk that waits to be denoised.

    Attributes:
        walk: where it begins and which steps it takes.
        conditions: its faces and sound.
        scheduler: its own where several chunks are under way: solvers remember earlier steps.
        prepared: its faces as they were encoded.
        draws: the random numbers as they were when it was begun, for those who repeat it.
    """

    walk: Walk
    conditions: Conditions
    scheduler: Any
    prepared: Prepared
    draws: torch.Generator | None = None

    @property
    def shares(self) -> tuple[int, int | None, tuple[float, ...]]:
        """What lanes of one call have in common."""
        walk = self.walk
        return walk.latents.shape[2], walk.guided, tuple(walk.timesteps.tolist())


class SmartBatcher:
    """Decides which chunks of a run share calls. Made anew for each run.

    Args:
        session: of the compiled pipeline, for its options and counters; None batches nothing.
        each: device memory in bytes that a chunk needs in a call, see :func:`chunk_bytes`.
        device: where the calls are made.
        obstacle: why chunks of this run can not share calls; empty where they can.

    Attributes:
        limit: chunks that a call may have; halved where the device's memory did not do.
    """

    def __init__(
        self, session: Session | None, each: int, device: torch.device, obstacle: str = ""
    ) -> None:
        self._session = None
        self.limit = 1
        if session is None or session.options.batch_chunks == 1:
            return
        self._session = session
        self._device = device
        self._batched = False
        self._obstacle = obstacle
        session.count("batching", chunks=0, batched=0, calls_saved=0, alone=0, out_of_memory=0)
        if not obstacle:
            self.limit = self._within_budget(session.options.batch_chunks, each)

    def calls(self, lanes: Sequence[Lane]) -> list[list[Lane]]:
        """Which lanes share calls; the lanes of a call are in their order."""
        alike: dict[Any, list[Lane]] = {}
        for lane in lanes:
            alike.setdefault(lane.shares, []).append(lane)
        found = []
        for group in alike.values():
            size = self.limit
            while group:
                while size > len(group):
                    size //= 2
                found.append(group[:size])
                group = group[size:]
        return found

    def run(self, lanes: Sequence[Lane], denoise: Denoise) -> list[Tensor]:
        """Denoise lanes, in as few calls as may be.

        Args:
            denoise: takes lanes that share calls and gives the clean latents of each, or of the
                first ones, where the others could not share them after all.

        Returns:
            Clean latents (1, 4, f, h, w) in the order of the lanes.

        Raises:
            torch.OutOfMemoryError, MemoryError, RuntimeError: a single chunk is too much.
        """
        results: dict[int, Tensor] = {}
        waiting = self.calls(lanes)
        while waiting:
            together = waiting.pop(0)
            if len(together) > self.limit:
                waiting = [*self.calls(together), *waiting]
                continue
            found = self._attempt(together, denoise)
            if found is None:
                waiting.insert(0, together)
                continue
            shared, rest = together[: len(found)], together[len(found) :]
            for lane, latents in zip(shared, found, strict=True):
                results[lane.walk.chunk] = latents
            self._count(shared)
            waiting = [rest, *waiting] if rest else waiting
        return [results[lane.walk.chunk] for lane in lanes]

    def _count(self, together: Sequence[Lane]) -> None:
        """Count lanes that were denoised in the same calls."""
        if self._session is None:
            return
        size, steps = len(together), len(together[0].walk.timesteps)
        self._batched |= size > 1
        self._session.count(
            "batching",
            chunks=size,
            batched=size if size > 1 else 0,
            calls_saved=(size - 1) * steps,
            alone=int(size == 1),
        )

    def account(self) -> None:
        """At the end of a run: say in the report why nothing was batched, where nothing was."""
        if self._session is None or self._batched:
            return
        reason = self._obstacle or (
            "memory for one chunk a call"
            if self.limit == 1
            else "no two neighbouring chunks had as many frames and the same steps"
        )
        self._session.note(f"batch_chunks did nothing in a run: {reason}")

    def _attempt(self, together: list[Lane], denoise: Denoise) -> list[Tensor] | None:
        """The result; None where memory did not do, and fewer chunks are to be tried."""
        try:
            return denoise(together)
        except (RuntimeError, MemoryError) as error:
            if len(together) == 1 or not is_out_of_memory(error):
                raise
        # Out of the block: the error holds on to what the call had allocated.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.limit = max(1, len(together) // 2)
        for lane in together:
            lane.walk.restart()
        if self._session is not None:
            self._session.count("batching", out_of_memory=1)
            self._session.note(
                f"batch_chunks: {len(together)} chunks a call do not fit on {self._device}; a run "
                f"went on with {self.limit}"
            )
        return None

    def _within_budget(self, chunks: int, each: int) -> int:
        """``chunks``, halved until they fit the budget."""
        assert self._session is not None
        gib = self._session.options.batch_memory_gib
        free = free_bytes(self._device)
        budget = gib * 2**30 if gib else None if free is None else free / 2
        self._session.most("batching", chunk_bytes=each)
        fitting = chunks
        while budget is not None and fitting > 1 and fitting * each > budget:
            fitting //= 2
        if budget is not None and fitting < chunks:
            self._session.note(
                f"batch_chunks={chunks} was cut to {fitting}: a chunk takes {readable(each)}, the "
                f"budget is {readable(int(budget))} (batch_memory_gib)"
            )
        return fitting


def chunk_bytes(width: int, positions: int, itemsize: int) -> int:
    """Device memory that a chunk needs in a UNet call, without weights; an estimate.

    Args:
        width: channels of the outermost blocks.
        positions: batch of the chunk (2 with guidance) times frames, height and width of latents.
        itemsize: bytes of a number.
    """
    return LIVE_TENSORS * width * positions * itemsize


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could be allocated on a device; None where nobody says."""
    if device.type == "cuda":
        return free_on_gpu(device)
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such system call, or no such name
        return None


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """On a CPU torch raises a plain RuntimeError that only its words tell from others."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error)
    )
