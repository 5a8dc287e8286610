"""Eager lowering: the plain module's bits, parameters and buffers as inputs."""

from __future__ import annotations

import torch
from captures import capture, captured_unet, unet_inputs
from torch import nn

from lsync_compile.graph.copying import copy_graph
from lsync_compile.lowering import get_lowering
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager


def test_the_real_unet_bit_for_bit_with_all_passes() -> None:
    unet, gm, inputs = captured_unet()
    records = PassManager(Options()).run(gm, "unet", "graph")
    outcomes = {record.name: record.outcome for record in records}
    assert outcomes["remove_noops"] == outcomes["share_repeated"] == "applied"
    lowered = get_lowering("eager")(gm, inputs, Options(lowering="eager"))
    with torch.no_grad():
        assert torch.equal(lowered.call(*inputs)[0], unet(**unet_inputs()).sample)
    assert not lowered.cache_hit


def test_parameters_are_read_when_it_runs() -> None:
    module = nn.BatchNorm1d(3).eval()
    with torch.no_grad():
        gm, inputs = capture(module, torch.ones(2, 3))
        lowered = get_lowering("eager")(gm, inputs, Options(lowering="eager"))
        module.bias.fill_(2)
        module.running_mean.fill_(1)
        assert torch.equal(lowered.call(*inputs)[0], module(torch.ones(2, 3)))


def test_a_copy_of_a_graph_is_independent() -> None:
    gm, inputs = capture(lambda x: x.sin() + 1, torch.ones(2))
    copy = copy_graph(gm)
    node = next(node for node in copy.graph.nodes if node.target == "sin")
    node.target = "cos"
    copy.recompile()
    assert torch.equal(gm(*inputs)[0], torch.ones(2).sin() + 1)
    assert torch.equal(copy(*inputs)[0], torch.ones(2).cos() + 1)
    assert node.meta["example_value"].shape == (2,)
    assert copy.graph.output_node().meta.keys() == gm.graph.output_node().meta.keys()
