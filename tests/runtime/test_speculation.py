"""A chunk started from the one before: kept where it is close, taken back where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures import RecordedChunk, mini, mouth_psnr, recorded_chunks, recorded_job
from torch import Tensor

from lsync_compile.models.conditions import Conditions, Prepared
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.options import resolve_options
from lsync_compile.report import Session
from lsync_compile.runtime.batching import Lane

__all__ = ["mini", "recorded_chunks"]

FRAMES, STEPS = 2, 8  # looks at steps 0 and 2, starts at 4
CPU = torch.device("cpu")
ANYTHING, NOTHING = 10.0, 0.0
ROUNDING = {"atol": 2e-4, "rtol": 1e-4}


class Run:
    """A run of pairs of chunks."""

    def __init__(self, pipeline: LatentSyncPipeline, *, steps: int = STEPS, **options: Any) -> None:
        self.session = Session("run", resolve_options("exact", batch_chunks=2, **options))
        job = recorded_job(pipeline, FRAMES, steps=steps, seed=3, session=self.session)
        self.synthesizer = ChunkSynthesizer(
            pipeline.vae, pipeline.unet, pipeline.scheduler, job, CPU
        )
        self.batches: list[int] = []
        self.progress: list[int] = []

    def __call__(self, chunks: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        synthesizer = self.synthesizer
        hook = synthesizer.unet.register_forward_pre_hook(
            lambda _, args: self.batches.append(len(args[0]))
        )
        inputs = [
            (number, synthesizer.prepare(faces), audio)
            for number, (faces, audio) in enumerate(chunks)
        ]
        try:
            return synthesizer.denoise_together(inputs, self.progress.append)
        finally:
            hook.remove()
            synthesizer.account()

    @property
    def counted(self) -> dict[str, float]:
        return self.session.report().features["speculation"]


@pytest.fixture
def pair() -> list[tuple[Tensor, Tensor]]:
    """Faces and sound of two chunks of one shot."""
    generator = torch.Generator().manual_seed(0)
    face = torch.randint(0, 250, (1, 3, 64, 64), generator=generator)
    sound = torch.randn(2, FRAMES, 50, 384, generator=generator)
    faces = [(face + number).expand(FRAMES, -1, -1, -1).to(torch.uint8) for number in range(2)]
    return list(zip(faces, sound, strict=True))


def test_what_passes_the_check_takes_part_of_the_steps(
    tiny_pipeline: LatentSyncPipeline, pair: list[tuple[Tensor, Tensor]]
) -> None:
    run = Run(tiny_pipeline, speculate=True, speculate_tolerance=ANYTHING)
    first, second = run(pair)
    assert run.batches == [4, 2, 4, 2, 4, 4, 4, 4]
    plain = Run(tiny_pipeline)(pair)
    torch.testing.assert_close(first, plain[0], **ROUNDING)
    assert not torch.equal(second, plain[1])
    found = run.counted
    assert (found["tried"], found["kept"], found["redone"]) == (1, 1, 0)
    assert (found["steps_saved"], found["steps_wasted"]) == (STEPS // 2 - 2, 0)
    assert found["largest_gap"] > 0
    assert run.progress == sorted(run.progress)
    assert run.progress[-1] == 2 * STEPS
    assert run.session.report().features["batching"]["batched"] == 2


def test_what_fails_the_check_is_done_as_if_nothing_had_been(
    tiny_pipeline: LatentSyncPipeline, pair: list[tuple[Tensor, Tensor]]
) -> None:
    run = Run(tiny_pipeline, speculate=True, speculate_tolerance=NOTHING)
    first, second = run(pair)
    assert run.batches == [4, 2, 4, *[2] * (STEPS - 3), *[2] * STEPS]
    alone = Run(tiny_pipeline)
    plain = [alone(pair[:1])[0], None]
    torch.testing.assert_close(first, plain[0], **ROUNDING)
    both = Run(tiny_pipeline)(pair)
    torch.testing.assert_close(second, both[1], **ROUNDING)
    found = run.counted
    assert (found["kept"], found["redone"]) == (0, 1)
    assert (found["steps_saved"], found["steps_wasted"]) == (0, 2)
    assert "speculate did nothing in a run" in str(run.session.report())
    assert run.progress == sorted(run.progress)
    assert run.session.report().features["batching"]["alone"] == 2


def test_what_does_not_look_alike_is_not_tried(
    tiny_pipeline: LatentSyncPipeline, pair: list[tuple[Tensor, Tensor]]
) -> None:
    other = [pair[0], (255 - pair[1][0], pair[1][1])]
    run = Run(tiny_pipeline, speculate=True, speculate_tolerance=ANYTHING)
    found, plain = run(other), Run(tiny_pipeline)(other)
    assert all(map(torch.equal, found, plain))
    assert (run.counted["tried"], run.counted["unlike"]) == (0, 1)


def test_b_after_a_is_b_alone(
    tiny_pipeline: LatentSyncPipeline, pair: list[tuple[Tensor, Tensor]]
) -> None:
    def b() -> list[Tensor]:
        return Run(tiny_pipeline, speculate=True, speculate_tolerance=ANYTHING)(pair)

    alone = b()
    Run(tiny_pipeline, speculate=True, steps=6)([(255 - faces, sound) for faces, sound in pair])
    assert all(map(torch.equal, b(), alone))


def test_without_memory_for_two_nothing_is_speculated(
    tiny_pipeline: LatentSyncPipeline,
    pair: list[tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Run(tiny_pipeline)(pair)
    forward = tiny_pipeline.unet.forward

    def too_large(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(tiny_pipeline.unet, "forward", too_large)
    run = Run(tiny_pipeline, speculate=True, speculate_tolerance=ANYTHING)
    for found, expected in zip(run(pair), plain, strict=True):
        torch.testing.assert_close(found, expected, **ROUNDING)
    assert run.counted["tried"] == 0


def test_bounds_on_the_trained_model(
    recorded_chunks: list[RecordedChunk], mini: LatentSyncPipeline
) -> None:
    """Well above the bar of `balanced`; and the check tells a chunk of another way."""
    full, tail = recorded_chunks[0], recorded_chunks[-1]

    def lane(run: Run, number: int, chunk: RecordedChunk, count: int, *, wrong: bool) -> Lane:
        fixed, audio = chunk.fixed[:, :, :count], chunk.audio[:count]
        if wrong:
            fixed = torch.cat([fixed[:, :1], -fixed[:, 1:].flip(-1)], dim=1)
        conditions = Conditions(
            torch.cat([torch.zeros_like(audio), audio]), torch.cat([fixed, fixed])
        )
        faces, scheduler = Prepared(torch.zeros(count, 3, 8, 8), []), run.synthesizer.scheduler
        run.synthesizer.speculator.look(number, faces)  # type: ignore[union-attr]
        walk = run.synthesizer.pace.begin(number, faces, fixed[:, -4:], tail.noise, scheduler, {})
        return Lane(walk, conditions, scheduler, faces)

    def denoise(*, wrong: bool) -> tuple[Run, list[Tensor]]:
        run = Run(mini, steps=20, speculate=True)
        count = 2 if wrong else len(tail)  # only the right one's result is on record
        lanes = [lane(run, 0, full, count, wrong=False), lane(run, 1, tail, count, wrong=wrong)]
        speculator = run.synthesizer.speculator
        assert speculator is not None
        assert speculator.worth(lanes)
        with torch.no_grad():
            return run, speculator.run(lanes, run.synthesizer._shared_calls, lambda _: None)

    run, (_, found) = denoise(wrong=False)
    assert mouth_psnr(mini, tail, found) > 50
    assert run.counted["steps_saved"] == 8
    run, found = denoise(wrong=True)
    assert run.counted["largest_gap"] > 0.15
    assert len(found) == 1
