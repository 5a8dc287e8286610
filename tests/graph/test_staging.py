"""Cutting a graph into stages: the same bits, real work moved, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph import staging
from lsync_compile.graph.dependency import STAGE_KEY, Stage
from lsync_compile.graph.staging import Staging, cut, why_not

EVERY = frozenset(Stage)


def run(found: Staging, inputs: Sequence[Any]) -> Any:
    """The captured graph's outputs by way of all stages."""
    values = list(inputs)
    for graph in found.stages.values():
        values += graph.gm(*(values[index] for index in graph.inputs))
    return found.main.gm(*(values[index] for index in found.main.inputs))


def targets(gm: GraphModule) -> list[str]:
    return [
        getattr(node.target, "__name__", node.target)
        for node in gm.graph.nodes
        if node.op.startswith("call")
    ]


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8, bias=False)
        self.key = nn.Linear(8, 8, bias=False)
        self.time = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        joined = torch.cat([self.query.weight, self.key.weight])
        queries, _ = F.linear(sample, joined).chunk(2, dim=-1)
        keys = self.key(encoder_hidden_states).view(2, 3, 2, 4).transpose(1, 2)
        time = self.time(timestep.reshape(-1).expand(8).float())
        return F.scaled_dot_product_attention(
            queries.view(2, 5, 2, 4).transpose(1, 2), keys, keys
        ) + time.view(2, 1, 4)


def attend() -> tuple[GraphModule, list]:
    torch.manual_seed(0)
    with torch.no_grad():
        return capture(Attend(), torch.randn(2, 5, 8), torch.tensor(7), torch.randn(2, 3, 8))


def test_each_stage_holds_its_work_and_hands_over_before_the_views() -> None:
    gm, inputs = attend()
    expected = gm(*inputs)
    found = cut(gm, EVERY, unet=True)
    assert found is not None
    assert {stage: targets(graph.gm) for stage, graph in found.stages.items()} == {
        Stage.WEIGHTS: ["cat"],
        Stage.TIMESTEP: ["reshape", "expand", "float", "linear"],
        Stage.CHUNK: ["linear"],
    }
    main = targets(found.main.gm)
    assert main.count("linear") == 1
    assert main.count("transpose") == 2
    assert "cat" not in main
    for graph in [*found.stages.values(), found.main]:
        graph.gm.graph.lint()
    assert torch.equal(run(found, inputs)[0], expected[0])


def test_what_a_stage_looks_at() -> None:
    gm, inputs = attend()
    found = cut(gm, EVERY, unet=True)
    assert found is not None
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert [names[i] for i in found.watched[Stage.CHUNK]] == ["l_encoder_hidden_states_"]
    assert [names[i] for i in found.watched[Stage.TIMESTEP]] == ["l_timestep_"]
    weights = {inputs[index].data_ptr() for index in found.weights}
    expected = {value.data_ptr() for value in inputs if isinstance(value, nn.Parameter)}
    assert weights == expected  # the query's too: it is in the joined one
    # What no node of the main graph needs any more is no input of it.
    assert names.index("l_encoder_hidden_states_") not in found.main.inputs


def test_the_captured_graph_is_not_changed() -> None:
    gm, inputs = attend()
    before, expected = gm.code, gm(*inputs)
    cut(gm, EVERY, unet=True)
    gm.recompile()
    assert gm.code == before
    assert torch.equal(gm(*inputs)[0], expected[0])


@pytest.mark.parametrize("stage", [Stage.WEIGHTS, Stage.TIMESTEP, Stage.CHUNK])
def test_one_stage_alone(stage: Stage) -> None:
    gm, inputs = attend()
    found = cut(gm, {stage}, unet=True)
    assert found is not None
    assert list(found.stages) == [stage]
    assert torch.equal(run(found, inputs)[0], gm(*inputs)[0])


def test_joined_weights_serve_the_chunk() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            joined = torch.cat([self.one, self.two])
            return sample @ joined.t() + F.linear(encoder_hidden_states, joined)

    with torch.no_grad():
        gm, inputs = capture(Join(), torch.randn(3, 4), torch.randn(3, 4))
    found = cut(gm, EVERY, unet=True)
    assert found is not None
    assert [targets(graph.gm) for graph in found.stages.values()] == [["cat"], ["linear"]]
    assert torch.equal(run(found, inputs)[0], gm(*inputs)[0])


def only(function: Any, *args: Tensor) -> Staging | None:
    """Cut what is made of a weight-like argument and a sample."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, sample: Tensor) -> Any:
            return function(sample, self.weight)

    with torch.no_grad():
        gm, inputs = capture(Holder(), *args)
    found = cut(gm, EVERY, unet=True)
    if found is not None:
        assert torch.equal(run(found, inputs)[0], gm(*inputs)[0])
    return found


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w.t(),
        lambda x, w: x + w.view(-1)[:64],
        lambda x, w: sum(x + part for part in w.chunk(2, dim=1)[0].unbind(1)),
        lambda x, w: x + torch.arange(64).exp(),
        lambda x, w: x + w.repeat(200, 1).sum(),
        lambda x, w: (x.sin(), w * 2),
        lambda x, w: (x.sin(), (w * 2).view(-1)),
        lambda x, w: x + F.dropout(w, 0.5, training=True).sum() * 0,
        lambda x, w: x + torch.rand_like(w).sum() * 0,
    ],
    ids=[
        *("a view", "a slice", "parts", "made of nothing", "a large copy, summed"),
        *("a result", "a view of a result", "random", "random of a shape"),
    ],
)
def test_what_stays(function: Any, request: pytest.FixtureRequest) -> None:
    found = only(function, torch.randn(64))
    if "large copy" in request.node.name:  # the copy is not handed over, its sum is
        assert found is not None
        assert found.main.operations == 1
    else:
        assert found is None


def test_a_large_copy_is_made_anew() -> None:
    found = only(lambda x, w: x + w.sin().repeat(200, 1), torch.randn(64))
    assert found is not None
    assert targets(found.stages[Stage.WEIGHTS].gm) == ["sin"]
    assert targets(found.main.gm) == ["repeat", "add"]


def test_the_largest_results_go_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return x + w.sin() + w[:8].cos().sum(0)

    monkeypatch.setattr(staging, "LIMITS", {Stage.WEIGHTS: 64 * 64})
    found = only(function, torch.randn(64))
    assert found is not None
    stage = found.stages[Stage.WEIGHTS]
    assert stage.result_bytes <= 64 * 64
    assert targets(stage.gm) == ["getitem", "cos", "sum"]
    assert "sin" in targets(found.main.gm)


def test_a_mark_makes_a_part_of_the_sample_constant() -> None:
    def function(sample: Tensor) -> Tensor:
        return sample[:, :4].sin() + sample[:, 4:].cos()

    gm, inputs = capture(function, torch.randn(2, 8))
    part = next(node for node in gm.graph.nodes if "slice(4" in str(node.args))
    part.meta[STAGE_KEY] = Stage.CHUNK
    found = cut(gm, EVERY, unet=True)
    assert found is not None
    assert targets(found.stages[Stage.CHUNK].gm) == ["getitem", "cos"]
    assert found.watched[Stage.CHUNK] == ()  # the sample may be another object each step
    assert torch.equal(run(found, inputs)[0], gm(*inputs)[0])


def test_graphs_that_stay_in_one_piece() -> None:
    def writes(sample: Tensor) -> Tensor:
        return sample.clone().add_(1)

    gm, _ = capture(writes, torch.randn(3))
    assert why_not(gm.graph) == "the graph writes in place"
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: list) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x.sin(), backend=keep, dynamic=True)(torch.randn(3))
    assert why_not(graphs[0].graph) == "symbolic sizes"
    assert why_not(attend()[0].graph) == ""


def test_the_real_unet_bit_for_bit() -> None:
    _, gm, inputs = captured_unet()
    with torch.no_grad():
        expected = gm(*inputs)[0]
        found = cut(gm, EVERY, unet=True)
        assert found is not None
        assert torch.equal(run(found, inputs)[0], expected)
    chunk, timestep = found.stages[Stage.CHUNK], found.stages[Stage.TIMESTEP]
    assert targets(chunk.gm) == ["linear"] * 32
    assert len(chunk.results) == 32
    assert len(timestep.results) == 22  # one projection a resnet
    assert targets(timestep.gm).count("linear") == 24
    operations = sum(node.op.startswith("call") for node in gm.graph.nodes)
    assert found.main.operations < operations - chunk.operations - timestep.operations + 30
