"""The noise schedule that LatentSync was trained with."""

from __future__ import annotations

from diffusers import DDIMScheduler


def default_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule under DDIM (Song et al., 2020), as LatentSync configures it.

    Other diffusers schedulers take it over with ``Other.from_config(scheduler.config)``.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
