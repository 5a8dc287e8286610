"""Dependency classes: what each node's value depends on, and so how often it is new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet, make_unet, unet_inputs
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.dependency import (
    STAGE_KEY,
    Stage,
    find_argument,
    is_weight,
    node_stages,
    unet_argument,
)
from lsync_compile.targets import own_call


class Toy(nn.Module):
    """One operation of each class, named by the attribute it would be stored in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.randn(4))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        weights = (self.weight * self.table).exp()
        time = timestep.cos()
        sound = F.linear(encoder_hidden_states, weights)
        return sample + sound.tanh() * time.sin() + F.dropout(sound, 0.5, training=True)


def graph_of(function: Callable, *args: object, **kwargs: object) -> GraphModule:
    with torch.no_grad():
        return capture(function, *args, **kwargs)[0]


def toy_graph() -> GraphModule:
    return graph_of(Toy(), torch.randn(4, 4), torch.tensor(3.0), torch.randn(4, 4))


def test_a_value_is_as_rarely_new_as_what_it_is_computed_from() -> None:
    gm = toy_graph()
    found = {
        node.target if isinstance(node.target, str) else node.target.__name__: stage
        for node, stage in node_stages(gm.graph, unet=True).items()
        if node.op.startswith("call")
    }
    assert found == {
        "mul": Stage.STEP,  # of the sound and the timestep; the weights' product is overwritten
        "exp": Stage.WEIGHTS,
        "cos": Stage.TIMESTEP,
        "sin": Stage.TIMESTEP,
        "linear": Stage.CHUNK,
        "tanh": Stage.CHUNK,
        "add": Stage.STEP,
        "dropout": Stage.STEP,  # of the sound alone, but random
    }


def test_without_a_unet_only_weights_are_told_apart() -> None:
    assert set(node_stages(toy_graph().graph, unet=False).values()) == {Stage.WEIGHTS, Stage.STEP}


def test_stages_join() -> None:
    assert Stage.WEIGHTS.join(Stage.CHUNK) is Stage.CHUNK.join(Stage.WEIGHTS) is Stage.CHUNK
    assert Stage.CHUNK.join(Stage.CHUNK) is Stage.CHUNK
    assert Stage.CHUNK.join(Stage.TIMESTEP) is Stage.STEP
    assert Stage.STEP.join(Stage.WEIGHTS) is Stage.STEP


def test_a_mark_counts_more_than_the_inputs() -> None:
    gm = toy_graph()
    (last,) = gm.graph.output_node().all_input_nodes
    last.meta[STAGE_KEY] = Stage.CHUNK
    assert node_stages(gm.graph, unet=True)[last] is Stage.CHUNK


@pytest.mark.parametrize("how", ["by name", "by place", "mixed"])
def test_arguments_are_known_however_they_are_passed(how: str) -> None:
    unet, inputs = make_unet(layers=1), unet_inputs()
    names = list(inputs)
    count = {"by name": 0, "by place": 3, "mixed": 2}[how]
    args = [inputs[name] for name in names[:count]]
    kwargs = {name: inputs[name] for name in names[count:]}
    gm = graph_of(own_call(unet), *args, **kwargs)
    found = {unet_argument(node) for node in gm.graph.nodes if node.op == "placeholder"}
    assert found == {None, "sample", "timestep", "encoder_hidden_states"}
    for name in names:
        node = find_argument(gm.graph, name)
        assert node is not None
        assert node.meta["example_value"].shape == inputs[name].shape
    assert find_argument(gm.graph, "class_labels") is None


def test_the_real_unet() -> None:
    unet, gm, _ = captured_unet()
    stages = node_stages(gm.graph, unet=True)
    weights = [node for node in stages if node.op == "placeholder" and is_weight(node)]
    assert len(weights) == len(list(unet.parameters())) + len(list(unet.buffers()))
    calls = Counter(stage for node, stage in stages.items() if node.op.startswith("call"))
    # 16 layers of attention to the sound: keys and values, each projected, reshaped, transposed.
    assert calls[Stage.CHUNK] == 16 * 2 * 3
    assert calls[Stage.TIMESTEP] == 83
