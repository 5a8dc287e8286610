"""The backend: what it records, what it does when a graph cannot be compiled, the real UNet."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from captures import Attention, Pipeline, make_unet, picture, unet_inputs
from torch._dynamo.utils import counters

import lsync_compile
from lsync_compile import backend
from lsync_compile.errors import CompileError, OptionError
from lsync_compile.lowering import base
from lsync_compile.passes.manager import PassManager

EAGER = {"lowering": "eager"}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def failing(error: Exception):
    def fail(*args: object) -> None:
        raise error

    return fail


@pytest.fixture
def broken_lowering(monkeypatch: pytest.MonkeyPatch):
    """Make the eager lowering raise an error."""

    def breaks(error: Exception) -> None:
        monkeypatch.setattr(base, "get_lowering", lambda name: failing(error))
        monkeypatch.setattr(backend, "get_lowering", lambda name: failing(error))

    return breaks


# When a graph cannot be compiled


def test_a_failed_lowering_runs_the_untouched_graph_and_warns_once(
    broken_lowering, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Pipeline()(picture())
    broken_lowering(RuntimeError("no kernel\nlong story"))
    fast = lsync_compile.compile(Pipeline(), **EAGER)
    with caplog.at_level(logging.WARNING, "lsync_compile"):
        assert torch.equal(fast(picture()), expected)
        fast(picture(side=6))
    warnings = [entry.getMessage() for entry in caplog.records if "unet" in entry.getMessage()]
    assert warnings == [
        "unet.0.0 runs eagerly, not compiled: lowering 'eager': RuntimeError: no kernel"
    ]
    report = fast.lsync.report()
    assert report.counters["fallbacks"] == 6
    assert report.graphs[0].fallback == "lowering 'eager': RuntimeError: no kernel"
    assert report.graphs[0].nodes_out == report.graphs[0].nodes_in
    assert sum("unet runs eagerly" in note for note in report.notes) == 1


def test_a_failed_pass_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def vandalise(self, gm, *place):
        for node in gm.graph.nodes:
            if node.op == "call_function":
                node.args = ()
        raise KeyError("example_value")

    monkeypatch.setattr(PassManager, "run", vandalise)
    fast = lsync_compile.compile(Pipeline(), **EAGER)
    assert torch.equal(fast(picture()), Pipeline()(picture()))
    assert fast.lsync.report().graphs[0].fallback == "passes: KeyError: 'example_value'"


@pytest.mark.parametrize("error", [RuntimeError("x"), NotImplementedError("x"), OSError("x")])
def test_strict_raises_compile_error(broken_lowering, error: Exception) -> None:
    broken_lowering(error)
    fast = lsync_compile.compile(Pipeline(), strict=True, **EAGER)
    with pytest.raises(CompileError, match=r"graph vae.encoder.0.0: lowering 'eager': \w+: x"):
        fast(picture())


def test_what_is_not_foreseen_is_not_swallowed(broken_lowering) -> None:
    class SurpriseError(Exception):
        pass

    broken_lowering(SurpriseError("!"))
    fast = lsync_compile.compile(Pipeline(), **EAGER)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="SurpriseError"):
        fast(picture())


def test_a_capture_that_breaks_runs_the_module_plain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import InternalTorchDynamoError

    pipeline = Pipeline()
    expected = pipeline(picture())
    for strict in (False, True):
        fast = lsync_compile.compile(pipeline, strict=strict, compile_vae=False, **EAGER)
        fails = failing(InternalTorchDynamoError("bug"))
        monkeypatch.setattr(pipeline.unet._compiled_call_impl, "_for_shapes", fails)
        if strict:
            with pytest.raises(CompileError, match="unet: capture: bug"):
                fast(picture())
        else:
            assert torch.equal(fast(picture()), expected)
            assert torch.equal(fast(picture()), expected)
            assert caplog.text.count("unet runs plain, not compiled: capture: bug") == 1
        fast.lsync.undo()


# Bare modules and what dynamo does with their graphs


def test_wrong_options_of_a_bare_module_name_the_option() -> None:
    module = torch.compile(Attention(), backend="lsync", options={"stric": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean 'strict'") as e:
        module(torch.ones(1, 4, 2, 2), torch.tensor(1))
    assert isinstance(e.value.inner_exception, OptionError)


def test_a_break_is_counted_and_named_by_frame() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    fast = lsync_compile.compile(broken, **EAGER)
    assert fast(torch.zeros(2)).tolist() == [2, 2]
    report = fast.lsync.report()
    assert [graph.name for graph in report.graphs] == ["function.0.0", "function.1.1"]
    assert report.counters["breaks"] == 1


def test_gradient_modes_are_variants_and_a_reset_starts_anew() -> None:
    module = Attention().eval()
    fast = lsync_compile.compile(module, **EAGER)
    inputs = (torch.randn(1, 4, 3, 3), torch.tensor(2))
    with torch.no_grad():
        fast(*inputs)
    fast(*inputs).sum().backward()
    gradient = module.conv.weight.grad.clone()
    module.zero_grad()
    module(*inputs).sum().backward()
    assert torch.equal(gradient, module.conv.weight.grad)
    assert [graph.kind for graph in fast.lsync.report().graphs] == ["first", "variant"]
    torch._dynamo.reset()
    fast(*inputs)
    assert fast.lsync.report().graphs[-1].kind == "first"
    assert fast.lsync.report().counters["breaks"] == 0


def test_compiling_the_same_again_is_a_recompile() -> None:
    scale = [1]

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * scale[0]

    fast = lsync_compile.compile(scaled, dynamic=False, **EAGER)
    fast(torch.ones(2))
    scale[0] = 2
    fast(torch.ones(2))
    report = fast.lsync.report()
    assert [graph.kind for graph in report.graphs] == ["first", "recompile"]
    assert "recompiles 1" in str(report)


def test_parameters_are_not_listed_as_inputs() -> None:
    fast = lsync_compile.compile(Pipeline(), **EAGER)
    fast(picture())
    unet = next(graph for graph in fast.lsync.report().graphs if graph.target == "unet")
    assert unet.inputs == "1x4x8x8 float32 cpu, scalar int64 cpu"


def test_torch_logs_switches_the_log_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "double = torch.compile(lambda x: x * 2, backend='lsync', options={'lowering': 'eager'})\n"
        "double(torch.ones(2))\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        env={"PATH": "", "TORCH_LOGS": "+lsync_compile", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "module.0.0: 3 -> 3 nodes" in result.stderr
    assert "module.0.0: pass share_repeated: no match, 0 ms" in result.stderr
    assert "compiling function" in result.stderr or "compiling module" in result.stderr


# The real UNet


def test_the_real_unet_is_one_graph_without_recompiles() -> None:
    pipeline = Pipeline()
    pipeline.unet = unet = make_unet()
    steps = [(inputs := unet_inputs(side=8)) | {"timestep": torch.tensor(t)} for t in (981, 500, 1)]
    with torch.no_grad():
        expected = [unet(**step).sample for step in steps]
        fast = lsync_compile.compile(pipeline, fullgraph=True, **EAGER)
        assert torch.equal(fast.unet(**steps[0]).sample, expected[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step, result in zip(steps, expected, strict=True):
                assert torch.equal(fast.unet(**step).sample, result)
        report = fast.lsync.report()
        assert report.counters == {
            **report.counters,
            "graphs": 1,
            "breaks": 0,
            "recompiles": 0,
            "fallbacks": 0,
            "calls": 4,
        }
        assert report.graphs[0].nodes_out < report.graphs[0].nodes_in
        plain = fast.lsync.undo().unet
        assert torch.equal(plain(**inputs | {"timestep": torch.tensor(981)}).sample, expected[0])
