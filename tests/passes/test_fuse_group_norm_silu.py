"""fuse_group_norm_silu: every group norm of real networks, and none that it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor

from lsync_compile.kernels import group_norm_silu
from lsync_compile.passes.fuse_group_norm_silu import OP, FuseGroupNormSilu


def fused(gm, **options):
    return networks.run_pass(gm, FuseGroupNormSilu, **options)


def kinds(gm) -> dict[tuple[bool, bool], int]:
    """How many have (SiLU, shift)."""
    found: dict[tuple[bool, bool], int] = {}
    for node in gm.graph.nodes:
        if node.target is OP:
            key = (node.args[5], node.args[6] is not None)
            found[key] = found.get(key, 0) + 1
    return found


def biases(gm) -> int:
    """How many convolutions have one."""
    return sum(node.target is F.conv2d and node.args[2] is not None for node in gm.graph.nodes)


@pytest.mark.parametrize(
    ("network", "count", "expected"),
    [
        # 22 residual blocks and the last norm; 16 transformers and 20 motion modules
        (networks.latentsync_unet, 81, {(True, False): 23, (True, True): 22, (False, False): 36}),
        # 22 residual blocks and the last norm; 16 transformers
        (
            networks.stable_diffusion_unet,
            61,
            {(True, False): 23, (True, True): 22, (False, False): 16},
        ),
        # 10 and 14 residual blocks without a time embedding but for the convolution's bias; the
        # last norm; the attention's
        (networks.vae_encoder, 22, {(True, False): 11, (True, True): 10, (False, False): 1}),
        (networks.vae_decoder, 30, {(True, False): 15, (True, True): 14, (False, False): 1}),
    ],
)
def test_real_networks(network: Callable, count: int, expected: dict) -> None:
    gm, inputs = network()
    after, record = fused(gm)
    assert (record.outcome, record.matches) == ("applied", count)
    assert kinds(after) == expected
    silu, shift = (sum(n for key, n in expected.items() if key[i]) for i in (0, 1))
    gone = networks.ops(gm) - networks.ops(after)
    assert gone["group_norm"] == count
    assert gone["silu"] == silu
    assert gone["getitem"] == (0 if "vae" in network.__name__ else shift)
    assert biases(gm) - biases(after) == shift
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert one.stride() == other.stride()
    assert fused(after)[1].outcome == "no match"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_further_from_exact_than_the_plain_operations(dtype: torch.dtype) -> None:
    def block(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return F.silu(F.group_norm(x + t[:, :, None, None], 4, w, w))

    inputs = [torch.randn(2, 16, 9, 9), torch.randn(2, 16), torch.randn(16)]
    inputs = [value.to(dtype) for value in inputs]
    gm, placed = capture(block, *inputs)
    after, record = fused(gm)
    assert record.matches == 1
    exact = block(*(value.double() for value in inputs))
    error = networks.distance(after(*placed)[0], exact)
    assert error <= networks.distance(gm(*placed)[0], exact)
    assert error <= FuseGroupNormSilu.kernel.tolerances[dtype].relative


X, T, W = torch.randn(2, 8, 3, 5), torch.randn(2, 8), torch.rand(8)


def norm(x: Tensor, w: Tensor) -> Tensor:
    return F.group_norm(x, 2, w, w, 1e-3)


def shift_first(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.silu(norm(t[:, :, None, None] + x, w))


def norm_used_twice(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    y = norm(x, w)
    return F.silu(y) + y


def sum_used_twice(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    y = x + t[:, :, None, None]
    return F.silu(norm(y, w)) + y


def one_row_for_all(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.silu(norm(x + t[:1][:, :, None, None], w))


def sum_along_another_dimension(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.silu(norm(x + x[:, :, :1], w))


def sequence(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return norm(x.flatten(2), w)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (shift_first, (True, True)),
        (norm_used_twice, (False, False)),
        (sum_used_twice, (True, False)),
        (one_row_for_all, (True, False)),
        (sum_along_another_dimension, (True, False)),
        (sequence, (False, False)),
    ],
)
def test_how_much_is_taken(function: Callable, expected: tuple[bool, bool]) -> None:
    gm, inputs = capture(function, X, T, W)
    after, record = fused(gm)
    assert record.matches == 1
    assert kinds(after) == {expected: 1}
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0])


def test_the_layout_is_kept_and_views_become_reshapes() -> None:
    def function(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return norm(x.transpose(2, 3), w).view(2, 2, 60)

    gm, inputs = capture(function, X, T, W)
    after, _ = fused(gm)
    assert networks.ops(after)["reshape"] == 1
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0])


V = torch.randn(8, 8, 3, 3)


def image(x: Tensor, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(norm(F.conv2d(x, v, w, padding=1) + t[:, :, None, None], w))


def without_shift(x: Tensor, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm(F.conv2d(x, v, bias=w, padding=1), w)


def video(x: Tensor, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = F.conv2d(x, v, w, padding=1).view(1, 2, 8, 3, 5).transpose(1, 2)
    return F.silu(norm(h + t[:1][:, :, None, None, None], w))


def seen_twice(x: Tensor, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = F.conv2d(x, v, w, padding=1)
    return norm(h, w) + h


def other_channels(x: Tensor, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = F.conv2d(x, v, w, padding=1)
    return norm(h.view(2, 2, 4, 15).transpose(1, 2).reshape(1, 8, 2, 15), w)


def no_bias(x: Tensor, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm(F.conv2d(x, v, padding=1), w)


@pytest.mark.parametrize(
    ("function", "taken"),
    [
        (image, True),
        (without_shift, True),
        (video, True),
        (seen_twice, False),
        (other_channels, False),
        (no_bias, False),
    ],
)
def test_the_bias_of_a_convolution(function: Callable, taken: bool) -> None:
    gm, inputs = capture(function, X, T, W, V)
    after, record = fused(gm)
    assert record.matches == 1
    assert [key[1] for key in kinds(after)] == [taken]
    (conv,) = (node for node in after.graph.nodes if node.target is F.conv2d)
    bias = conv.args[2] if len(conv.args) > 2 else conv.kwargs.get("bias")
    assert (bias is None) == (taken or function is no_bias)
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0], rtol=1e-5, atol=1e-5)


def no_weights(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 2))


def six_dimensions(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return norm(x[..., None, None], w)


def other_dtype(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.silu(F.group_norm(x.double(), 2, w.double(), w.double()))


@pytest.mark.parametrize("function", [no_weights, six_dimensions, other_dtype])
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, X, T, W)
    after, record = fused(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)


def writes(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    y = norm(x, w)
    x.add_(1)
    return F.silu(y)


def test_why_it_stays_away() -> None:
    gm, _ = capture(shift_first, X, T, W)
    assert fused(gm, kernels="off")[1].reason == "option kernels is 'off'"
    assert fused(gm, kernels="auto")[1].reason == "no kernel runs on a CPU"
    assert fused(gm, fuse_group_norm_silu=False)[1].outcome == "off"
    gm, _ = capture(writes, X.clone(), T, W)
    assert fused(gm)[1].reason == "the graph writes in place"
    gm, _ = capture(shift_first, X.double(), T.double(), W.double())
    assert fused(gm)[1].reason == "group_norm_silu does not take float64"


def test_the_time_embedding_is_not_rounded_into_the_sum() -> None:
    gm, inputs = capture(shift_first, X.half(), T.half(), W.half())
    (out,) = fused(gm)[0](*inputs)
    assert torch.equal(out, group_norm_silu(X.half(), 2, W.half(), W.half(), 1e-3, True, T.half()))
