"""Step counts from changes of the face, timesteps to run, and steps between any two of them."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from lsync_compile.errors import OptionError
from lsync_compile.models.conditions import Prepared
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.runtime.timesteps import (
    SOLVERS,
    AdaptiveTimestepScheduler,
    Change,
    ChangeMeter,
    can_jump,
    levels,
    make_solver,
    spread,
)


@pytest.mark.parametrize(
    ("mean", "steps"),
    [(0.0, 10), (0.0099, 10), (0.01, 15), (0.049, 15), (0.05, 20), (0.2, 20), (0.21, 30)],
)
def test_steps_follow_the_change(mean: float, steps: int) -> None:
    assert AdaptiveTimestepScheduler().steps(Change(mean, cut=False)) == steps


def test_nothing_known_takes_the_base() -> None:
    assert AdaptiveTimestepScheduler(base=12).steps(None) == 12


def test_three_quarters_are_never_below_the_minimum() -> None:
    assert AdaptiveTimestepScheduler(base=12, minimum=11).steps(Change(0.02, cut=False)) == 11


@pytest.mark.parametrize(
    "wrong",
    [{"base": 0}, {"minimum": 31}, {"maximum": True}, {"thresholds": (0.05, 0.01, 0.2)}],
)
def test_wrong_numbers_are_refused(wrong: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        AdaptiveTimestepScheduler(**wrong)


def face(*values: float, frames: int = 3) -> Prepared:
    """Faces of one grey after the other, each for some frames."""
    pixels = [torch.full((frames, 3, 8, 8), value) for value in values]
    return Prepared(torch.cat(pixels), [])


def test_change_is_the_mean_squared_difference_of_unit_pixels() -> None:
    meter = ChangeMeter()
    assert meter(0, face(0.0)) is None
    change = meter(1, face(0.2))  # 0.1 of the range
    assert change is not None
    assert change.mean == pytest.approx(0.01)
    assert not change.cut


def test_a_cut_is_seen_at_the_start_and_inside() -> None:
    meter = ChangeMeter()
    meter(0, face(0.0))
    at_start = meter(1, face(0.4))
    inside = meter(2, face(0.4, 0.8))
    slow = meter(3, face(0.6, 0.4, 0.2, 0.0, frames=1))
    assert at_start is not None
    assert at_start.cut
    assert inside is not None
    assert inside.cut
    assert slow is not None
    assert not slow.cut
    assert slow.mean > 0.05


def test_after_a_gap_nothing_is_known() -> None:
    meter = ChangeMeter()
    meter(0, face(0.0))
    assert meter(2, face(0.0)) is None


def test_spread_starts_at_the_first_step() -> None:
    assert spread(5, 20) == [0, 4, 8, 12, 16]
    assert spread(3, 20) == [0, 7, 13]
    assert spread(20, 20) == list(range(20))
    assert spread(1, 20) == [0]


@pytest.mark.parametrize("name", SOLVERS)
def test_levels_keep_the_variance(name: str) -> None:
    scheduler = make_solver(default_scheduler(), name)
    scheduler.set_timesteps(7)
    ladder = levels(scheduler)
    assert len(ladder) == 8
    for level in ladder:
        assert level.signal**2 + level.noise**2 == pytest.approx(1, abs=1e-5)
    assert ladder[0].noise > 0.98
    assert ladder[-1].noise < 0.04


def test_a_jump_between_neighbours_is_ddims_step() -> None:
    scheduler = default_scheduler()
    scheduler.set_timesteps(6)
    ladder = levels(scheduler)
    latents, noise = torch.randn(2, 1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for index, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(noise, timestep, latents).prev_sample
        ours = ladder[index].jump(latents, noise, ladder[index + 1])
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_asking_for_levels_changes_no_later_step() -> None:
    latents = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in SOLVERS:
        asked, plain = (make_solver(default_scheduler(), name) for _ in range(2))
        for scheduler in (asked, plain):
            scheduler.set_timesteps(5)
        levels(asked)
        x, y = latents, latents
        for timestep in plain.timesteps:
            x = asked.step(x.sin(), timestep, x).prev_sample
            y = plain.step(y.sin(), timestep, y).prev_sample
        assert torch.equal(x, y), name


def test_what_draws_noise_or_predicts_something_else_never_jumps() -> None:
    scheduler = default_scheduler()
    assert can_jump(scheduler, 0.0)
    assert not can_jump(scheduler, 0.5)
    assert not can_jump(type(scheduler).from_config(scheduler.config, prediction_type="sample"), 0)
    sde = make_solver(scheduler, "dpmpp_2m")
    assert can_jump(sde, 0.0)
    sde = type(sde).from_config(sde.config, algorithm_type="sde-dpmsolver++")
    assert not can_jump(sde, 0.0)
    assert not can_jump(EulerDiscreteScheduler.from_config(scheduler.config), 0.0)


def test_an_unknown_solver_is_named_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'unipc'"):
        make_solver(default_scheduler(), "unipcc")
