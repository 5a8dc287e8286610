"""explain: what would be done with a module, without running or changing it."""

from __future__ import annotations

import json

import pytest
import torch
from captures import Attention, Pipeline, make_unet, picture, unet_inputs

import lsync_compile
from lsync_compile.errors import OptionError
from lsync_compile.explain import explain
from lsync_compile.passes.manager import PassManager
from lsync_compile.runtime.context import Terms

INPUTS = (torch.randn(1, 4, 8, 8), torch.tensor(3))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_a_unet_of_latentsyncs_kind() -> None:
    explanation = explain(make_unet(layers=1), unet_inputs(side=8))
    (graph,) = explanation.graphs
    assert explanation.breaks == []
    assert graph.skip_joins == 8
    assert graph.before.ops["scaled_dot_product_attention"] == 44
    assert graph.before.flops == graph.after.flops > 1e8
    assert sum(part.flops for part in graph.after.parts) == graph.after.flops
    assert {part.name for part in graph.after.parts} == {
        "temporal",
        "self-attention",
        "cross-attention",
        "feed-forward",
        "resnet and convolution",
        "other",
    }
    text = str(explanation)
    assert "1 graph, 0 graph breaks, captured in" in text
    assert "pass remove_noops: " in text
    assert json.loads(json.dumps(explanation.to_dict()))["graphs"][0]["skip_joins"] == 8


def test_nothing_is_computed_or_changed() -> None:
    module = Attention().eval()
    with torch.no_grad():
        module.conv.weight.fill_(float("nan"))
    explain(module, INPUTS)
    assert module._compiled_call_impl is None
    assert not hasattr(module, "lsync")


def test_off_and_breaks_are_explained() -> None:
    class Breaking(Attention):
        def forward(self, sample, timestep):
            sample = sample * 2
            torch._dynamo.graph_break()
            return super().forward(sample, timestep)

    explanation = explain(Breaking().eval(), INPUTS, remove_noops=False)
    assert len(explanation.graphs) == 2
    assert len(explanation.breaks) == 1
    assert "break: " in str(explanation)
    assert "pass remove_noops: off (option remove_noops)" in str(explanation)


def test_a_failing_pass_is_explained_without_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> int:
        raise KeyError("example_value")

    monkeypatch.setattr(PassManager, "run", fails)
    explanation = explain(Attention().eval(), INPUTS)
    (graph,) = explanation.graphs
    assert graph.before == graph.after
    assert "not compiled: passes: KeyError: 'example_value'" in str(explanation)


@pytest.mark.parametrize(
    "inputs",
    [INPUTS, {"sample": INPUTS[0], "timestep": INPUTS[1]}, (INPUTS[:1], {"timestep": INPUTS[1]})],
)
def test_inputs_by_position_by_name_or_both(inputs: object) -> None:
    assert len(explain(Attention().eval(), inputs).graphs) == 1


def test_a_run_s_unet_has_passes_and_stages_of_its_own() -> None:
    """What a run vouches for, and the stages it allows, is explained when its terms are given."""
    pipe = Pipeline()
    pipe.unet = make_unet(layers=1)
    inputs = {"unet": unet_inputs(frames=2, side=8)}
    run = explain(pipe, inputs, terms=Terms(chunks=True, timesteps=True))
    stages = {stage.name for stage in run.graphs[0].record.stages}
    assert {"timestep", "chunk"} <= stages
    alone = explain(pipe, inputs)
    assert {stage.name for stage in alone.graphs[0].record.stages} == stages & {"weights"}
    assert "stage timestep: " in str(run)
    assert "computed" not in str(run)  # nothing has run


def test_a_pipeline_is_explained_by_role() -> None:
    explanation = explain(Pipeline(), {"unet": INPUTS, "vae.encoder": (picture(),)}, mode="turbo")
    assert [graph.record.target for graph in explanation.graphs] == ["unet", "vae.encoder"]
    assert explanation.options["preset"] == "turbo"
    with pytest.raises(OptionError, match=r"no module 'vae\.encodr'"):
        explain(Pipeline(), {"vae.encodr": (picture(),)})
    with pytest.raises(OptionError, match="a module and its inputs"):
        explain(Pipeline(), INPUTS)


def test_the_handle_explains_what_it_has_seen() -> None:
    fast = lsync_compile.compile(Pipeline(), lowering="eager")
    with pytest.raises(OptionError, match="until the pipeline has run once"):
        fast.lsync.explain()
    fast(picture())
    before = fast.lsync.report()
    explanation = fast.lsync.explain()
    assert {graph.record.target for graph in explanation.graphs} == {
        "unet",
        "vae.encoder",
        "vae.decoder",
    }
    assert "1x4x8x8" in explanation.graphs[0].record.inputs
    assert fast.lsync.report() == before
    module = lsync_compile.compile(Attention().eval(), lowering="eager")
    assert len(module.lsync.explain(INPUTS).graphs) == 1
