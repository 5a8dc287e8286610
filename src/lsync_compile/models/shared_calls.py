"""Calls of the UNet for the chunks that share them, with guidance or what is known of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsync_compile.models.conditions import joined, vouched_inputs
from lsync_compile.models.job import Job
from lsync_compile.runtime.batching import Lane, Predict
from lsync_compile.runtime.context import step_context
from lsync_compile.runtime.transfers import uploaded


def shared_calls(vae: Any, unet: Any, job: Job, run: Hashable, lanes: Sequence[Lane]) -> Predict:
    """Calls for several lanes, in steps of the first one's walk.

    Args:
        vae, unet: the run's.
        job: its arguments.
        run: its identity, for the step context.
        lanes: with the same steps; what a walk says of guidance is that of the first.
    """
    walk = lanes[0].walk
    timesteps, values = walk.timesteps, walk.timesteps.tolist()
    on_device = uploaded(timesteps, walk.latents.device)
    both = joined([lane.conditions for lane in lanes], job.guided)
    guided = walk.guided if job.guided and walk.guided is not None else len(values)
    heard = both.heard() if guided < len(values) else both
    made_by_sound = torch.empty(0)

    def predict(step: int, latents: Sequence[Tensor]) -> list[Tensor]:
        nonlocal made_by_sound
        samples = [
            lane.scheduler.scale_model_input(each, timesteps[step])
            for lane, each in zip(lanes, latents, strict=True)
        ]
        halves = job.guided and step < guided
        conditions = both if step < guided else heard
        vouched = vouched_inputs(vae, unet, guided=halves)
        sample = torch.cat([*samples, *samples] if halves else samples)
        sample = torch.cat([sample, conditions.fixed], dim=1)
        with step_context(
            run,
            walk.chunk,
            step,
            len(values),
            "reuse",
            timestep=values[step],
            vouched=vouched,
        ):
            noise: Tensor = unet(
                sample, on_device[step], encoder_hidden_states=conditions.audio
            ).sample
        if halves:
            null, with_sound = noise.chunk(2)
            made_by_sound = with_sound - null
            noise = null + job.guidance_scale * made_by_sound
        elif job.guided:
            noise = noise + (job.guidance_scale - 1) * made_by_sound
        return list(noise.split(1))

    return predict
