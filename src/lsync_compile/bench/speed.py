"""How fast a row denoises chunks: what a UNet step, the VAE and a whole chunk take."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lsync_compile.bench.engines import (
    Networks,
    Refused,
    Watched,
    check_faces,
    check_step,
    running_with,
)
from lsync_compile.bench.rows import Row
from lsync_compile.bench.timing import Clock, percentiles
from lsync_compile.media.mask import mouth_mask
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.runtime.running import current_session
from lsync_compile.runtime.timesteps import make_solver

TOKENS = 50


@dataclass(frozen=True)
class Spent:
    """Milliseconds of one chunk by part, and how often the UNet was called for it."""

    encode: float
    denoise: float
    decode: float
    calls: float

    @property
    def total(self) -> float:
        return self.encode + self.denoise + self.decode


@dataclass(frozen=True)
class Marks:
    """When chunks that share calls of the UNet were encoded, denoised and decoded."""

    ends: list[Any]  # three of :meth:`Clock.now`
    chunks: int
    calls: float  # of the UNet, one for each chunk in them


def spent_on(marks: Sequence[Marks], before: Any, clock: Clock) -> list[Spent]:
    """What a chunk took, for each of the marks in turn.

    Args:
        before: when the chunk before them ended; what the device did nothing in since then counts
            as encoding.
        clock: of the marks.
    """
    found = []
    for each in marks:
        pairs = itertools.pairwise([before, *each.ends])
        encode, denoise, decode = (clock.between(*pair) / each.chunks for pair in pairs)
        found.append(Spent(encode, denoise, decode, each.calls))
        before = each.ends[-1]
    return found


class Chunks:
    """A run of chunks of one random face that hardly moves, denoised one after the other.

    Args:
        unet, vae: what runs.
        row: in how many steps, with which solver.
        frames: a chunk.
        steps: of the plain run; 20 but for a check of the command.
    """

    def __init__(self, unet: Any, vae: Any, row: Row, frames: int, steps: int) -> None:
        self.device = unet.device
        self.unet = Watched(unet)
        side = 8 * unet.config.sample_size
        generator = torch.Generator().manual_seed(0)
        job = SimpleNamespace(
            generator=torch.Generator(self.device).manual_seed(0),
            mask=mouth_mask(side).to(self.device), guidance_scale=1.5, guided=True, eta=0.0,
            num_inference_steps=row.part_of(steps), num_frames=frames, callback=None,
            callback_steps=1, session=current_session(),
        )  # fmt: skip
        scheduler = make_solver(Networks(unet, vae).scheduler, row.solver)
        self.run = ChunkSynthesizer(vae, self.unet, scheduler, job, self.device)  # type: ignore[arg-type]
        coarse = torch.rand(1, 3, side // 8, side // 8, generator=generator)
        face = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
        # There and back: a chunk goes on where the last one ended. What starts from the chunk
        # before would else take each for a cut.
        moved = [face.roll(min(n, frames - 1 - n), dims=-1) for n in range(frames)]
        faces = (255 * torch.cat(moved)).to(torch.uint8)
        self.faces = faces.to(self.device)  # where the runtime finds and aligns them
        width = unet.config.cross_attention_dim
        self.audio = torch.randn(frames, TOKENS, width, generator=generator)
        self.clock = Clock(self.device)
        self.done = 0
        self.last: tuple[Tensor, Tensor] | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)

    def chunk(self) -> Marks:
        """Denoise the next one, or as many as share calls of the UNet.

        On a GPU the host does not wait for the result, as a run does not before it is needed.
        """
        count, before = self.run.batcher.limit, self.unet.chunk_calls
        numbers = range(self.done, self.done + count)
        prepared = [self.run.prepare(self.faces) for _ in numbers]
        ends = [self.clock.now()]
        inputs = [(n, each, self.audio) for n, each in zip(numbers, prepared, strict=True)]
        latents = self.run.denoise_together(inputs, lambda steps: None)
        ends.append(self.clock.now())
        faces = [
            self.run.decode(found, each.pixels, n)
            for n, each, found in zip(numbers, prepared, latents, strict=True)
        ]
        ends.append(self.clock.now())
        for each in faces:
            self._finite &= torch.isfinite(each).all()
        self.last = latents[-1], prepared[-1].pixels
        self.done += count
        return Marks(ends, count, (self.unet.chunk_calls - before) / count)

    def check(self) -> None:
        """Look at all chunks so far.

        Raises:
            Refused: what came out is not finite.
        """
        if not bool(self._finite):
            raise Refused("its faces are not finite; not timed")

    def decoded(self, vae: Any) -> Tensor:
        """The faces of the last chunk with another decoder."""
        assert self.last is not None
        own, self.run.vae = self.run.vae, vae
        try:
            return self.run.decode(*self.last, self.done - 1)
        finally:
            self.run.vae = own


def measure_rows(
    rows: list[Row],
    networks: Networks,
    *,
    frames: int,
    runs: int,
    steps: int = 20,
) -> Generator[tuple[Row, dict[str, Any]], None, None]:
    """Time the rows of one engine with equal options: compile, check, time each.

    A row that fails its check comes as ``{"refused": why}``, without times.
    """
    with running_with(rows[0], networks) as (run, handle):
        for row in rows:
            work = functools.partial(_measured, row, networks, frames, runs, steps, handle)
            yield row, run(work)


def _measured(
    row: Row, networks: Networks, frames: int, runs: int, steps: int, handle: Any
) -> dict[str, Any]:
    device = networks.unet.device
    begin = time.perf_counter()
    try:
        chunks = Chunks(networks.unet, networks.vae, row, frames, steps)
        chunks.chunk()
        chunks.check()
        first = time.perf_counter() - begin
        errors = {
            "step_error": check_step(row, chunks.unet),
            "faces_error": check_faces(row, networks.vae, chunks.decoded, networks.unet.dtype),
        }
        before = chunks.chunk().ends[-1]  # captures, and knows the one before
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        marks = [chunks.chunk() for _ in range(runs)]
        spent = spent_on(marks, before, chunks.clock)
        chunks.check()
    except Refused as refusal:
        return {"refused": str(refusal)}
    low, middle, high = percentiles([each.total for each in spent])
    calls = max(1.0, spent[-1].calls)
    notes = [] if handle is None else handle.report().notes
    counters = {} if handle is None else handle.report().counters
    denoise = statistics.median(each.denoise for each in spent)
    return {
        "unet_step_ms": round(denoise / calls, 3),
        "unet_calls": round(calls, 2),
        "chunks_together": chunks.run.batcher.limit,
        "encode_ms": round(statistics.median(each.encode for each in spent), 3),
        "denoise_ms": round(denoise, 3),
        "decode_ms": round(statistics.median(each.decode for each in spent), 3),
        "chunk_ms": {"p20": round(low, 2), "p50": round(middle, 2), "p80": round(high, 2)},
        "runs": runs,
        "frames_per_s": round(1e3 * frames / middle, 3),
        "first_chunk_s": round(first, 2),
        "peak_mib": _peak(device),
        **errors,
        "recompiles": counters.get("recompiles"),
        "fallbacks": counters.get("fallbacks"),
        "notes": notes,
    }


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that each operation reads and writes, as if nothing stayed in a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = tree_leaves((args, kwargs, result))
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        return result


def count_work(networks: Networks, frames: int) -> dict[str, dict[str, float]]:
    """TFLOP and GB that the eager networks move, for the parts of a chunk.

    Returns:
        By ``unet step``, ``encode`` and ``decode``.
    """
    row = Row("count", "eager")
    chunks = Chunks(networks.unet, networks.vae, row, frames, 1)
    counted = {}
    state: dict[str, Any] = {}

    def encode() -> None:
        state["prepared"] = chunks.run.prepare(chunks.faces)

    def denoise() -> None:
        given = state["prepared"], chunks.audio
        state["latents"] = chunks.run.denoise(0, *given, lambda steps: None)

    def decode() -> None:
        chunks.run.decode(state["latents"], state["prepared"].pixels, 0)

    for name, part in (("encode", encode), ("unet step", denoise), ("decode", decode)):
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            part()
        with torch.no_grad(), _Traffic() as traffic:
            part()
        counted[name] = {
            "tflop": round(flops.get_total_flops() / 1e12, 5),
            "gb": round(traffic.bytes / 1e9, 4),
        }
    return counted
