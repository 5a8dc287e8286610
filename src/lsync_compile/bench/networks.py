"""The networks of a LatentSync checkpoint with random weights, and calls of them as a run makes.

Speed does not depend on what weights say, so full-size checkpoints need not be at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from lsync_compile.bench.timing import measure
from lsync_compile.media.mask import mouth_mask
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.unet import UNet3DConditionModel
from lsync_compile.runtime.context import step_context
from lsync_compile.runtime.region import make_region, mouth_region


def random_unet(config: dict[str, Any], device: torch.device) -> UNet3DConditionModel:
    """A UNet of ``config`` in float32 whose every layer matters: no zero-initialised ones."""
    torch.manual_seed(0)
    with torch.device(device):
        unet: UNet3DConditionModel = UNet3DConditionModel.from_config(config)
        for parameter in unet.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    unet.eval().requires_grad_(False)
    return unet


def random_inputs(
    config: dict[str, Any], frames: int, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Inputs of one step: latents with conditions, a timestep, 50 audio tokens a frame.

    A batch of two is the pipeline's for guidance: the same sample twice, the first half unheard.
    """
    generator = torch.Generator(device).manual_seed(1)
    side = config["sample_size"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    sample = normal(1, config["in_channels"], frames, side, side)
    audio = normal(frames, 50, config["cross_attention_dim"])
    if batch == 2:
        sample = torch.cat([sample, sample])
        audio = torch.cat([torch.zeros_like(audio), audio])
    return {
        "sample": sample,
        "timestep": torch.tensor(501, device=device),
        "encoder_hidden_states": audio,
    }


class Steps:
    """The UNet's calls of a run, one a call, each in its place as the pipeline's are.

    Args:
        call: the UNet.
        inputs: of :func:`random_inputs`; the sample is the same in all steps.
        steps: steps a chunk.
    """

    def __init__(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor], steps: int):
        self.call = call
        self.inputs = inputs
        scheduler = default_scheduler()
        scheduler.set_timesteps(steps, device=inputs["sample"].device)
        self.timesteps = scheduler.timesteps
        self.values = scheduler.timesteps.tolist()
        guided = len(inputs["sample"]) == 2
        promises = ("constant_channels", "guidance", "null_audio")
        self.vouched = frozenset(promises if guided else promises[:1])
        self.run = object()
        self.done = 0
        side = inputs["sample"].shape[-1]
        self.region = make_region(mouth_mask(side), side)

    def __call__(self, step: int | None = None) -> torch.Tensor:
        """The next step; or the first of a new chunk with ``inputs``' own timestep if ``step``
        is 0, for a comparison of values."""
        steps = len(self.values)
        if step is None:
            chunk, place = divmod(self.done, steps)
            timestep, value = self.timesteps[place], self.values[place]
            self.done += 1
        else:
            self.done += -self.done % steps + steps
            chunk, place = self.done // steps - 1, step
            timestep, value = self.inputs["timestep"], float(self.inputs["timestep"])
        arguments = {**self.inputs, "timestep": timestep}
        with (
            step_context(
                self.run, chunk, place, steps, "reuse", timestep=value, vouched=self.vouched
            ),
            mouth_region(self.region),
            torch.no_grad(),
        ):
            output: torch.Tensor = self.call(**arguments).sample
        return output

    def chunk(self) -> None:
        """All steps of the next chunk."""
        self.done += -self.done % len(self.values)
        for _ in self.values:
            self()


def random_vae(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A VAE of noise of unit gain."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(**config)
        for parameter in vae.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return vae.to(dtype).eval().requires_grad_(False)


def arithmetic_ceiling(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product on random data."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (measure(lambda: a @ b, device).p50 * 1e-3)
