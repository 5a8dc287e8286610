"""The census counts what torch's own counter counts when the module runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet, unet_inputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lsync_compile.graph.census import census
from lsync_compile.kernels import spatial_attention, temporal_attention


def test_flops_of_the_real_unet_are_those_of_running_it() -> None:
    unet, gm, _ = captured_unet()
    inputs = {name: value.to("meta") for name, value in unet_inputs().items()}
    unet = type(unet).from_config(unet.config).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**inputs)
    counted = census(gm)
    assert counted.flops == counter.get_total_flops() > 0
    assert counted.ops["scaled_dot_product_attention"] == 72
    assert counted.nodes == sum(counted.ops.values()) == sum(part.nodes for part in counted.parts)
    shares = {part.name: part.flops / counted.flops for part in counted.parts}
    assert shares["temporal"] > 0.1
    assert shares["other"] < 1e-3  # the time embedding


def test_a_product_counts_two_for_each_multiplication() -> None:
    gm, _ = capture(lambda x, w: F.linear(x, w).relu(), torch.ones(2, 3), torch.ones(5, 3))
    counted = census(gm)
    assert counted.flops == 2 * 2 * 3 * 5
    assert counted.ops == {"linear": 1, "relu": 1}


def test_convolutions_count_outside_resnets_too() -> None:
    gm, _ = capture(nn.Conv2d(3, 4, 1), torch.ones(1, 3, 2, 2))
    (part,) = census(gm).parts
    assert (part.name, part.flops) == ("resnet and convolution", 2 * 3 * 4 * 4)


def test_an_own_attention_counts_as_the_one_it_replaces() -> None:
    q = torch.ones(6, 4, 16)
    own, _ = capture(lambda x: temporal_attention(x, x, x, 3, 2), q)
    spatial, _ = capture(lambda x: spatial_attention(x, x, x, 2), q)
    assert census(own).flops == 2 * 2 * (6 // 3) * 4 * 2 * 3 * 3 * 8
    assert census(spatial).flops == 2 * 2 * 6 * 2 * 4 * 4 * 8


def test_symbolic_sizes_are_refused() -> None:
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    def product(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    torch.compile(product, backend=backend, dynamic=True)(torch.ones(4, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="symbolic sizes"):
        census(graphs[0])
