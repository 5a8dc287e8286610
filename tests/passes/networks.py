"""Networks that several passes are tested on, each captured once, and how to run one pass."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from captures import capture, captured_unet
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.census import op_name
from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.remove_noops import RemoveNoops
from lsync_compile.passes.spec import Pass
from lsync_compile.report import PassRecord

Captured = tuple[GraphModule, list[Any]]


def latentsync_unet() -> Captured:
    """LatentSync's UNet, two layers a level, from ``captures``."""
    _, gm, inputs = captured_unet()
    return gm, inputs


def stable_diffusion_unet() -> Captured:
    """diffusers' UNet with the blocks of Stable Diffusion 1.5, without what does nothing."""
    return _fresh(*_stable_diffusion_unet())


def vae_encoder() -> Captured:
    """The encoder of Stable Diffusion's VAE."""
    return _fresh(*_vae()[0])


def vae_decoder() -> Captured:
    """The decoder of Stable Diffusion's VAE."""
    return _fresh(*_vae()[1])


def make_stable_diffusion_unet() -> nn.Module:
    """diffusers' UNet with the blocks of Stable Diffusion 1.5 at small width, noise in it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    return _with_noise(unet)


def stable_diffusion_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Of one step with guidance: sample, timestep, text."""
    return _noise(2, 4, 16, 16), torch.tensor(501), _noise(2, 7, 32)


def make_vae() -> AutoencoderKL:
    """diffusers' VAE with the blocks of Stable Diffusion at small width, noise in it."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
    )
    return _with_noise(vae)


def vae_inputs() -> tuple[Tensor, Tensor]:
    """A picture for the encoder and latents for the decoder."""
    return _noise(1, 3, 64, 64), _noise(1, 4, 8, 8)


@functools.cache
def _stable_diffusion_unet() -> Captured:
    return _captured(make_stable_diffusion_unet(), *stable_diffusion_inputs())


@functools.cache
def _vae() -> tuple[Captured, Captured]:
    vae, (picture, latents) = make_vae(), vae_inputs()
    return _captured(vae.encoder, picture), _captured(vae.decoder, latents)


def _with_noise(module: Any) -> Any:
    """The module with noise in every matrix, for inference."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def _captured(module: nn.Module, *inputs: Tensor) -> Captured:
    """The graph without no-ops."""
    with torch.no_grad():
        gm, values = capture(module, *inputs)
    PassManager(Options(), [RemoveNoops]).run(gm, "module", "graph")
    return gm, values


def _fresh(gm: GraphModule, inputs: list[Any]) -> Captured:
    return copy_graph(gm), inputs


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_pass(
    gm: GraphModule, cls: type[Pass], target: str = "unet", **options: Any
) -> tuple[GraphModule, PassRecord]:
    """A copy of the graph after this pass alone, kernels on, and the record of it."""
    copy = copy_graph(gm)
    # Alone: what it comes after is another test's.
    alone = type(cls.__name__, (cls,), {"spec": replace(cls.spec, after=())})
    with torch.no_grad():
        settings = Options(**{"kernels": "on", **options})
        (record,) = PassManager(settings, [alone]).run(copy, target, "graph")
    copy.graph.lint()
    return copy, record


def ops(gm: GraphModule) -> Counter[str]:
    """How often each operation is called."""
    return Counter(op_name(node) for node in gm.graph.nodes if node.op.startswith("call"))


def results(gm: GraphModule, inputs: Sequence[Any]) -> Any:
    """What the graph computes, without gradients."""
    with torch.no_grad():
        return gm(*inputs)


def distance(one: Tensor, other: Tensor) -> float:
    """``|one - other| / |other|`` in float64."""
    return float((one.double() - other.double()).norm() / other.double().norm())
