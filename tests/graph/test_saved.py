"""A graph written down and read back: the same function, the same text, the same memory."""

from __future__ import annotations

import contextlib
import json
import operator
import random
from typing import Any

import pytest
import torch
from captures import capture, make_unet, unet_inputs
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.deep_cache import mark_joins, why_not
from lsync_compile.graph.liveness import lifetimes
from lsync_compile.graph.saved import SavingError, from_plain, to_plain
from lsync_compile.graph.staging import cut
from lsync_compile.lowering.staged import enabled_stages
from lsync_compile.options import resolve_options
from lsync_compile.passes.manager import PassManager
from lsync_compile.runtime.context import Terms

VOUCHED = frozenset({"guidance", "null_audio", "constant_channels"})


def read_back(gm: GraphModule) -> GraphModule:
    return from_plain(json.loads(json.dumps(to_plain(gm))))


@pytest.fixture(scope="module")
def rewritten() -> tuple[GraphModule, list[Any]]:
    """The graph of two levels of the real UNet after all passes of `exact`, our kernels in it."""
    with torch.no_grad():
        gm, inputs = capture(make_unet(layers=1, levels=2), **unet_inputs())
    mark_joins(gm.graph)
    options = resolve_options("exact", {"kernels": "on"})
    PassManager(options).run(gm, "unet", "unet", VOUCHED)
    return gm, inputs


def test_the_unets_graph_gives_the_same_bits(rewritten: tuple[GraphModule, list[Any]]) -> None:
    gm, inputs = rewritten
    back = read_back(gm)
    back.graph.lint()
    assert back.code == gm.code  # what the keys of Inductor's cache are made of
    with torch.no_grad():
        for one, other in zip(gm(*inputs), back(*inputs), strict=True):
            assert torch.equal(one, other)


def test_passes_and_planners_see_the_same(rewritten: tuple[GraphModule, list[Any]]) -> None:
    gm, _ = rewritten
    back = read_back(gm)
    for one, other in zip(gm.graph.nodes, back.graph.nodes, strict=True):
        assert described(one.meta.get("example_value")) == described(
            other.meta.get("example_value")
        )
    assert lifetimes(gm.graph) == lifetimes(back.graph)
    assert why_not(back.graph, 0) == why_not(gm.graph, 0) == ""
    stages = enabled_stages(resolve_options("exact"), "unet", Terms(VOUCHED, True, True))
    staged = [cut(each, stages, unet=True) for each in (gm, back)]
    assert staged[0] is not None
    assert staged[1] is not None
    assert staged[0].main.gm.code == staged[1].main.gm.code
    assert staged[0].watched == staged[1].watched


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        kind = isinstance(value, nn.Parameter), value.dtype, value.device, value.requires_grad
        return *kind, tuple(value.shape), value.stride(), value.storage_offset()
    if isinstance(value, (tuple, list)):
        return type(value), [described(part) for part in value]
    return value


def test_values_in_the_same_memory_stay_there() -> None:
    def function(x: Tensor) -> Tensor:
        view = x.view(4, 2)[1:]
        return view.t() + x.view(2, 4).sin()[0, 0]

    gm, _ = capture(function, torch.randn(8))
    values = [
        node.meta["example_value"] for node in read_back(gm).graph.nodes if node.op != "output"
    ]
    storages = [value.untyped_storage()._cdata for value in values]
    before = [
        node.meta["example_value"].untyped_storage()._cdata
        for node in gm.graph.nodes
        if node.op != "output"
    ]
    pattern = [storages.index(each) for each in storages]
    assert pattern == [before.index(each) for each in before]
    assert len(set(pattern)) < len(pattern)


def test_all_kinds_of_arguments() -> None:
    def function(x: Tensor) -> Any:
        y = x[..., 1:3, None].to(torch.float64).contiguous(memory_format=torch.contiguous_format)
        parts = torch.split(y, [1, 1], dim=-2)
        z = torch.cat(parts, dim=1) * 0.5 - float("inf") * 0
        return z, torch.full((2,), 1.5, dtype=torch.float16, device=torch.device("cpu"))

    gm, inputs = capture(function, torch.randn(3, 4))
    back = read_back(gm)
    assert back.code == gm.code
    for one, other in zip(gm(*inputs), back(*inputs), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def stranger(x: Tensor) -> Tensor:
    return x


def small() -> GraphModule:
    return capture(lambda x: nn.functional.silu(x) + 1, torch.randn(4))[0]


@pytest.mark.parametrize("what", ["function", "held", "object", "tensor"])
def test_what_cannot_be_written_down_is_refused(what: str) -> None:
    gm = small()
    node = next(iter(gm.graph.find_nodes(op="call_function", target=operator.add)))
    if what == "function":
        node.target = stranger
    elif what == "held":
        gm.register_buffer("held", torch.zeros(4))
        with gm.graph.inserting_before(node):
            node.args = (node.args[0], gm.graph.get_attr("held"))
    elif what == "object":
        node.args = (node.args[0], object())
    else:
        node.args = (node.args[0], torch.zeros(4))
    with pytest.raises(SavingError):
        to_plain(gm)


def test_symbolic_sizes_are_refused() -> None:
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x.sin(), backend=backend, dynamic=True)(torch.randn(5))
    with pytest.raises(SavingError):
        to_plain(graphs[0])


def test_a_file_cannot_name_what_is_not_torchs() -> None:
    kept = to_plain(small())
    call = next(node for node in kept["nodes"] if node["target"] == "_operator.add")
    for name in ("os.system", "builtins.eval", "torch.gone", "torch", "torch.os.system", ""):
        call["target"] = name
        with pytest.raises(SavingError):
            from_plain(kept)


@pytest.mark.parametrize("target", ["sin() or print", "__class__", "x y", "", "x\n"])
def test_a_file_cannot_bring_code_of_its_own(target: str) -> None:
    kept = to_plain(capture(lambda x: x.sin().view(2, 2), torch.randn(4))[0])
    method = next(node for node in kept["nodes"] if node["op"] == "call_method")
    with pytest.raises(SavingError, match="name"):
        from_plain({**kept, "nodes": [{**method, "target": target}]})


def test_a_function_put_in_torchs_place_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = to_plain(small())
    from_plain(kept)
    monkeypatch.setattr(nn.functional, "silu", stranger)
    with pytest.raises(SavingError, match="silu"):
        from_plain(kept)


def test_a_damaged_file_is_an_error_and_nothing_else() -> None:
    text = json.dumps(to_plain(small()))
    draw = random.Random(0)
    for _ in range(300):
        kept = json.loads(text)
        damage(kept, draw)
        with contextlib.suppress(SavingError):  # the only error there may be
            from_plain(kept)


def damage(value: Any, draw: random.Random) -> None:
    """Exchange a value somewhere inside for one of another kind, or leave it out."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and draw.random() < 0.8:
            value = inner
        elif draw.random() < 0.3:
            del value[key]
            return
        else:
            value[key] = draw.choice([None, -1, 10**9, "x", [], {}, ["node", "x"], ["list"], 0.5])
            return
