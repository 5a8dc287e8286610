"""What several rooms' tests compile: a small pipeline, the real UNet's graph, captured once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.models.config import LATENTSYNC_UNET
from lsync_compile.models.unet import UNet3DConditionModel

# LatentSync's layout with two layers a level, as in its checkpoints, at widths for a CPU.
UNET_CONFIG: dict[str, Any] = {
    **LATENTSYNC_UNET,
    "sample_size": 16,
    "block_out_channels": (32, 64, 64, 64),
}


def make_unet(layers: int = 2, levels: int = 4) -> nn.Module:
    """The real UNet with noise in every matrix: zero-initialised layers would hide errors.

    With fewer than four levels the lowest ones are left out; every kind of block stays.
    """
    torch.manual_seed(0)
    config = {
        **UNET_CONFIG,
        "layers_per_block": layers,
        "block_out_channels": UNET_CONFIG["block_out_channels"][:levels],
        "down_block_types": ("CrossAttnDownBlock3D",) * (levels - 1) + ("DownBlock3D",),
        "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * (levels - 1),
    }
    unet = UNet3DConditionModel.from_config(config).eval()
    for parameter in unet.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return unet.requires_grad_(False)


def unet_inputs(frames: int = 4, side: int = 16, batch: int = 2) -> dict[str, Tensor]:
    """Random inputs of one step with guidance."""
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, 13, frames, side, side, generator=generator),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": torch.randn(batch * frames, 50, 384, generator=generator),
    }


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, list]:
    """The one graph that dynamo makes of a call, and the inputs that belong to its placeholders."""
    graphs: list[tuple[GraphModule, list]] = []

    def backend(gm: GraphModule, inputs: list) -> Callable[..., Any]:
        graphs.append((gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False, fullgraph=True)(*args, **kwargs)
    (graph,) = graphs
    return graph


@functools.cache
def _captured_unet() -> tuple[nn.Module, GraphModule, list]:
    unet = make_unet()
    with torch.no_grad():
        return unet, *capture(unet, **unet_inputs())


def captured_unet() -> tuple[nn.Module, GraphModule, list]:
    """The real UNet, a fresh copy of its graph, and the graph's inputs."""
    unet, gm, inputs = _captured_unet()
    return unet, copy_graph(gm), inputs


class Attention(nn.Module):
    """A few operations of a UNet, with a no-op for a pass to find."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.conv(sample)) * timestep.to(sample.dtype).cos()
        return sample + self.dropout(hidden)


class Coder(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 1)

    def forward(self, picture: Tensor) -> Tensor:
        return self.conv(picture).tanh()


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Coder(3, 4)
        self.decoder = Coder(4, 3)

    def encode(self, picture: Tensor) -> Tensor:
        return self.encoder(picture)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


class Scheduler:
    def __init__(self) -> None:
        self.history: list[float] = []

    def step(self, noise: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        self.history.append(timestep.item())  # host code that dynamo must not see
        return latents - 0.1 * noise


class Pipeline:
    """A stand-in with what lsync looks for: unet, vae and scheduler, called from host code."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.unet = Attention().eval()
        self.vae = Vae().eval()
        self.scheduler = Scheduler()

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet, "vae": self.vae, "scheduler": self.scheduler}

    def to(self, target: Any) -> Pipeline:
        self.unet.to(target)
        self.vae.to(target)
        return self

    @torch.no_grad()
    def __call__(self, picture: Tensor, steps: int = 3) -> Tensor:
        latents = self.vae.encode(picture)
        for index in range(steps):
            timestep = torch.tensor(1000 - 1000 * index // steps)
            latents = self.scheduler.step(self.unet(latents, timestep), timestep, latents)
        return self.vae.decode(latents)


def picture(batch: int = 1, side: int = 8) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(2))
