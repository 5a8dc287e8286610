"""What a capture of a module reads, of the real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lsync_compile import LatentSyncPipeline
from lsync_compile.kept.state import (
    UnknownError,
    Watch,
    describe,
    modes,
    named_tensors,
    tensor_kind,
)


@pytest.fixture
def stable_diffusion() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=8,
    )  # fmt: skip


def test_the_networks_that_users_compile_can_be_described(
    tiny_pipeline: LatentSyncPipeline, stable_diffusion: nn.Module
) -> None:
    vae = tiny_pipeline.vae
    for module in (tiny_pipeline.unet, vae, vae.encoder, vae.decoder, stable_diffusion):
        assert describe(module) == describe(module)
        assert Watch(module).unchanged()


def test_each_attribute_of_each_module_is_part_of_it(tiny_pipeline: LatentSyncPipeline) -> None:
    """Every number and switch that any module of the UNet has, one after the other."""
    unet = tiny_pipeline.unet
    before, watch, changed = describe(unet), Watch(unet), 0
    seen: set[tuple[type, str]] = set()
    for module in unet.modules():
        for name, value in list(vars(module).items()):
            plain = isinstance(value, (bool, int, float)) and (type(module), name) not in seen
            if not plain or name.startswith("_"):
                continue
            seen.add((type(module), name))
            setattr(module, name, not value if isinstance(value, bool) else value + 1)
            assert describe(unet) != before, (type(module), name)
            assert not watch.unchanged(), (type(module), name)
            setattr(module, name, value)
            assert watch.unchanged()
            changed += 1
    assert changed > 30
    assert describe(unet) == before


def test_a_processor_of_diffusers_is_part_of_it(stable_diffusion: Any) -> None:
    attention = next(m for m in stable_diffusion.modules() if type(m).__name__ == "Attention")
    before, watch = describe(stable_diffusion), Watch(stable_diffusion)
    attention.processor.anything = 1
    assert not watch.unchanged()
    assert describe(stable_diffusion) != before
    attention.set_processor(lambda *args, **kwargs: None)
    with pytest.raises(UnknownError, match="lambda"):
        describe(stable_diffusion)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.half(),
        lambda module: module.to("meta"),
        lambda module: module.requires_grad_(requires_grad=False),
        lambda module: setattr(module[0], "bias", None),
        lambda module: module[0].register_buffer("more", torch.zeros(1)),
        lambda module: module.append(nn.SiLU()),
    ],
    ids=["dtype", "device", "gradient", "none", "buffer", "layer"],
)
def test_the_kinds_of_tensors_are_part_of_it(change: Callable[[Any], Any]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    before = describe(module)
    change(module)
    assert describe(module) != before


def test_values_are_not() -> None:
    module = nn.Linear(2, 3)
    before = describe(module)
    nn.init.zeros_(module.weight)
    module.bias = nn.Parameter(torch.ones(3))
    assert describe(module) == before


def test_tensors_by_path() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    paths = named_tensors(module)
    assert set(paths) == set(module.state_dict())
    assert named_tensors(nn.Linear(1, 1, bias=False)).keys() == {"weight"}
    assert tensor_kind(paths["0.weight"])[2:4] == ((4, 3, 3, 3), (27, 9, 3, 1))
    module[0].bias = module[1].bias
    with pytest.raises(UnknownError, match="shared"):
        named_tensors(module)


def test_a_watch_survives_values_that_cannot_be_compared() -> None:
    module = nn.Linear(2, 3)
    module.note = 1
    watch = Watch(module)
    module.note = torch.zeros(5)
    assert not watch.unchanged()


def test_modes_of_torch() -> None:
    with pytest.raises(UnknownError, match="gradients"):
        modes()
    with torch.no_grad():
        plain = modes()
        with torch.inference_mode():
            assert modes() != plain
        with torch.autocast("cpu"), pytest.raises(UnknownError, match="autocast"):
            modes()
        with torch.device("meta"), pytest.raises(UnknownError, match="mode"):
            modes()
