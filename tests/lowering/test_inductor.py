"""Inductor lowering: one specialised artifact a graph, and the two ways around it."""

from __future__ import annotations

import pytest
import torch
from captures import Attention, capture, make_unet, unet_inputs
from torch._dynamo.exc import BackendCompilerFailed

import lsync_compile
from lsync_compile.lowering import get_lowering, inductor
from lsync_compile.options import Options

INPUTS = (torch.randn(1, 4, 6, 6), torch.tensor(3))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_it_is_close_to_eager_and_its_cache_hits_the_second_time() -> None:
    module = Attention().eval()
    with torch.no_grad():
        expected = module(*INPUTS)
        for hit in (None, True):
            torch._dynamo.reset()
            fast = lsync_compile.compile(module, strict=True)
            torch.testing.assert_close(fast(*INPUTS), expected, rtol=1e-5, atol=1e-5)
            (graph,) = fast.lsync.report().graphs
            assert graph.lowering == "inductor"
            assert graph.lowering_seconds > 0
            assert hit is None or graph.cache_hit


def test_gradients_come_through_compile_fx() -> None:
    module = Attention().eval()
    fast = lsync_compile.compile(module, strict=True)
    fast(*INPUTS).sum().backward()
    gradient = module.conv.weight.grad.clone()
    module.zero_grad()
    module(*INPUTS).sum().backward()
    torch.testing.assert_close(gradient, module.conv.weight.grad)
    assert "gradients wanted" in fast.lsync.report().graphs[0].lowering


def test_symbolic_sizes_come_through_compile_fx() -> None:
    fast = lsync_compile.compile(lambda x: x.sin() + 1, dynamic=True, strict=True)
    for size in (3, 4, 5):
        torch.testing.assert_close(fast(torch.ones(size)), torch.ones(size).sin() + 1)
    (graph,) = fast.lsync.report().graphs
    assert "symbolic sizes" in graph.lowering


def test_settings_reach_inductor_for_these_graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = torch._inductor.standalone_compile

    def spy(gm, inputs, **kwargs):
        seen.append(kwargs["options"])
        return plain(gm, inputs, **kwargs)

    monkeypatch.setattr(torch._inductor, "standalone_compile", spy)
    gm, inputs = capture(lambda x: x.cos() * 3, torch.ones(4))
    before = torch._inductor.config.epilogue_fusion
    options = Options(inductor={"epilogue_fusion": False})
    with torch.no_grad():
        lowered = get_lowering("inductor")(gm, inputs, options)
    assert seen == [{"config_patches": {"epilogue_fusion": False}}]
    assert torch._inductor.config.epilogue_fusion is before
    torch.testing.assert_close(lowered.call(*inputs)[0], torch.ones(4).cos() * 3)


def test_compile_fx_takes_over_where_standalone_compile_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise AssertionError("artifact")

    monkeypatch.setattr(torch._inductor, "standalone_compile", fails)
    gm, inputs = capture(lambda x: x.cos() * 5, torch.ones(4))
    with torch.no_grad():
        lowered = inductor.lower(gm, inputs, Options())
    assert lowered.note == "standalone_compile failed: compile_fx"
    torch.testing.assert_close(lowered.call(*inputs)[0], torch.ones(4).cos() * 5)


def test_what_inductor_cannot_compile_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import graph

    def fails(self: object, *args: object) -> None:
        raise NotImplementedError("no lowering")

    monkeypatch.setattr(graph.GraphLowering, "run", fails)
    with torch._inductor.config.patch(force_disable_caches=True):
        fast = lsync_compile.compile(lambda x: x.tan() - 1)
        assert torch.equal(fast(torch.ones(3)), torch.ones(3).tan() - 1)
        (record,) = fast.lsync.report().graphs
        assert "no lowering" in record.fallback
        strict = lsync_compile.compile(lambda x: x.tan() - 2, strict=True)
        with pytest.raises(BackendCompilerFailed, match="CompileError: graph function"):
            strict(torch.ones(3))


@pytest.mark.slow
def test_a_unet_of_latentsyncs_kind_compiles_as_one_graph() -> None:
    unet = make_unet(layers=1, levels=2)
    inputs = unet_inputs(frames=2, side=8)
    with torch.no_grad():
        expected = unet(**inputs).sample
        fast = lsync_compile.compile(unet, strict=True, fullgraph=True)
        result = fast(**inputs).sample
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    assert fast.lsync.report().counters["graphs"] == 1
