"""A planned job, carried out: chunks through reading, faces, encoding, denoising, pasting.

The stages are the same whether they overlap or not (:mod:`lsync_compile.runtime.stages`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lsync_compile.media.align import restore_face
from lsync_compile.media.faces import Frame
from lsync_compile.media.tracking import Chunk, cut_chunks
from lsync_compile.models.audio import AudioEncoder, audio_windows
from lsync_compile.models.conditions import Prepared
from lsync_compile.models.job import ChunkResult, Job
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.runtime.encodings import Encodings
from lsync_compile.runtime.stages import PipelineParallelProcessor, Stage

Advance = Callable[[int], None]

# The stream of the stages that replay a network's graph: side by side they stopped an H100.
NETWORKS = "networks"


@dataclass
class _Passing:
    """A chunk on its way, with what the stages so far have made of it."""

    chunk: Chunk
    prepared: Prepared | None = None
    audio: Tensor | None = None
    latents: Tensor | None = None
    synced: Tensor | None = None
    frames: list[Frame] = field(default_factory=list)


class Run:
    """Carries out one job.

    Args:
        job: what to do.
        synthesizer: the networks, made for this job.
        encoder: of the sound.
        device: where the networks are.
        encodings: of frames seen before; None encodes every chunk.
        parallel: whether stages overlap.
    """

    def __init__(
        self,
        job: Job,
        synthesizer: ChunkSynthesizer,
        encoder: AudioEncoder,
        device: torch.device,
        *,
        encodings: Encodings | None,
        parallel: bool,
    ) -> None:
        self._job = job
        self._synthesizer = synthesizer
        self._encoder = encoder
        self._device = device
        self._encodings = encodings
        self._parallel = parallel
        self._features: Any = encoder.open(torch.from_numpy(job.sound))

    def results(self, advance: Advance) -> Iterator[ChunkResult]:
        """Finished chunks in order.

        Args:
            advance: called with the number of denoising steps done in the whole run, from the
                thread that denoises.
        """
        job = self._job
        on_device = job.tracker.batch is not None
        stages = [
            Stage("faces", _each(self._place), on_device),
            Stage("encode", _each(self._encode), True, NETWORKS),
            Stage("denoise", lambda group: self._denoise(group, advance), True, NETWORKS),
            Stage("decode", _each(self._decode), True, NETWORKS),
            Stage("paste", _each(self._paste), on_device),
        ]
        size = self._synthesizer.batcher.limit
        processor = PipelineParallelProcessor(
            self._groups(size),
            stages,
            self._device,
            parallel=self._parallel,
            in_flight=4 if size == 1 else 3,  # groups
            shape=lambda group: tuple((len(p.chunk), p.chunk.faces is None) for p in group),
            timeline=job.timeline,
        )
        begin = time.perf_counter()
        try:
            with closing(iter(processor)) as passed:  # type: ignore[type-var]
                for group in passed:
                    seconds = (time.perf_counter() - begin) / len(group)
                    for passing in group:
                        yield self._result(passing, seconds)
                    begin = time.perf_counter()
        finally:
            self._synthesizer.account()
        job.tracker.check_found(job.video_path)

    def _groups(self, size: int) -> Iterator[list[_Passing]]:
        """Chunks that go through the stages together; one that others learn from is the first."""
        job = self._job
        group: list[_Passing] = []
        wanted = 1 if self._synthesizer.pace.learns else size
        source = cut_chunks(job.video_path, job.count, job.num_frames, job.fps)
        with closing(source) as chunks:  # type: ignore[type-var]
            for chunk in chunks:
                group.append(_Passing(chunk))
                if len(group) == wanted:
                    yield group
                    group, wanted = [], size
            if group:
                yield group

    def _place(self, passing: _Passing) -> _Passing:
        self._job.tracker.place(passing.chunk)
        return passing

    def _encode(self, passing: _Passing) -> _Passing:
        chunk = passing.chunk
        windows = audio_windows(self._features, chunk.start, len(chunk), fps=self._job.fps)
        passing.audio = self._encoder.mark(windows)
        if chunk.faces is not None:
            if self._encodings is None:
                passing.prepared = self._synthesizer.prepare(chunk.faces)
            else:
                passing.prepared = self._encodings.prepare(
                    self._synthesizer, chunk.faces, chunk.shown
                )
        return passing

    def _denoise(self, group: list[_Passing], advance: Advance) -> list[_Passing]:
        steps = self._job.num_inference_steps
        done = group[0].chunk.index * steps
        wanted: list[_Passing] = []
        inputs: list[tuple[int, Prepared, Tensor]] = []
        for passing in group:
            if passing.prepared is not None:
                assert passing.audio is not None
                wanted.append(passing)
                inputs.append((passing.chunk.index, passing.prepared, passing.audio))
        if wanted:
            found = self._synthesizer.denoise_together(inputs, lambda step: advance(done + step))
            for passing, latents in zip(wanted, found, strict=True):
                passing.latents = latents
        advance(done + len(group) * steps)
        return group

    def _decode(self, passing: _Passing) -> _Passing:
        if passing.latents is not None:
            assert passing.prepared is not None
            passing.synced = self._synthesizer.decode(
                passing.latents, passing.prepared.pixels, passing.chunk.index
            )
        passing.prepared = passing.audio = passing.latents = None
        return passing

    def _paste(self, passing: _Passing) -> _Passing:
        """Paste the generated faces into the chunk's pictures; others pass through."""
        chunk, synced = passing.chunk, passing.synced
        passing.frames = list(chunk.frames)
        if synced is None:
            return passing
        places = [place for place, matrix in enumerate(chunk.matrices) if matrix is not None]
        frames = [chunk.frames[place] for place in places]
        matrices = [matrix for matrix in chunk.matrices if matrix is not None]
        if self._job.tracker.batch is not None:
            pasted = self._job.tracker.batch.restore(frames, synced[places], matrices)
        else:
            faces = synced.float().cpu()[places]
            pasted = [restore_face(*each) for each in zip(frames, faces, matrices, strict=True)]
        for place, frame in zip(places, pasted, strict=True):
            passing.frames[place] = frame
        return passing

    def _result(self, passing: _Passing, seconds: float) -> ChunkResult:
        chunk = passing.chunk
        return ChunkResult(
            index=chunk.index,
            frame_indices=list(range(chunk.start, chunk.start + len(chunk))),
            total=self._job.count,
            original=chunk.frames,
            faces=chunk.faces,
            synced=passing.synced,
            frames=passing.frames,
            has_face=chunk.has_face,
            seconds=seconds,
        )


def _each(work: Callable[[_Passing], _Passing]) -> Callable[[list[_Passing]], list[_Passing]]:
    """Work on chunks, for groups of them."""
    return lambda group: [work(passing) for passing in group]
