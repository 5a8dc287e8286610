"""All passes together and each in its turn, on every network that pipelines bring.

Nothing here names a pass, but for the counts on Stable Diffusion's UNet: a pass that is added is
tested with the others at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from captures import capture, make_unet, unet_inputs
from networks import (
    distance,
    make_stable_diffusion_unet,
    make_vae,
    ops,
    results,
    stable_diffusion_inputs,
    vae_inputs,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager, ordered
from lsync_compile.passes.spec import Phase, registered
from lsync_compile.report import PassRecord
from lsync_compile.runtime.context import VOUCHES

PASSES = ordered(registered().values())
APPROXIMATE = {"fp8_linear"}  # whose price is another test's
EVERYTHING = {cls.spec.option: cls.spec.option not in APPROXIMATE for cls in PASSES}
EXACT = {cls.spec.option: cls.spec.exact for cls in PASSES}
HALF = [torch.float16, torch.bfloat16]

# Role in a pipeline, how to make the module, its inputs.
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Any]]] = {
    "LatentSync": ("unet", lambda: make_unet(layers=1), lambda: guided_inputs()),
    "Stable Diffusion 1.5": ("unet", make_stable_diffusion_unet, stable_diffusion_inputs),
    "VAE encoder": ("vae.encoder", lambda: make_vae().encoder, lambda: vae_inputs()[:1]),
    "VAE decoder": ("vae.decoder", lambda: make_vae().decoder, lambda: vae_inputs()[1:]),
}


def guided_inputs() -> tuple[Tensor, ...]:
    """As LatentSync's pipeline has them, so that all of it can be vouched for."""
    inputs = unet_inputs()
    sample, audio = inputs["sample"], inputs["encoder_hidden_states"]
    sample[1], audio[: len(audio) // 2] = sample[0], 0
    return tuple(inputs.values())


@dataclass(frozen=True)
class Case:
    """A network captured in one dtype; ``exact`` is what it gives in float64."""

    target: str
    vouched: frozenset[str]
    graph: GraphModule
    inputs: list
    exact: Tensor

    def fresh(self) -> GraphModule:
        return copy_graph(self.graph)

    def output(self, gm: GraphModule) -> Tensor:
        """The graph's one tensor."""
        (found,) = tree_leaves(results(gm, self.inputs))
        return found

    def error(self, gm: GraphModule) -> float:
        return distance(self.output(gm), self.exact)


@functools.cache
def captured(network: str, dtype: torch.dtype = torch.float32) -> Case:
    target, make, make_inputs = NETWORKS[network]
    module, inputs = make().to(dtype), cast(make_inputs(), dtype)
    with torch.no_grad():
        gm, values = capture(module, *inputs)
        wide = module.double()(*cast(inputs, torch.float64))
    exact = wide if isinstance(wide, Tensor) else wide.sample
    # The graph's inputs are the module's parameters, which are in float64 by now.
    vouched = frozenset(VOUCHES if network == "LatentSync" else ())
    return Case(target, vouched, gm, cast(values, dtype), exact)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another dtype, all else as it is."""

    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to(dtype) if floating else value

    return tree_map(one, values)


def rewrite(gm: GraphModule, case: Case, **options: object) -> dict[str, PassRecord]:
    """Run the passes, in place; one record a pass."""
    with torch.no_grad():
        records = PassManager(Options(**options)).run(gm, case.target, "graph", case.vouched)
    gm.graph.lint()
    assert [record.name for record in records] == [cls.spec.name for cls in PASSES]
    return {record.name: record for record in records}


def matches(records: dict[str, PassRecord]) -> dict[str, int]:
    return {name: record.matches for name, record in records.items() if record.matches}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_each_pass_in_its_turn_keeps_the_result(network: str) -> None:
    """One more pass at a time, so that a failure names the pass."""
    case = captured(network)
    before = case.error(case.graph)
    exact = [cls for cls in PASSES if EVERYTHING[cls.spec.option]]
    for place, cls in enumerate(exact):
        on = {each.spec.option: number <= place for number, each in enumerate(exact)}
        gm = case.fresh()
        record = rewrite(gm, case, kernels="on", **on)[cls.spec.name]
        assert record.outcome != "off"
        if record.matches:
            after = case.error(gm)
            assert after < 3 * before, f"{cls.spec.name}: error {after:.2e}, was {before:.2e}"


@pytest.mark.parametrize("network", NETWORKS)
def test_exact_passes_keep_the_bits(network: str) -> None:
    """fp32 with eager lowering: what only exact passes have rewritten gives the plain bits."""
    case = captured(network)
    gm = case.fresh()
    rewrite(gm, case, kernels="off", **EXACT)
    assert torch.equal(case.output(gm), case.output(case.graph))


@pytest.mark.parametrize("network", NETWORKS)
def test_kernels_off_means_no_op_of_ours(network: str) -> None:
    case = captured(network)
    gm = case.fresh()
    rewrite(gm, case, kernels="off", **EVERYTHING)
    assert not [node for node in gm.graph.nodes if str(node.target).startswith("lsync.")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_half_precision_is_no_less_exact_than_before(network: str, dtype: torch.dtype) -> None:
    """The same matches as in float32, and an error against float64 that does not grow."""
    wide, half = captured(network), captured(network, dtype)
    gm = half.fresh()
    found = matches(rewrite(gm, half, kernels="on", **EVERYTHING))
    wanted = matches(rewrite(wide.fresh(), wide, kernels="on", **EVERYTHING))
    assert {name: found.get(name) for name in wanted if name != "remove_noops"} == {
        name: count for name, count in wanted.items() if name != "remove_noops"
    }
    assert 0 < half.error(gm) < 1.2 * half.error(half.graph)


@pytest.mark.parametrize("network", NETWORKS)
def test_passes_find_nothing_more_the_second_time(network: str) -> None:
    """A rewrite that matches its own result would never be done."""
    case = captured(network)
    gm = case.fresh()
    assert matches(rewrite(gm, case, kernels="on", **EVERYTHING))
    # Cleaning up may: rewrites leave operations that are equal or do nothing.
    clean = {cls.spec.option: False for cls in PASSES if cls.spec.phase == Phase.CLEAN}
    assert matches(rewrite(gm, case, kernels="on", **{**EVERYTHING, **clean})) == {}


def test_what_stable_diffusion_s_unet_gets() -> None:
    """Other pipelines use these passes: all of its norms, attentions and gates are taken."""
    case = captured("Stable Diffusion 1.5")
    plain = case.fresh()
    before = ops(plain)
    assert (before["group_norm"], before["layer_norm"], before["gelu"]) == (61, 48, 16)
    assert before["scaled_dot_product_attention"] == 32
    gm = case.fresh()
    counts = matches(rewrite(gm, case, kernels="on", **EVERYTHING))
    wanted = {
        "fuse_group_norm_silu": 61,
        "choose_sdpa": 32,
        "fuse_qkv": 32,
        "fuse_geglu": 16,
        "fuse_linear_geglu": 16,
        "fuse_feed_forward": 16,
        "fuse_add_layer_norm": 32,
        "fuse_layer_norm": 16,  # which follow a projection, not a sum
        "fuse_upsample_conv": 3,
        "fuse_residual_moments": 39 - 3,  # not where an enlarged picture is joined with another
        "channels_last": 49,  # of 52 convolutions; the op brings its weights along
    }
    assert {name: counts.get(name) for name in wanted} == wanted
    after = ops(gm)
    assert not {"group_norm", "layer_norm", "gelu", "interpolate"} & after.keys()
    assert "scaled_dot_product_attention" not in after
    # Nobody vouches for its inputs, and it has no motion modules.
    guided = {"guidance_prefix", "null_audio", "split_conv_in", "fuse_temporal_attention"}
    assert not guided & counts.keys()
