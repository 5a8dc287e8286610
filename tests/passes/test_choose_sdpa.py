"""choose_sdpa: every attention within frames and to the sound, none that it cannot give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from networks import stable_diffusion_unet
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.choose_sdpa import ChooseSdpa
from lsync_compile.passes.fuse_temporal_attention import FuseTemporalAttention
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.remove_noops import RemoveNoops
from lsync_compile.report import PassRecord

OP = torch.ops.lsync.spatial_attention.default
SDPA = F.scaled_dot_product_attention
HEADS = 2


def rewritten(gm: GraphModule, kernels: str = "on") -> tuple[GraphModule, PassRecord]:
    copy = copy_graph(gm)
    manager = PassManager(
        Options(kernels=kernels), [RemoveNoops, FuseTemporalAttention, ChooseSdpa]
    )
    records = manager.run(copy, "unet", "graph")
    copy.graph.lint()
    (record,) = (record for record in records if record.name == "choose_sdpa")
    return copy, record


def targets(gm: GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op.startswith("call")]


def test_the_real_unet() -> None:
    _, gm, inputs = captured_unet()
    with torch.no_grad():
        after, record = rewritten(gm)
        assert record.matches == 32  # 16 within frames, 16 to the sound
        assert targets(after).count(OP) == 32
        assert SDPA not in targets(after)
        for node in after.graph.nodes:
            if node.target is OP:  # straight from projection to projection
                assert all(operand.target is F.linear for operand in node.args[:3])
                assert all(user.target is F.linear for user in node.users)
        expected = gm(*inputs)[0]
        torch.testing.assert_close(after(*inputs)[0], expected, rtol=1e-4, atol=1e-4)
        assert rewritten(after)[1].matches == 0


def test_stable_diffusion() -> None:
    gm, inputs = stable_diffusion_unet()
    with torch.no_grad():
        after, record = rewritten(gm)
        assert record.matches == targets(after).count(OP) == 32
        torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0], rtol=1e-4, atol=1e-4)


def split(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def usual(x: Tensor, y: Tensor) -> Tensor:
    return SDPA(split(x), split(y), split(y)).transpose(1, 2).flatten(2) * 2


def scaled(x: Tensor, y: Tensor) -> Tensor:
    out = SDPA(split(x), split(y), split(y * 2), attn_mask=None, dropout_p=0.0, scale=0.3)
    return out.transpose(1, 2).reshape(2, -1, 16) * 2


def of_other_views(x: Tensor, y: Tensor) -> Tensor:
    """Heads in another order, keys computed by head, the result used by head."""
    q = x.unflatten(2, (-1, HEADS)).permute(0, 3, 1, 2)
    k = split(y).softmax(-1)
    return SDPA(q, k, k).cumsum(-1)


def used_twice(x: Tensor, y: Tensor) -> Tensor:
    out = SDPA(split(x), split(y), split(y))
    return out.transpose(1, 2).flatten(2) * out.sum()


@pytest.mark.parametrize("function", [usual, scaled, of_other_views, used_twice])
def test_attention(function: Callable) -> None:
    x, y = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    gm, inputs = capture(function, x, y)
    after, record = rewritten(gm)
    assert record.matches == 1
    assert SDPA not in targets(after)
    torch.testing.assert_close(after(*inputs)[0], function(x, y))
    if function in (usual, scaled):  # nothing is left of splitting and merging
        assert len(targets(after)) == (2 if function is usual else 3)


def masked(x: Tensor, y: Tensor) -> Tensor:
    return SDPA(split(x), split(x), split(x), attn_mask=torch.ones(5, 5).tril().bool())


def causal(x: Tensor, y: Tensor) -> Tensor:
    return SDPA(split(x), split(x), split(x), is_causal=True)


def dropped(x: Tensor, y: Tensor) -> Tensor:
    return SDPA(split(x), split(y), split(y), dropout_p=0.5)


def with_shared_heads(x: Tensor, y: Tensor) -> Tensor:
    return SDPA(split(x), split(y)[:, :1], split(y)[:, :1], enable_gqa=True)


def with_wide_values(x: Tensor, y: Tensor) -> Tensor:
    return SDPA(split(x), split(y), split(torch.cat([y, y], 2)))


def broadcast(x: Tensor, y: Tensor) -> Tensor:
    return SDPA(split(x), split(y[:1]), split(y[:1]))


def flat(x: Tensor, y: Tensor) -> Tensor:
    return SDPA(x, y, y)


@pytest.mark.parametrize(
    "function", [masked, causal, dropped, with_shared_heads, with_wide_values, broadcast, flat]
)
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, torch.randn(2, 5, 16), torch.randn(2, 3, 16))
    after, record = rewritten(gm)
    assert (record.outcome, record.matches) == ("no match", 0)
    assert targets(after).count(SDPA) == 1


def test_vetoes() -> None:
    x, y = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    gm, _ = capture(usual, x, y)
    assert rewritten(gm, kernels="auto")[1].reason == "no kernel runs on a CPU"
    assert rewritten(gm, kernels="off")[1].reason == "option kernels is 'off'"
    gm, _ = capture(usual, x.double(), y.double())
    assert rewritten(gm)[1].reason == "spatial_attention does not take float64"
