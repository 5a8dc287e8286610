"""Skip joins: all of the real UNet's, and nothing that only looks like one."""

from __future__ import annotations

import torch
from captures import capture, captured_unet
from torch import Tensor

from lsync_compile.graph.modules import module_path
from lsync_compile.graph.skips import depends_on, skip_joins


def test_the_real_unet_has_twelve() -> None:
    _, gm, _ = captured_unet()
    joins = skip_joins(gm.graph)
    assert len(joins) == 12
    levels = [module_path(join.node).split(".")[1] for join in joins]
    assert levels == [str(index // 3) for index in range(12)]  # three a level, innermost first
    assert all(depends_on(join.below, join.kept) for join in joins)
    assert not any(depends_on(join.kept, join.below) for join in joins)


def test_diffusers_stable_diffusion_unet_has_its_own() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    with torch.no_grad():
        gm, _ = capture(
            unet, torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 7, 8), return_dict=False
        )
    assert len(skip_joins(gm.graph)) == 4  # conv_in, one resnet a level, one downsampler


def test_other_concatenations_are_none() -> None:
    def other(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        kept = x + 1
        below = kept * 2
        return (
            torch.cat([x.sin(), x.cos()], 1),  # independent
            torch.cat([kept, below], 1),  # the wrong way round
            torch.cat([below, kept], 0),  # along the batch
            torch.cat([below, kept, y], 1),  # three operands
            torch.cat([below.cos(), kept], dim=1),  # a skip join
        )

    gm, _ = capture(other, torch.ones(2, 3), torch.ones(2, 3))
    (join,) = skip_joins(gm.graph)
    assert join.below.target == "cos"
    assert not depends_on(join.kept, join.kept)
