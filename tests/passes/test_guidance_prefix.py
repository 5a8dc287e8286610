"""guidance_prefix: half the batch before the sound, the whole one after, nothing unvouched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captures import captured_unet
from guided import guide, run_vouched, small
from networks import distance, ops, results, stable_diffusion_unet
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from lsync_compile.graph.census import op_name
from lsync_compile.graph.dependency import find_argument
from lsync_compile.passes.guidance_prefix import GuidancePrefix
from lsync_compile.passes.null_audio import NullAudio


def hear(x: Tensor, sound: Tensor) -> Tensor:
    """Something of the sample and the sound, ``(b, 8)``."""
    return x + sound.view(x.shape[0], -1, 8).sum(1)


def test_case_1_the_prefix_runs_at_half_the_batch() -> None:
    def function(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
        time = F.linear(t.reshape(-1).expand(2)[:, None].expand(2, 8), w, b)
        return hear((F.linear(x, w, b) + time).sin(), sound)

    gm, inputs = small(function)
    after, record = run_vouched(gm, GuidancePrefix)
    assert (record.outcome, record.matches) == ("applied", 3)  # linear, add, sin
    shapes = {
        op_name(node): tuple(node.meta["example_value"].shape)
        for node in after.graph.nodes
        if node.op.startswith("call")
    }
    assert shapes["sin"] == (1, 8)
    assert shapes["cat"] == (2, 8)
    # The timestep's own layer stays whole: it is not computed in each step anyway.
    time = [n for n in after.graph.nodes if n.target is F.linear and "expand" in str(n.args[0])]
    assert [tuple(node.meta["example_value"].shape) for node in time] == [(2, 8)]
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-6


def test_case_2_a_half_of_the_prefix_is_not_doubled_first() -> None:
    def function(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b)[1:].sin() + sound.sum()

    gm, inputs = small(function)
    after, record = run_vouched(gm, GuidancePrefix)
    assert record.outcome == "applied"
    assert ops(after)["cat"] == 0
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-6


def test_views_are_of_the_doubled_value() -> None:
    def function(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
        hidden = F.linear(x, w, b)
        return hear(hidden.view(2, 2, 4).transpose(1, 2).flatten(1), sound) + hear(hidden, sound)

    gm, inputs = small(function)
    after, _ = run_vouched(gm, GuidancePrefix)
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-6


def test_a_result_that_never_hears_is_doubled() -> None:
    gm, inputs = small(lambda x, t, sound, w, b: F.linear(x, w, b))
    after, _ = run_vouched(gm, GuidancePrefix)
    assert ops(after)["cat"] == 1
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-6


def test_inductor_keeps_the_layout_of_what_is_doubled() -> None:
    """It would write a tensor joined with itself with its channels apart, as a repeated one."""

    def function(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
        picture = F.linear(x, w, b).view(2, 2, 2, 2).contiguous(memory_format=torch.channels_last)
        return picture.sin() + sound.view(2, -1, 8).sum(1).view(2, 2, 2, 2)

    gm, inputs = small(function)
    after, record = run_vouched(gm, GuidancePrefix)
    assert record.outcome == "applied"
    traced = make_fx(after, decomposition_table=select_decomp_table())(*inputs)
    (joined,) = [node for node in traced.graph.nodes if node.target is torch.ops.aten.cat.default]
    assert joined.meta["val"].is_contiguous(memory_format=torch.channels_last)
    assert distance(results(traced, inputs)[0], results(gm, inputs)[0]) < 1e-6


def test_what_is_unknown_ends_the_prefix() -> None:
    def function(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return hear(F.linear(F.linear(x, w, b).flip(1), w, b), sound)

    gm, inputs = small(function)
    after, record = run_vouched(gm, GuidancePrefix)
    assert record.matches == 1
    flipped = next(node for node in after.graph.nodes if node.target == "flip")
    assert flipped.meta["example_value"].shape == (2, 8)
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-6


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t, sound, w, b: hear(x.sin(), sound),
        lambda x, t, sound, w, b: F.linear(hear(x, sound), w, b),
        lambda x, t, sound, w, b: F.linear(x.flip(0), w, b) + hear(x, sound),
        lambda x, t, sound, w, b: F.linear(x - x.roll(1, 0), w, b) + hear(x, sound),
    ],
    ids=["nothing heavy", "the sound at once", "halves exchanged", "halves mixed"],
)
def test_it_does_not_fire(function) -> None:
    gm, inputs = small(function)
    expected = results(gm, inputs)[0]
    after, record = run_vouched(gm, GuidancePrefix)
    assert record.outcome == "no match"
    assert torch.equal(results(after, inputs)[0], expected)


def test_vetoes() -> None:
    def function(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return hear(F.linear(x, w, b), sound)

    def reason(gm, vouched=frozenset({"guidance"})) -> str:
        return run_vouched(gm, GuidancePrefix, vouched)[1].reason

    assert reason(small(function)[0], frozenset({"null_audio"})).startswith("nobody vouches")
    assert reason(small(function, batch=3)[0]) == "no sample with two halves"

    def writes(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return function(x, t, sound, w, b).add_(1)

    assert reason(small(writes)[0]) == "the graph writes in place"


def test_the_real_unet() -> None:
    _, gm, inputs = captured_unet()
    inputs = guide(gm, inputs, silent=False)
    after, record = run_vouched(gm, GuidancePrefix)
    # conv_in, the first resnet, the first transformer up to the queries for the sound.
    assert record.matches == 40
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-5
    batch = find_argument(after.graph, "sample").meta["example_value"].shape[0]
    halves = [
        node
        for node in after.graph.nodes
        if node.target in (F.conv2d, F.scaled_dot_product_attention)
        and node.meta["example_value"].shape[0] == batch * 4 // 2
    ]
    # conv_in, two of the resnet, proj_in; the attention of the pixels.
    assert [node.target for node in halves] == [F.conv2d] * 4 + [F.scaled_dot_product_attention]
    doubled = ops(after)["cat"] - ops(gm)["cat"]
    # conv_in for the last skip, the transformer's residual, its inner residual, the queries.
    assert doubled == 4


def test_with_null_audio_the_queries_are_not_doubled() -> None:
    _, gm, inputs = captured_unet()
    inputs = guide(gm, inputs)
    expected = results(gm, inputs)[0]
    silent, _ = run_vouched(gm, NullAudio)
    after, record = run_vouched(silent, GuidancePrefix)
    assert record.matches == 39  # the queries are at half the batch already
    assert ops(after)["cat"] - ops(silent)["cat"] == 3
    assert distance(results(after, inputs)[0], expected) < 1e-5


def test_stable_diffusions_unet() -> None:
    gm, inputs = stable_diffusion_unet()
    inputs = guide(gm, inputs, silent=False)
    after, record = run_vouched(gm, GuidancePrefix)
    assert record.outcome == "applied"
    attention = next(n for n in after.graph.nodes if n.target is F.scaled_dot_product_attention)
    assert attention.meta["example_value"].shape[0] == 1
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-5
