"""What docs/integrations.md says of pipelines on which the other tests here do not show it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, StableDiffusionInpaintPipeline
from test_diffusers import compiled, make, run
from test_upstream import compiled as compiled_upstream
from torch import Tensor
from upstream_standin import LipsyncPipeline, OneConvolution, clip

from lsync_compile.models.pipeline import LatentSyncPipeline

EAGER = {
    "preset": "exact",
    "lowering": "eager",
    "guidance_prefix": False,
    "null_audio": False,
    "compile_vae": False,
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def inpainting() -> tuple[Any, dict[str, Any]]:
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    pipeline = make(StableDiffusionInpaintPipeline, channels=9)
    return pipeline, {"image": picture, "mask_image": mask, "strength": 0.75}


def animation() -> tuple[Any, dict[str, Any]]:
    return make(AnimateDiffPipeline), {"num_frames": 2}


@pytest.mark.parametrize("made", [inpainting, animation])
def test_inpainting_and_animation(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Callbacks, progress, other steps without compiling, dtypes, undo, and the UNet alone."""
    pipeline, more = made()
    expected = run(pipeline, **more)
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        seen.append(step)
        return tensors

    fast = compiled(pipeline)
    fast.set_progress_bar_config(disable=False)
    assert torch.equal(run(fast, callback_on_step_end=callback, **more), expected)
    steps = len(seen)
    assert seen == list(range(steps))
    assert f"{steps}/{steps}" in capsys.readouterr().err
    fast.set_progress_bar_config(disable=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = run(fast, 5, **more)
    assert not torch.equal(other, expected)
    assert fast.lsync.report().counters["graphs"] == 1

    fast.to(torch.float64).to(torch.float32)  # other tensors with the same values
    assert torch.equal(run(fast, 5, **more), other)
    assert fast.lsync.report().counters["graphs"] == 1
    plain = fast.lsync.undo()
    assert torch.equal(run(plain, 5, **more), other)

    plain.unet.compile(backend="lsync", options={"lowering": "eager"})
    assert torch.equal(run(plain, **more), expected)


def test_latentsyncs_own_in_another_dtype_and_back() -> None:
    pipeline = LipsyncPipeline(OneConvolution)
    expected = pipeline(*clip())
    fast = compiled_upstream(pipeline, **EAGER)
    assert torch.equal(fast(*clip()), expected)
    pipeline.unet.to(torch.float64).to(torch.float32)
    assert torch.equal(fast(*clip()), expected)
    assert fast.lsync.report().counters["recompiles"] == 0


def test_ours_with_callbacks_progress_and_dtypes(
    tiny_pipeline: LatentSyncPipeline, make_clip: Any, make_speech: Any
) -> None:
    source, speech = make_clip(4), make_speech(0.16)

    def frames(pipe: Any, **more: Any) -> list[np.ndarray]:
        chunks = pipe.synthesize(
            source,
            speech,
            num_frames=4,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            **more,
        )
        return [frame for chunk in chunks for frame in chunk.frames]

    expected = frames(tiny_pipeline)
    fast = torch.compile(tiny_pipeline, backend="lsync", options=EAGER)
    steps: list[int] = []
    done: list[tuple[int, int]] = []
    found = frames(
        fast,
        callback=lambda step, timestep, latents: steps.append(step),
        progress=lambda so_far, total: done.append((so_far, total)),
    )
    assert all(map(np.array_equal, found, expected))
    assert steps == [0, 1]
    assert done[-1] == (2, 2)
    fast.to(torch.float64).to(torch.float32)
    assert all(map(np.array_equal, frames(fast), expected))
    assert fast.lsync.report().counters["recompiles"] == 0
