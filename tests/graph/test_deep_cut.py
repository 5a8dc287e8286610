"""Cutting a UNet in two at a skip join: the same bits, little left in the shallow graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captures import capture, captured_unet
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.census import census
from lsync_compile.graph.deep_cache import CACHED, cut, mark_joins, why_not
from lsync_compile.graph.dependency import Stage, find_argument
from lsync_compile.graph.staging import cut as cut_stages
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager
from lsync_compile.runtime.context import VOUCHES

JOINS = 12


def rewritten(options: Options, vouched: frozenset[str] = frozenset(VOUCHES)) -> tuple[Any, list]:
    """The real UNet's graph, marked and after the passes, and its inputs."""
    _, gm, inputs = captured_unet()
    assert mark_joins(gm.graph) == JOINS
    PassManager(options).run(gm, "unet", "unet", vouched)
    return gm, inputs


def targets(gm: GraphModule) -> list[str]:
    return [
        getattr(node.target, "__name__", str(node.target))
        for node in gm.graph.nodes
        if node.op.startswith("call")
    ]


@pytest.mark.parametrize("branch", [0, 2])
@torch.no_grad()
def test_both_graphs_give_the_bits_of_the_captured_one(branch: int) -> None:
    _, gm, inputs = captured_unet()
    mark_joins(gm.graph)
    assert why_not(gm.graph, branch) == ""
    before, nodes = gm(*inputs), len(gm.graph.nodes)
    made = cut(gm, branch)
    *results, features = made.full(*inputs)
    assert all(map(torch.equal, results, before))
    assert (features.shape, features.dtype) == (made.features.shape, made.features.dtype)
    assert all(map(torch.equal, made.shallow(*inputs, features), before))
    assert not torch.equal(made.shallow(*inputs, features + 1)[0], before[0])
    assert len(gm.graph.nodes) == nodes  # it is not changed


def test_branch_0_leaves_one_layer_of_the_real_unet() -> None:
    _, gm, _ = captured_unet()
    mark_joins(gm.graph)
    full, shallow = cut(gm, 0).operations
    assert shallow < 0.1 * full
    counts = [cut(gm, branch).operations for branch in range(3)]
    assert [shallow for _, shallow in counts] == sorted({shallow for _, shallow in counts})
    made = cut(gm, 0)
    flops = [census(part).flops for part in (made.full, made.shallow)]
    assert flops[1] < 0.12 * flops[0]
    # One layer of up_blocks.3: one attention within frames, one to the sound, two across frames.
    assert targets(made.shallow).count("scaled_dot_product_attention") == 4
    names = [node.name for node in made.shallow.graph.find_nodes(op="placeholder")]
    inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert names == [*inputs, CACHED]


@pytest.mark.parametrize("kernels", ["off", "on"])
def test_the_joins_are_found_after_all_passes(kernels: str) -> None:
    gm, _ = rewritten(Options(kernels=kernels, split_conv_in=True))
    marked = [why_not(gm.graph, branch) for branch in range(JOINS)]
    assert marked == [""] * JOINS
    full, shallow = cut(gm, 0).operations
    assert 0 < shallow < 0.12 * full


@torch.no_grad()
def test_the_main_graph_of_all_stages_is_cut_like_any_other() -> None:
    gm, inputs = rewritten(Options(guidance_prefix=False, null_audio=False), frozenset())
    before = gm(*inputs)
    staging = cut_stages(gm, frozenset(Stage), unet=True)
    assert staging is not None
    made = cut(staging.main.gm, 0)
    values = list(inputs)
    for graph in staging.stages.values():
        values += graph.gm(*(values[index] for index in graph.inputs))
    taken = [values[index] for index in staging.main.inputs]
    *results, features = made.full(*taken)
    assert torch.equal(results[0], before[0])
    assert torch.equal(made.shallow(*taken, features)[0], before[0])


@torch.no_grad()
def test_the_shallow_graph_sees_the_sample_of_its_own_step() -> None:
    _, gm, inputs = captured_unet()
    mark_joins(gm.graph)
    sample = find_argument(gm.graph, "sample")
    assert sample is not None
    index = [node.name for node in gm.graph.find_nodes(op="placeholder")].index(sample.name)
    made = cut(gm, 0)
    features = made.full(*inputs)[-1]
    other = [*inputs[:index], inputs[index] + 1, *inputs[index + 1 :], features]
    assert not torch.equal(made.shallow(*other)[0], made.shallow(*inputs, features)[0])


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + 1


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        below = x.sin()
        return torch.cat([below, x], dim=1).mul_(2)


@pytest.mark.parametrize(
    ("module", "branch", "reason"),
    [(Plain(), 0, "no skip joins"), (Writing(), 0, "writes in place")],
)
def test_other_graphs_stay_whole(module: nn.Module, branch: int, reason: str) -> None:
    gm, _ = capture(module, torch.randn(2, 3))
    mark_joins(gm.graph)
    assert reason in why_not(gm.graph, branch)


def test_a_branch_that_is_not_there_is_named() -> None:
    _, gm, _ = captured_unet()
    mark_joins(gm.graph)
    assert why_not(gm.graph, JOINS) == "branch 12 is not there; the last one is 11"
