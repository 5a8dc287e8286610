"""How a run's chunks are denoised under the options for steps, through the networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures import RecordedChunk, mini, mouth_psnr, recorded_chunks, recorded_job, still_chunk
from torch import Tensor

from lsync_compile.models.conditions import Conditions, Prepared
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.options import resolve_options
from lsync_compile.report import Session
from lsync_compile.runtime.batching import Lane

__all__ = ["mini", "recorded_chunks"]

FRAMES, STEPS = 2, 6
PATH = {"temporal_start": "path", "temporal_strength": 0.5}


class Run:
    """Chunks of one run, with the steps that the UNet took for each."""

    def __init__(self, pipeline: LatentSyncPipeline, *, steps: int = STEPS, **options: Any) -> None:
        self.session = Session("run", resolve_options("exact", options)) if options else None
        job = recorded_job(pipeline, FRAMES, steps=steps, seed=3, session=self.session)
        self.synthesizer = ChunkSynthesizer(
            pipeline.vae, pipeline.unet, pipeline.scheduler, job, torch.device("cpu")
        )
        self.timesteps: list[list[int]] = []
        self.progress: list[list[int]] = []

    def chunk(self, number: int, faces: Tensor, audio: Tensor) -> Tensor:
        steps: list[int] = []
        progress: list[int] = []
        self.timesteps.append(steps)
        self.progress.append(progress)
        hook = self.synthesizer.unet.register_forward_pre_hook(
            lambda _, args: steps.append(int(args[1]))
        )
        try:
            return self.synthesizer(number, faces, audio, progress.append)
        finally:
            hook.remove()

    def counted(self, feature: str) -> dict[str, float]:
        assert self.session is not None
        return self.session.report().features[feature]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """Faces and sound of a chunk."""
    return still_chunk(FRAMES)


def test_without_options_nothing_differs(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    plain, optioned = Run(tiny_pipeline), Run(tiny_pipeline, strict=True)
    for number in range(2):
        assert torch.equal(plain.chunk(number, *inputs), optioned.chunk(number, *inputs))
    tiny_pipeline.scheduler.set_timesteps(STEPS)
    assert plain.timesteps == [tiny_pipeline.scheduler.timesteps.tolist()] * 2


def test_few_steps_are_some_of_all(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    run = Run(tiny_pipeline, few_steps=3)
    run.chunk(0, *inputs)
    tiny_pipeline.scheduler.set_timesteps(STEPS)
    assert run.timesteps == [tiny_pipeline.scheduler.timesteps[::2].tolist()]
    assert run.progress == [[2, 4, 6]]  # of the steps that were announced
    assert run.counted("few_steps") == {"chunks": 1, "in_fewer_steps": 1, "steps_saved": 3}


def test_all_steps_as_jumps_are_the_schedulers(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    """The step between neighbours is DDIM's, so 5 of 6 differ from 6 by the one left out only."""
    run = Run(tiny_pipeline, few_steps=STEPS)
    assert torch.equal(run.chunk(0, *inputs), Run(tiny_pipeline).chunk(0, *inputs))


def test_path_makes_up_for_the_steps_left_out(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    full, few, path = (
        Run(tiny_pipeline),
        Run(tiny_pipeline, few_steps=3),
        Run(tiny_pipeline, **PATH),
    )
    results = []
    for run in (full, few, path):
        run.chunk(0, *inputs)
        results.append(run.chunk(1, *inputs))
    assert [len(steps) for steps in path.timesteps] == [6, 3]
    expected, plain, found = results
    lost, still_lost = (plain - expected).square().mean(), (found - expected).square().mean()
    assert still_lost < lost / 2  # of a random network, which is anything but smooth
    assert path.counted("temporal_start") == {
        "chunks": 2,
        "in_fewer_steps": 1,
        "steps_saved": 3,
        "known": 1,
        "scene_cuts": 0,
    }


@pytest.mark.parametrize("start", ["path", "renoise"])
def test_b_after_a_is_b_alone(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor], start: str
) -> None:
    options = {"temporal_start": start, "temporal_strength": 0.5, "adaptive_steps": False}

    def b() -> list[Tensor]:
        run = Run(tiny_pipeline, **options)
        return [run.chunk(number, *inputs) for number in range(3)]

    alone = b()
    other = Run(tiny_pipeline, steps=4, solver="unipc", **options)
    for number in range(2):
        other.chunk(number, inputs[0].flip(-1), inputs[1])
    assert all(map(torch.equal, b(), alone))


def test_an_error_leaves_nothing_stale(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    run = Run(tiny_pipeline, **PATH)
    run.chunk(0, *inputs)
    forward = tiny_pipeline.unet.forward
    tiny_pipeline.unet.forward = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        run.chunk(1, *inputs)
    tiny_pipeline.unet.forward = forward
    run.chunk(2, *inputs)
    assert [len(steps) for steps in run.timesteps] == [6, 1, 6]


def test_scene_cuts_and_gaps_are_denoised_in_full(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    run = Run(tiny_pipeline, **PATH)
    faces, audio = inputs
    run.chunk(0, faces, audio)
    run.chunk(1, 255 - faces, audio)  # another picture
    run.chunk(2, 255 - faces, audio)
    run.chunk(4, 255 - faces, audio)  # chunk 3 had no face
    assert [len(steps) for steps in run.timesteps] == [6, 6, 3, 6]
    assert run.counted("temporal_start")["scene_cuts"] == 1


def test_steps_follow_the_change_of_faces(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    run = Run(tiny_pipeline, adaptive_steps=True, adaptive_min_steps=2, adaptive_max_steps=9)
    faces, audio = inputs
    run.chunk(0, faces, audio)
    run.chunk(1, faces, audio)
    run.chunk(2, (faces * 0.6).to(torch.uint8), audio)
    run.chunk(3, torch.where(faces > 70, 0, 255).to(torch.uint8), audio)
    assert [len(steps) for steps in run.timesteps] == [6, 2, 6, 9]
    counted = run.counted("adaptive_steps")
    assert counted["steps_saved"] == 4 - 3
    assert counted["in_more_steps"] == 1


def test_renoise_runs_the_last_steps(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    """With multi-step solvers too, which begin anew in the middle."""
    for solver in ("ddim", "dpmpp_2m"):
        run = Run(tiny_pipeline, temporal_start="renoise", temporal_strength=0.5, solver=solver)
        for number in range(2):
            assert run.chunk(number, *inputs).isfinite().all()
        whole, part = run.timesteps
        assert part == whole[3:]


def test_a_sampler_that_draws_noise_is_left_alone(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    run = Run(tiny_pipeline, **PATH)
    run.synthesizer.job = replace(run.synthesizer.job, eta=1.0)
    run.synthesizer.pace._eta = 1.0
    run.chunk(0, *inputs)
    run.chunk(1, *inputs)
    assert [len(steps) for steps in run.timesteps] == [6, 6]


def test_bounds_on_the_trained_model(
    recorded_chunks: list[RecordedChunk], mini: LatentSyncPipeline
) -> None:
    """Five of 20 steps are above the bar of `balanced`; with a known path they are better still.

    The path is that of the first frames of the full chunk, so noise, person and place are those of
    the recorded short one, and face and sound others.
    """
    full, tail = recorded_chunks[0], recorded_chunks[-1]
    count = len(tail)

    def latents(chunk: RecordedChunk, run: Run, number: int) -> Tensor:
        synthesizer = run.synthesizer
        fixed, audio = chunk.fixed[:, :, :count], chunk.audio[:count]
        conditions = Conditions(
            torch.cat([torch.zeros_like(audio), audio]),
            torch.cat([fixed, fixed]),
        )
        faces = Prepared(torch.zeros(count, 3, 8, 8), [])  # no cut

        with torch.no_grad():
            walk = synthesizer.pace.begin(
                number, faces, fixed[:, -4:], chunk.noise, synthesizer.scheduler, {}
            )
            lane = Lane(walk, conditions, synthesizer.scheduler, faces)
            (found,) = synthesizer._denoise([lane], None)
        synthesizer.pace.finish(walk, found)
        return found

    few = Run(mini, steps=20, few_steps=5)
    path = Run(mini, steps=20, temporal_start="path", temporal_strength=0.25)
    plain = mouth_psnr(mini, tail, latents(tail, few, 0))
    latents(full, path, 0)
    corrected = mouth_psnr(mini, tail, latents(tail, path, 1))
    assert plain > 38
    assert corrected > plain + 2
    # The half without sound in the first of the five steps alone.
    path.synthesizer.pace._guided = 1
    assert mouth_psnr(mini, tail, latents(tail, path, 2)) > 45
