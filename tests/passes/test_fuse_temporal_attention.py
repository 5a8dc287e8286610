"""fuse_temporal_attention: complete on the real UNet, right, and away from the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.kernels import registered
from lsync_compile.models.motion import TemporalTransformer3DModel
from lsync_compile.options import Options
from lsync_compile.passes.fuse_temporal_attention import FuseTemporalAttention
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.remove_noops import RemoveNoops
from lsync_compile.report import PassRecord

OP = torch.ops.lsync.temporal_attention.default
SDPA = F.scaled_dot_product_attention
HEADS = 2


def rewritten(gm: GraphModule, kernels: str = "on") -> tuple[GraphModule, PassRecord]:
    copy = copy_graph(gm)
    passes = [RemoveNoops, FuseTemporalAttention]
    records = PassManager(Options(kernels=kernels), passes).run(copy, "unet", "graph")
    copy.graph.lint()
    return copy, records[-1]


def targets(gm: GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes]


def check(function: Callable, *args: Tensor, attentions: int) -> GraphModule:
    """The rewritten function attends that often in the kernel, and gives the same numbers."""
    with torch.no_grad():
        gm, inputs = capture(function, *args)
        after, record = rewritten(gm)
        assert record.matches == attentions
        assert targets(after).count(OP) == attentions
        assert targets(after).count(SDPA) == targets(gm).count(SDPA) - attentions
        torch.testing.assert_close(after(*inputs)[0], function(*args))
    return after


def test_the_real_unet() -> None:
    _, gm, inputs = captured_unet()
    with torch.no_grad():
        after, record = rewritten(gm)
        assert record.matches == 40  # 20 motion modules of two attentions
        assert targets(after).count(OP) == 40
        assert targets(gm).count(SDPA) == 72
        assert targets(after).count(SDPA) == 32  # within frames and to the sound, 16 each
        expected = gm(*inputs)[0]
        torch.testing.assert_close(after(*inputs)[0], expected, rtol=1e-4, atol=1e-4)
        assert rewritten(after)[1].matches == 0


def motion_module(**more: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"layers": 2, "attentions": 2, "max_len": 8} | more
    return TemporalTransformer3DModel(
        16, inner_dim=16, heads=HEADS, groups=4, **settings
    ).requires_grad_(False)


def video(frames: int = 5, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 16, frames, 3, 4, generator=generator)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("more", [{}, {"max_len": None}, {"layers": 1, "attentions": 3}])
def test_motion_modules(batch: int, more: dict) -> None:
    module = motion_module(**more)
    after = check(module, video(batch=batch), attentions=2 * 2 if "layers" not in more else 3)
    inside = between_linears(after)
    assert not {"permute", "transpose", "contiguous", "view"} & set(inside)


def between_linears(gm: GraphModule) -> list[object]:
    """What is called from the first projection to the last."""
    called = targets(gm)
    last = len(called) - called[::-1].index(F.linear)
    return called[called.index(F.linear) : last]


def test_nothing_is_copied_in_channels_last_layout() -> None:
    x = video().contiguous(memory_format=torch.channels_last_3d)
    module = motion_module()
    module.norm = nn.Identity()  # torch's group norm does not keep the layout
    after = check(module, x, attentions=4)
    (entrance,) = (
        n for n in after.graph.nodes if n.target == "contiguous" and F.linear in users(n)
    )
    assert entrance.args[0].meta["example_value"].is_contiguous()
    exit_ = [n for n in after.graph.nodes if n.op == "call_function" and n.name.startswith("out")][
        -1
    ]
    assert exit_.meta["example_value"].stride() == x.stride()


def users(node: torch.fx.Node) -> list[object]:
    return [user.target for user in node.users]


class Rearranged(nn.Module):
    """AnimateDiff's way: each attention alone makes rows of positions and goes back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(3)])
        self.out = nn.Linear(16, 16)
        self.register_buffer("pe", torch.randn(1, 8, 16))
        self.requires_grad_(False)

    def forward(self, x: Tensor, frames: int, scale: float | None = None) -> Tensor:
        total, tokens, width = x.shape
        rows = self.norm(x).unflatten(0, (-1, frames)).transpose(1, 2).reshape(-1, frames, width)
        rows = rows + self.pe[:, :frames]
        q, k, v = (p(rows).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in self.qkv)
        out = SDPA(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        out = self.out(out).view(-1, tokens, frames, width).transpose(1, 2)
        return out.reshape(total, tokens, width) + x


def test_one_attention_alone_rearranged() -> None:
    after = check(Rearranged(), torch.randn(6, 7, 16), 3, attentions=1)
    assert not {"transpose", "permute"} & set(targets(after))
    check(Rearranged(), torch.randn(6, 7, 16), 3, 0.5, attentions=1)


def test_attention_over_rows_of_a_picture() -> None:
    """Exchanged axes of any kind: here, each column of a picture attends along its rows."""

    def columns(x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 1, 3).flatten(0, 1)  # (b w) h c
        q = rows.unflatten(2, (HEADS, -1)).transpose(1, 2)
        out = SDPA(q, q, q).transpose(1, 2).flatten(2)
        return out.unflatten(0, (2, -1)).transpose(1, 2) * 2

    check(columns, torch.randn(2, 3, 5, 16), attentions=1)


def test_values_used_outside_are_given_back() -> None:
    module = Rearranged()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1)
        normed = module.norm(rows)
        q = normed.unflatten(2, (HEADS, -1)).transpose(1, 2)
        return SDPA(q, q, q).softmax(-1), normed.cumsum(0)

    gm, inputs = capture(function, torch.randn(6, 7, 16))
    after, record = rewritten(gm)
    assert record.matches == 1
    for got, expected in zip(after(*inputs), function(*inputs[:1]), strict=True):
        torch.testing.assert_close(got, expected)


def within_frames(x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    q = rows.unflatten(2, (HEADS, -1)).transpose(1, 2)
    return SDPA(q, q, q)


def with_too_many_frames(x: Tensor) -> Tensor:
    return attend(x.repeat(1, 1, 7, 1, 1))


def with_a_mask(x: Tensor) -> Tensor:
    return attend(x, attn_mask=torch.ones(5, 5).tril().bool())


def in_causal_order(x: Tensor) -> Tensor:
    return attend(x, is_causal=True)


def across_other_keys(x: Tensor) -> Tensor:
    q = heads(x)
    k = heads(x[:, :, :3])
    return SDPA(q, k, k)


def with_mixed_positions(x: Tensor) -> Tensor:
    q = heads(x)
    return SDPA(q, q.flip(0), q)


def in_a_wrong_order(x: Tensor) -> Tensor:
    """The inner index of the rows changes slower than the frames: not one grid."""
    rows = x.permute(3, 4, 0, 2, 1).flatten(0, 2)  # (h w b) f c
    q = rows.unflatten(2, (HEADS, -1)).transpose(1, 2)
    return SDPA(q, q, q)


def heads(x: Tensor) -> Tensor:
    rows = x.permute(0, 3, 4, 2, 1).flatten(0, 2)
    return rows.unflatten(2, (HEADS, -1)).transpose(1, 2)


def attend(x: Tensor, **more: object) -> Tensor:
    q = heads(x)
    return SDPA(q, q, q, **more)


@pytest.mark.parametrize(
    "function",
    [
        with_too_many_frames,
        with_a_mask,
        in_causal_order,
        across_other_keys,
        with_mixed_positions,
        in_a_wrong_order,
    ],
)
def test_it_does_not_fire(function: Callable) -> None:
    gm, inputs = capture(function, video())
    after, record = rewritten(gm)
    assert (record.outcome, record.matches) == ("no match", 0)
    assert OP not in targets(after)
    assert torch.equal(after(*inputs)[0], gm(*inputs)[0])


def test_attention_within_a_frame_stays() -> None:
    gm, _ = capture(within_frames, video()[:, :, 0])
    assert rewritten(gm)[1].matches == 0


def test_vetoes() -> None:
    gm, _ = capture(attend, video())
    assert rewritten(gm, kernels="auto")[1].reason == "no kernel runs on a CPU"
    assert rewritten(gm, kernels="off")[1].reason == "option kernels is 'off'"

    def writes(x: Tensor) -> Tensor:
        out = attend(x)
        out.add_(1)
        return out

    assert rewritten(capture(writes, video())[0])[1].reason == "the graph writes in place"
    module = motion_module().requires_grad_(True)
    assert "gradient" in rewritten(capture(module, video())[0])[1].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    module, x = motion_module(), video()
    exact = module.double()(x.double())
    module, x = motion_module().to(dtype), video().to(dtype)
    with torch.no_grad():
        gm, inputs = capture(module, x)
        after, _ = rewritten(gm)
        ours = (after(*inputs)[0].double() - exact).norm() / exact.norm()
        torchs = (module(x).double() - exact).norm() / exact.norm()
    assert ours < 1.2 * torchs + registered()["temporal_attention"].tolerances[dtype].relative
