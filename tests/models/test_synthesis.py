"""One chunk through the networks: how it is encoded, apart from clips and files."""

from __future__ import annotations

import pytest
import torch
from fixtures import recorded_job
from torch import Tensor

from lsync_compile.models.conditions import redrawn
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.options import resolve_options
from lsync_compile.report import Session
from lsync_compile.runtime.region import MouthRegion, current_region

FRAMES = 5


def synthesizer(
    pipeline: LatentSyncPipeline, seed: int = 3, session: Session | None = None
) -> ChunkSynthesizer:
    """For a run without clip and sound, which the networks never see."""
    job = recorded_job(pipeline, FRAMES, steps=2, seed=seed, session=session)
    return ChunkSynthesizer(
        pipeline.vae, pipeline.unet, pipeline.scheduler, job, torch.device("cpu")
    )


@pytest.fixture
def pictures() -> list[Tensor]:
    """Two sets of faces in [-1, 1], unlike each other."""
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.rand(FRAMES, 3, 64, 64, generator=generator) - 1 for _ in range(2)]


def test_one_encoder_call_gives_what_two_give(
    tiny_pipeline: LatentSyncPipeline, pictures: list[Tensor]
) -> None:
    batches: list[int] = []
    tiny_pipeline.vae.encoder.register_forward_pre_hook(
        lambda _, args: batches.append(len(args[0]))
    )
    apart, joint = synthesizer(tiny_pipeline), synthesizer(tiny_pipeline)
    assert not apart.joint_encoding  # on a CPU
    joint.joint_encoding = True
    with torch.no_grad():
        expected, found = (
            apart._draw(apart._moments(pictures)),
            joint._draw(joint._moments(pictures)),
        )
    assert batches == [FRAMES, FRAMES, 2 * FRAMES]
    assert found[0].shape == (1, 4, FRAMES, 8, 8)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # The generator stands where it stood: the next chunk's draws are the same too.
    assert torch.equal(joint.job.generator.get_state(), apart.job.generator.get_state())


def test_the_masked_faces_are_drawn_before_the_reference(
    tiny_pipeline: LatentSyncPipeline, pictures: list[Tensor]
) -> None:
    """As in the original: the first draw of the chunk belongs to the masked faces."""
    synthesize = synthesizer(tiny_pipeline)
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, 4, 1, 8, 8, generator=generator)  # the run's initial noise
    with torch.no_grad():
        for joint in (False, True):
            synthesize.joint_encoding = joint
            found = synthesize._draw(synthesize._moments(pictures))
            for pixels, latents in zip(pictures, found, strict=True):
                posterior = tiny_pipeline.vae.encode(pixels).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=generator)
                expected = 0.18215 * (posterior.mean + posterior.std * noise)
                torch.testing.assert_close(latents[0].transpose(0, 1), expected, atol=1e-5, rtol=0)


def test_conditions_have_mask_masked_and_reference_channels_twice(
    tiny_pipeline: LatentSyncPipeline,
) -> None:
    faces = torch.randint(0, 256, (FRAMES, 3, 64, 64), dtype=torch.uint8)
    audio = torch.randn(FRAMES, 50, 384)
    with torch.no_grad():
        synthesize = synthesizer(tiny_pipeline)
        conditions = synthesize._condition(synthesize.prepare(faces), audio)
    assert conditions.fixed.shape == (2, 9, FRAMES, 8, 8)
    assert torch.equal(conditions.fixed[0], conditions.fixed[1])
    assert set(conditions.fixed[:, 0].unique().tolist()) == {0.0, 1.0}
    assert conditions.audio is not None
    assert torch.equal(conditions.audio[:FRAMES], torch.zeros_like(audio))
    assert torch.equal(conditions.audio[FRAMES:], audio)


def test_crop_encode_is_told_of_pairs_in_one_call_and_taken_back_where_the_guard_falls_back(
    tiny_pipeline: LatentSyncPipeline,
) -> None:
    calls: list[tuple[int, MouthRegion | None]] = []
    tiny_pipeline.vae.encoder.register_forward_pre_hook(
        lambda _, args: calls.append((len(args[0]), current_region()))
    )
    session = Session("run", resolve_options("exact", crop_encode=True, guard_every=9))
    synthesize = synthesizer(tiny_pipeline, session=session)
    faces = torch.randint(0, 256, (FRAMES, 3, 64, 64), dtype=torch.uint8)
    audio = torch.randn(FRAMES, 50, 384)
    prepared = synthesize.prepare(faces)
    assert prepared.cropped
    ((pictures, region),) = calls
    assert pictures == 2 * FRAMES
    assert region is not None
    assert region.side == 8
    assert synthesize.guard is not None
    synthesize.guard._since.append(1)  # from chunk 1 on exact
    synthesize.denoise(0, prepared, audio, lambda _: None)
    assert len(calls) == 1
    synthesize.denoise(2, prepared, audio, lambda _: None)
    assert calls[1:] == [(FRAMES, None)] * 2


def test_conditions_are_drawn_again_by_the_same_numbers(tiny_pipeline: LatentSyncPipeline) -> None:
    faces = torch.randint(0, 256, (2, FRAMES, 3, 64, 64), dtype=torch.uint8)
    audio = torch.randn(FRAMES, 50, 384)
    found = []
    with torch.no_grad():
        for picture in faces:
            synthesize = synthesizer(tiny_pipeline)
            prepared = synthesize.prepare(picture)
            found.append((prepared.moments[0], synthesize._condition(prepared, audio)))
    (before, conditions), (after, expected) = found
    again = redrawn(conditions, before, after, tiny_pipeline.vae.config.scaling_factor, 0.0)
    assert again.audio is conditions.audio
    torch.testing.assert_close(again.fixed[:, 1:5], expected.fixed[:, 1:5], rtol=1e-3, atol=1e-4)
    assert torch.equal(again.fixed[:, 5:], conditions.fixed[:, 5:])
    assert torch.equal(again.fixed[:, :1], conditions.fixed[:, :1])
