"""torch's caches must not give code that was compiled for an op of ours as it was before."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from captures import capture
from torch.fx import GraphModule

from lsync_compile import sources
from lsync_compile.kernels import add_layer_norm, geglu
from lsync_compile.lowering import get_lowering
from lsync_compile.lowering.cache_key import ops_key
from lsync_compile.options import Options


def graph_of(function: Callable[..., object]) -> tuple[GraphModule, list]:
    with torch.no_grad():
        return capture(function, torch.arange(32.0).view(2, 16) / 32)


def one(x: torch.Tensor) -> torch.Tensor:
    return geglu(x * 1.5)


def two(x: torch.Tensor) -> torch.Tensor:
    return add_layer_norm(x, x, x[0], x[1])[1] + geglu(x).sum()


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes the source of a module look edited, in a way never seen before."""
    plain = sources._source

    def change(name: str) -> None:
        edit = f"# {secrets.token_hex()}"

        def source(module: ModuleType) -> str:
            return plain(module) + (edit if module.__name__ == name else "")

        monkeypatch.setattr(sources, "_source", source)

    return change


def test_graphs_without_our_ops_have_none() -> None:
    assert ops_key(graph_of(lambda x: x.cos() * 2)[0].graph) is None


def test_each_op_counts_and_a_changed_helper_changes_the_key(changed: Callable) -> None:
    first, second = (ops_key(graph_of(function)[0].graph).uuid() for function in (one, two))
    assert first != second
    assert ops_key(graph_of(one)[0].graph).uuid() == first
    changed("lsync_compile.kernels.launch")
    assert ops_key(graph_of(one)[0].graph).uuid() != first
    changed("lsync_compile.kernels.add_layer_norm")
    assert ops_key(graph_of(one)[0].graph).uuid() == first
    assert ops_key(graph_of(two)[0].graph).uuid() != second


def test_inductor_compiles_anew_after_a_change_and_only_then(changed: Callable) -> None:
    def lowered() -> bool:
        torch._dynamo.reset()
        gm, inputs = graph_of(one)
        with torch.no_grad():
            result = get_lowering("inductor")(gm, inputs, Options())
            torch.testing.assert_close(result.call(*inputs)[0], one(*inputs))
        return result.cache_hit

    lowered()
    assert lowered()
    changed("lsync_compile.kernels.geglu")
    assert not lowered()
    assert lowered()
