"""diffusers' Stable Diffusion and AnimateDiff pipelines, and all others that have the same parts.

Their loops are their own; the tracker follows them. Of those named here it is known that guidance
doubles the latents into one batch of two equal halves. It is not said of others: some double the
latents and change a half.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lsync_compile.integrations.adapter import Adapter

# Classes, by name, whose loops put the same latents and timestep into both halves of the batch.
DOUBLING = frozenset(
    {
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "AnimateDiffPipeline",
    }
)


def fits(pipeline: Any) -> bool:
    """Whether a pipeline is one of diffusers' that are known."""
    kind = type(pipeline)
    return kind.__module__.startswith("diffusers.") and kind.__name__ in DOUBLING


def vouch(pipeline: Any, sample: Tensor, text: Tensor | None) -> frozenset[str]:
    """Two equal halves where guidance is on."""
    guided = bool(getattr(pipeline, "do_classifier_free_guidance", False))
    return frozenset({"guidance"} if guided and len(sample) % 2 == 0 else ())


DIFFUSERS = Adapter("diffusers pipeline", fits, vouch=vouch)
OTHER = Adapter("pipeline of another kind", lambda pipeline: True)
