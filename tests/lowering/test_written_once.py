"""Values that several kernels outside of Inductor read: written once, with the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.lowering import needs_realized_inputs
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule

import lsync_compile.kernels  # noqa: F401  registers the ops
from lsync_compile.lowering import inductor
from lsync_compile.lowering.written_once import _FORCE, written_once
from lsync_compile.options import Options

pytestmark = pytest.mark.skipif(_FORCE is None, reason="this torch has no force_stride_order")
FRAMES, CHANNELS, SIDE = 3, 16, 6


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    """There Inductor computes joined channels where they are used, on a CPU it stores them."""
    torch._dynamo.reset()
    with config.patch(force_pointwise_cat=True, force_disable_caches=True):
        yield


class Entrance(nn.Module):
    """Of a decoder's residual block: a skip connection, its norm and the shortcut."""

    def __init__(self, readers: int = 2) -> None:
        super().__init__()
        self.norm, self.readers = nn.GroupNorm(4, 2 * CHANNELS), readers
        self.first, self.shortcut = (
            nn.Conv2d(2 * CHANNELS, CHANNELS, side, padding=side // 2, bias=False)
            for side in (3, 1)
        )
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        joined = torch.cat([below, skip], 1)
        norm = self.norm
        normed = torch.ops.lsync.group_norm_silu.default(joined, 4, norm.weight, norm.bias)
        made = self.first(pictures(normed))
        return made + self.shortcut(pictures(joined)) if self.readers > 1 else made


def pictures(video: Tensor) -> Tensor:
    return video.transpose(1, 2).reshape(2 * FRAMES, -1, SIDE, SIDE)


def video() -> Tensor:
    """Channels together in memory."""
    return torch.randn(2, FRAMES, SIDE, SIDE, CHANNELS).movedim(-1, 1)


def forced(gm: GraphModule) -> int:
    return sum(node.target is _FORCE for node in gm.graph.nodes)


def large_buffers(gm: GraphModule, inputs: list) -> tuple[int, Tensor]:
    """How many buffers of the joined channels' size the compiled code writes; its result."""

    def run(*given: Tensor) -> Tensor:
        return inductor.lower(gm, inputs, Options()).call(*given)[0]

    # What Inductor has learnt of the op in an earlier compilation is not part of the graph.
    needs_realized_inputs.discard(torch.ops.lsync.group_norm_silu.default)
    with torch.no_grad():
        result, code = run_and_get_code(run, *inputs)
    size = f"empty_strided_cpu((2, {2 * CHANNELS}, {FRAMES}, {SIDE}, {SIDE})"
    return "".join(code).count(size), result


def test_joined_channels_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, inputs = capture(Entrance(), video(), video())
    after = written_once(gm)
    after.graph.lint()
    assert (forced(gm), forced(after)) == (0, 1)
    expected = gm(*inputs)[0]
    torch.testing.assert_close(after(*inputs)[0], expected, rtol=0, atol=0)
    once, result = large_buffers(gm, inputs)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(inductor, "written_once", lambda gm: gm)
    twice, _ = large_buffers(gm, inputs)
    assert (once, twice) == (1, 2)


def test_one_reader_needs_no_buffer_of_its_own() -> None:
    gm, _ = capture(Entrance(readers=1), video(), video())
    assert written_once(gm) is gm


class Pointwise(nn.Module):
    """Both readers are Inductor's own."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        joined = torch.cat([a, b], 1)
        return joined.sin() + F.relu(joined)


class Two(nn.Module):
    """A sum that two convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = a + b
        return self.one(total) * self.other(total)


def test_a_gradient_goes_through() -> None:
    a, b = torch.randn(2, 2, 4, 5, 5).unbind()
    a.requires_grad_()
    gm, inputs = capture(Two(), a, b)
    assert written_once(gm) is gm
    with torch.no_grad():
        assert forced(written_once(gm)) == 1
    result = inductor.lower(gm, inputs, Options()).call(*inputs)[0]
    (found,) = torch.autograd.grad(result.sum(), a)
    (expected,) = torch.autograd.grad(gm(*inputs)[0].sum(), a)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_writes_to_a_shared_value_is_seen() -> None:
    two = Two()

    def written(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.empty_like(a)
        total = torch.add(a, b, out=place)
        one = two.one(total)
        place.mul_(2)
        return one * two.other(total), place

    gm, _ = capture(written, torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5))
    assert written_once(gm) is gm


@pytest.mark.parametrize(("module", "count"), [(Pointwise(), 0), (Two(), 1)], ids=["own", "sum"])
def test_what_is_asked_for(module: nn.Module, count: int) -> None:
    gm, inputs = capture(module, torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5))
    after = written_once(gm)
    assert forced(after) == count
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0], rtol=0, atol=0)
