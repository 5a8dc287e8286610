"""Guidance whose half without sound is computed in a chunk's first steps alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures import recorded_job, still_chunk
from torch import Tensor, nn

from lsync_compile.models.conditions import Prepared
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.options import resolve_options
from lsync_compile.report import Session
from lsync_compile.runtime.context import current

FRAMES, STEPS = 2, 6
PATH: dict[str, Any] = {"temporal_start": "path", "temporal_strength": 0.5}


class Calls:
    """The chunks of one run, with what each UNet call was given and gave."""

    def __init__(self, pipeline: LatentSyncPipeline, scale: float = 1.5, **options: Any) -> None:
        self.session = Session("run", resolve_options("exact", options))
        job = recorded_job(pipeline, FRAMES, steps=STEPS, seed=3, session=self.session)
        job = replace(job, guidance_scale=scale)
        self.synthesizer = ChunkSynthesizer(
            pipeline.vae, pipeline.unet, pipeline.scheduler, job, torch.device("cpu")
        )
        self.samples: list[Tensor] = []
        self.sounds: list[Tensor] = []
        self.results: list[Tensor] = []
        self.vouched: list[frozenset[str]] = []

    @property
    def batches(self) -> list[int]:
        return [len(sample) for sample in self.samples]

    def _look(self, _: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        self.samples.append(args[0])
        self.sounds.append(kwargs["encoder_hidden_states"])
        self.results.append(result.sample)
        context = current()
        assert context is not None
        self.vouched.append(context.vouched)

    def chunks(self, *inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        hook = self.synthesizer.unet.register_forward_hook(self._look, with_kwargs=True)
        try:
            prepared = [
                (number, self.synthesizer.prepare(faces), audio)
                for number, (faces, audio) in enumerate(inputs)
            ]
            return self.synthesizer.denoise_together(prepared, lambda _: None)
        finally:
            hook.remove()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """Faces and sound of a chunk."""
    return still_chunk(FRAMES)


def test_later_steps_take_what_the_sound_changed_in_the_last_of_the_first(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    run = Calls(tiny_pipeline, few_steps=3, guided_steps=2)
    (latents,) = run.chunks(inputs)
    assert run.batches == [2, 2, 1]
    assert torch.equal(run.sounds[2], inputs[1])
    assert torch.equal(run.samples[2][:, 4:], run.samples[1][1:, 4:])
    vouched = [{"guidance", "null_audio"} & each for each in run.vouched]
    assert vouched == [{"guidance", "null_audio"}] * 2 + [set()]
    # The last step from what the networks gave, by hand.
    null, heard = run.results[1].chunk(2)
    noise = run.results[2] + 0.5 * (heard - null)
    faces = Prepared(torch.zeros(FRAMES, 3, 8, 8), [])
    last = run.synthesizer.pace.begin(
        1, faces, latents, run.synthesizer.noise, tiny_pipeline.scheduler, {}
    )
    expected = last.advance(2, noise, run.samples[2][:, :4])
    torch.testing.assert_close(latents, expected)
    counted = run.session.report().features["guided_steps"]
    assert counted == {"steps": 6, "without_the_half": 2}  # the walk begun by hand included


def test_as_many_guided_steps_as_steps_change_no_bit(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    every, plain = Calls(tiny_pipeline, guided_steps=STEPS), Calls(tiny_pipeline)
    assert torch.equal(every.chunks(inputs)[0], plain.chunks(inputs)[0])
    assert every.batches == [2] * STEPS


def test_a_chunk_from_which_others_learn_is_guided_in_all_steps(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    run = Calls(tiny_pipeline, **PATH, guided_steps=1)
    run.chunks(inputs, inputs, inputs)
    assert run.batches == [2] * STEPS + [2, 1, 1] * 2


def test_chunks_that_share_calls_give_what_they_give_alone(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    other = inputs[0].flip(-1), inputs[1].flip(0)
    alone = Calls(tiny_pipeline, few_steps=3, guided_steps=1)
    shared = Calls(tiny_pipeline, few_steps=3, guided_steps=1, batch_chunks=2)
    expected, found = alone.chunks(inputs, other), shared.chunks(inputs, other)
    assert shared.batches == [4, 2, 2]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_guidance_it_does_nothing(
    tiny_pipeline: LatentSyncPipeline, inputs: tuple[Tensor, Tensor]
) -> None:
    run, plain = Calls(tiny_pipeline, 1.0, guided_steps=1), Calls(tiny_pipeline, 1.0)
    assert torch.equal(run.chunks(inputs)[0], plain.chunks(inputs)[0])
    assert run.batches == [1] * STEPS
    run.synthesizer.account()
    assert any("guided_steps does nothing" in note for note in run.session.report().notes)
