"""New nodes carry example values, and replacing one keeps those that depend on it right."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lsync_compile.graph.build import call, drop, example, item, refresh, replace
from lsync_compile.kernels import group_norm_silu


def node_of(gm, target):
    return next(node for node in gm.graph.nodes if node.target is target or node.target == target)


def strides(gm) -> dict[str, tuple[int, ...]]:
    return {n.name: v.stride() for n in gm.graph.nodes if (v := example(n)) is not None}


def test_a_call_knows_its_result_and_its_module() -> None:
    gm, inputs = capture(torch.nn.Sequential(torch.nn.SiLU()), torch.randn(2, 6, 4, 4))
    silu = node_of(gm, F.silu)
    with gm.graph.inserting_after(silu):
        halves = call(gm.graph, "chunk", silu, 2, like=silu, dim=1)
    with gm.graph.inserting_after(halves):
        second = item(halves, 1)
    value = example(second)
    assert isinstance(value, FakeTensor)
    assert value.shape == (2, 3, 4, 4)
    assert value.stride() == (96, 16, 4, 1)
    assert second.meta["nn_module_stack"] == silu.meta["nn_module_stack"]
    gm.graph.output_node().args = ((second,),)
    gm.graph.lint()
    gm.recompile()
    assert torch.equal(gm(*inputs)[0], F.silu(inputs[0])[:, 3:])


def test_an_operator_of_the_package() -> None:
    gm, inputs = capture(lambda x, w: F.group_norm(x, 2, w, w), torch.randn(2, 4, 3), torch.ones(4))
    x, weight = (node for node in gm.graph.nodes if node.op == "placeholder")
    norm = node_of(gm, F.group_norm)
    target = torch.ops.lsync.group_norm_silu.default
    with gm.graph.inserting_before(norm), pytest.raises(ValueError, match="group_norm_silu: x"):
        call(gm.graph, target, x, 2, weight, weight)
    with gm.graph.inserting_before(norm):
        square = call(gm.graph, "unsqueeze", x, 3)
        fused = call(gm.graph, target, square, 2, weight, weight, silu=False)
        replace(norm, call(gm.graph, "squeeze", fused, 3))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    expected = group_norm_silu(inputs[0][..., None], 2, inputs[1], inputs[1], silu=False)
    assert torch.equal(gm(*inputs)[0], expected[..., 0])


def downstream(x: Tensor) -> Tensor:
    y = x.sin().view(2, 12).split(6, 1)[1]
    return y.cos()


def test_other_strides_reach_all_that_depends_on_them() -> None:
    gm, inputs = capture(downstream, torch.randn(2, 3, 2, 2))
    sin, cos = node_of(gm, "sin"), node_of(gm, "cos")
    with gm.graph.inserting_after(sin):
        replace(sin, call(gm.graph, "contiguous", sin, memory_format=torch.channels_last, like=sin))
    gm.graph.lint()
    assert node_of(gm, "reshape").args[1:] == (2, 12)  # a view is impossible now
    assert example(cos).shape == (2, 6)
    gm.recompile()
    assert torch.equal(gm(*inputs)[0], downstream(inputs[0]))


def test_memory_is_shared_as_in_the_graph() -> None:
    gm, _ = capture(lambda x: (x.sin().view(6), x.cos()), torch.randn(2, 3))
    sin, view = node_of(gm, "sin"), node_of(gm, "view")
    with gm.graph.inserting_after(sin):
        twice = call(gm.graph, operator.mul, sin, 2)
    replace(sin, twice)
    assert view.args[0] is twice
    assert _storage(view) == _storage(twice)


def test_only_what_nothing_uses_is_dropped() -> None:
    gm, _ = capture(lambda x: (x.sin().cos(), x.tan()), torch.randn(3))
    output = gm.graph.output_node()
    cos, tan = output.args[0]
    drop(cos)
    assert len(gm.graph.nodes) == 5
    output.args = ((tan,),)
    drop(cos)
    assert [node.target for node in gm.graph.nodes][1:-1] == ["tan"]
    gm.graph.lint()


def test_other_shapes_and_dtypes_are_refused() -> None:
    gm, _ = capture(lambda x: x.sin().cos(), torch.randn(2, 3))
    sin = node_of(gm, "sin")
    with gm.graph.inserting_after(sin):
        half = call(gm.graph, "half", sin)
    with pytest.raises(ValueError, match=r"half cannot replace sin: \(2, 3\) torch.float16 cpu"):
        replace(sin, half)


def test_the_real_unet_after_another_layout() -> None:
    _, gm, inputs = captured_unet()
    conv = node_of(gm, F.conv2d)
    weight = conv.args[1]
    with gm.graph.inserting_before(conv):
        last = call(gm.graph, "contiguous", weight, memory_format=torch.channels_last, like=conv)
    before = strides(gm)
    conv.update_arg(1, last)
    refresh(last)
    changed = {name for name, value in strides(gm).items() if before[name] != value}
    assert "conv2d" in changed
    gm.graph.lint()
    gm.recompile()

    seen: dict[str, tuple[int, ...]] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if isinstance(result, Tensor):
                seen[node.name] = result.stride()
            return result

    with torch.no_grad():
        Watch(gm).run(*inputs)
    expected = strides(gm)
    # torch 2.14 keeps a video's layout in group norm on a CPU and predicts that it does not: what
    # comes of such a norm is left out.
    doubtful: set[torch.fx.Node] = set()
    for node in gm.graph.nodes:
        wrong = node.target is F.group_norm and expected[node.name] != seen[node.name]
        if wrong or doubtful.intersection(node.all_input_nodes):
            doubtful.add(node)
    sure = [node.name for node in gm.graph.nodes if node.name in seen and node not in doubtful]
    assert len(sure) == len(seen) or torch.__version__ >= "2.14"
    assert "conv2d" in sure
    assert {name: expected[name] for name in sure} == {name: seen[name] for name in sure}
    for node in gm.graph.nodes:
        if node.target in ("view", "transpose", "permute"):
            assert _storage(node) == _storage(node.args[0]), node


def _storage(node) -> int:
    return example(node).untyped_storage()._cdata


def test_parts_of_a_tuple_share_memory() -> None:
    gm, _ = capture(lambda x: x.sin().cos().chunk(2)[1].view(3), torch.randn(2, 3))
    cos, chunk = node_of(gm, "cos"), node_of(gm, "chunk")
    with gm.graph.inserting_after(cos):
        replace(cos, call(gm.graph, operator.neg, cos))
    part = next(iter(chunk.users))
    memory = _storage(chunk.args[0])
    assert chunk.args[0].target is operator.neg
    assert _storage(part) == memory == _storage(node_of(gm, "view"))
