"""LatentSync's schedule."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler

from lsync_compile.models.scheduler import default_scheduler


def test_schedule_is_scaled_linear_and_offset_by_one() -> None:
    scheduler = default_scheduler()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(scheduler.betas, betas)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == list(range(951, 0, -50))


def test_estimates_are_not_clipped() -> None:
    scheduler = default_scheduler()
    scheduler.set_timesteps(20)
    sample, noise = torch.full((1, 4, 2, 2), 9.0), torch.zeros(1, 4, 2, 2)
    estimate = scheduler.step(noise, 951, sample).pred_original_sample
    torch.testing.assert_close(estimate, sample / scheduler.alphas_cumprod[951] ** 0.5)


def test_other_solvers_take_it_over() -> None:
    solver = DPMSolverMultistepScheduler.from_config(default_scheduler().config)
    torch.testing.assert_close(solver.alphas_cumprod, default_scheduler().alphas_cumprod)
