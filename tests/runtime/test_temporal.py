"""What one chunk's denoising hands to the next."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.runtime.temporal import Path, TemporalCoherenceOptimizer
from lsync_compile.runtime.timesteps import Level

LADDER = [Level((1 - n * n) ** 0.5, n) for n in (0.99, 0.8, 0.5, 0.2, 0.0)]
SHAPE = (1, 4, 3, 8, 8)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def walked(model: object, start: Tensor) -> tuple[Path, Tensor]:
    """All steps of the ladder with ``model(latents)`` for the predicted noise."""
    path, latents = Path(LADDER), start
    for one, other in itertools.pairwise(LADDER):
        predicted = model(latents)  # type: ignore[operator]
        path.record(latents, predicted)
        latents = one.jump(latents, predicted, other)
    return path, latents


def test_a_long_step_with_its_error_is_the_short_ones() -> None:
    """Exactly so for the mean over frames, and for all frames of a linear model."""
    start = random(0)
    path, end = walked(lambda x: 0.7 * x, start)
    memory = TemporalCoherenceOptimizer("path")
    memory.keep(0, start, end, path)
    assert memory.path is path
    jumped = LADDER[0].jump(start, 0.7 * start, LADDER[4]) + path.error(0, 4)
    torch.testing.assert_close(jumped.mean(2), end.mean(2), atol=1e-5, rtol=1e-5)
    plain = LADDER[0].jump(start, 0.7 * start, LADDER[4])
    assert (plain.mean(2) - end.mean(2)).abs().max() > 0.05  # there was something to add


def test_a_short_step_has_no_error() -> None:
    path, end = walked(torch.tanh, random(1))
    path.latents.append(end.mean(2, keepdim=True))
    for index in range(4):
        assert path.error(index, index + 1).abs().max() < 1e-5


def test_only_the_chunk_after_knows() -> None:
    memory = TemporalCoherenceOptimizer()
    assert not memory.knows(0)
    path, end = walked(torch.tanh, random(1))
    memory.keep(3, end, end, path)
    assert memory.knows(4)
    assert not memory.knows(5)
    memory.keep(4, end, end, None)
    assert memory.knows(5)
    memory.reset()
    assert not memory.knows(5)


def test_every_so_manieth_chunk_is_denoised_in_full() -> None:
    memory = TemporalCoherenceOptimizer(refresh=3)
    end = random(1)
    full = []
    for chunk in range(7):
        full.append(not memory.knows(chunk))
        memory.keep(chunk, end, end, walked(torch.tanh, end)[0] if full[-1] else None)
    assert full == [True, False, False, True, False, False, True]


def test_a_start_has_the_variance_of_its_level() -> None:
    clip, noise = torch.zeros(1, 4, 1, 128, 128), random(2, 1, 4, 1, 128, 128)
    for share in (0.0, 0.01, 0.6):
        memory = TemporalCoherenceOptimizer("renoise", noise=share)
        memory.keep(0, clip, clip, None)
        started = memory.start(clip, noise, LADDER[1], torch.Generator().manual_seed(3))
        assert started.std().item() == pytest.approx(0.8, rel=0.01)


def test_a_start_is_the_clip_and_what_changed_about_it() -> None:
    clip, result, noise = random(1), random(2), random(3, 1, 4, 1, 8, 8)
    memory = TemporalCoherenceOptimizer("renoise", momentum=0.7, noise=0.0)
    memory.keep(0, clip, result, None)
    now = random(4)
    started = memory.start(now, noise, Level(0.6, 0.8))
    change = (result - clip)[:, :, -1:]
    torch.testing.assert_close(started, 0.6 * (now + 0.7 * change) + 0.8 * noise)


def test_no_share_of_fresh_noise_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    memory = TemporalCoherenceOptimizer("renoise", noise=0.0)
    memory.keep(0, random(1), random(1), None)
    memory.start(random(1), random(3, 1, 4, 1, 8, 8), LADDER[1], generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("wrong", [{"method": "x"}, {"momentum": 1.1}, {"noise": -1}])
def test_wrong_numbers_are_refused(wrong: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        TemporalCoherenceOptimizer(**wrong)
