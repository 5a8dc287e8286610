"""null_audio: the half without sound is the bias, bit for bit; the other half is attended to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captures import captured_unet
from guided import guide, run_vouched, small
from networks import distance, ops, results, stable_diffusion_unet
from torch import Tensor

from lsync_compile.passes.null_audio import NullAudio


def attend(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor, *, bias=None) -> Tensor:
    """A layer of two heads, its key and value projected without bias."""
    queries = x[:, None, None].expand(2, 2, 4, 8).flatten(0, 1)
    q, k, v = (F.linear(part, w, bias) for part in (queries, sound, sound))
    q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in (q, k, v))
    heads = F.scaled_dot_product_attention(q, k, v)
    return F.linear(heads.transpose(1, 2).flatten(2), w, b)


def test_half_of_a_layer() -> None:
    gm, inputs = small(attend)
    after, record = run_vouched(gm, NullAudio)
    assert (record.outcome, record.matches) == ("applied", 1)
    (attention,) = (n for n in after.graph.nodes if n.target is F.scaled_dot_product_attention)
    assert attention.meta["example_value"].shape == (2, 2, 4, 4)
    assert ops(after)["linear"] == ops(gm)["linear"] == 4
    expected, result = results(gm, inputs)[0], results(after, inputs)[0]
    bias = next(value for value in inputs if value.shape == (8,))
    assert torch.equal(result[:2], expected[:2])
    assert torch.equal(result[:2], bias.expand(2, 4, 8))
    assert distance(result, expected) < 1e-6


def test_without_an_output_bias_the_half_is_zero() -> None:
    gm, inputs = small(lambda x, t, sound, w, b: attend(x, t, sound, w, None))
    after, record = run_vouched(gm, NullAudio)
    assert record.matches == 1
    result = results(after, inputs)[0]
    assert torch.count_nonzero(result[:2]) == 0
    assert distance(result, results(gm, inputs)[0]) < 1e-6


def masked(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
    heads = sound[:, None]
    mask = torch.ones(3, 3, dtype=torch.bool)
    return F.linear(F.scaled_dot_product_attention(x.sum() + heads, heads, heads, mask), w, b)


def used_twice(x: Tensor, t: Tensor, sound: Tensor, w: Tensor, b: Tensor) -> Tensor:
    query = F.linear(x[:, None, None].expand(2, 2, 4, 8).flatten(0, 1), w)
    value = F.linear(sound, w)
    out = F.scaled_dot_product_attention(query, value, value)
    return F.linear(out, w, b) + out


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t, sound, w, b: attend(x, t, sound, w, b, bias=b),
        lambda x, t, sound, w, b: attend(x, t, sound + 1, w, b),
        lambda x, t, sound, w, b: attend(
            x, t, x[:, None, None].expand(2, 2, 3, 8).flatten(0, 1), w, b
        ),
        masked,
        used_twice,
    ],
    ids=["keys with bias", "sound is shifted", "no sound", "masked", "used twice"],
)
def test_it_does_not_fire(function) -> None:
    gm, inputs = small(function)
    after, record = run_vouched(gm, NullAudio)
    assert record.matches == 0
    assert torch.equal(results(after, inputs)[0], results(gm, inputs)[0])


def test_vetoes() -> None:
    def reason(gm, vouched=frozenset({"null_audio"})) -> str:
        return run_vouched(gm, NullAudio, vouched)[1].reason

    assert reason(small(attend)[0], frozenset({"guidance"})).startswith("nobody vouches")
    odd, _ = small(lambda x, t, sound, w, b: F.linear(x, w) + sound.sum(), batch=3, frames=1)
    assert reason(odd) == "no sound with two halves"
    writes, _ = small(lambda *arguments: attend(*arguments).mul_(2))
    assert reason(writes) == "the graph writes in place"


def test_the_real_unet() -> None:
    _, gm, inputs = captured_unet()
    inputs = guide(gm, inputs)
    after, record = run_vouched(gm, NullAudio)
    assert record.matches == 16
    assert ops(after)["scaled_dot_product_attention"] == ops(gm)["scaled_dot_product_attention"]
    assert ops(after)["cat"] == ops(gm)["cat"] + 16
    sizes = [
        node.meta["example_value"].shape[0]
        for node in after.graph.nodes
        if node.target is F.scaled_dot_product_attention and node.args[1] is not node.args[0]
    ]
    assert sizes.count(4) >= 16  # half of 2 x 4 frames
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-5


def test_stable_diffusions_unet() -> None:
    gm, inputs = stable_diffusion_unet()
    inputs = guide(gm, inputs)
    after, record = run_vouched(gm, NullAudio)
    assert record.matches == 16
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-5
