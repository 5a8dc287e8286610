"""fuse_add_layer_norm: every residual sum with a norm, with and without the frames' numbers."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor

from lsync_compile.passes.fuse_add_layer_norm import OP, FuseAddLayerNorm


def fused(gm, **options):
    return networks.run_pass(gm, FuseAddLayerNorm, **options)


def positions(gm) -> int:
    """How many take the frames' numbers."""
    return sum(node.target is OP and len(node.args) == 6 for node in gm.graph.nodes)


@pytest.mark.parametrize(
    ("network", "count", "with_position"),
    [
        # Two in each of 16 transformers; two in each of 20 motion modules, the first with numbers.
        (networks.latentsync_unet, 72, 20),
        (networks.stable_diffusion_unet, 32, 0),
    ],
)
def test_real_networks(network: Callable, count: int, with_position: int) -> None:
    gm, inputs = network()
    after, record = fused(gm)
    assert (record.outcome, record.matches) == ("applied", count)
    assert positions(after) == with_position
    gone = networks.ops(gm) - networks.ops(after)
    assert gone == {"layer_norm": count, "add": count + with_position}
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert fused(after)[1].outcome == "no match"


A, X, W = torch.randn(6, 5, 8), torch.randn(6, 5, 8), torch.rand(8)
P = torch.randn(1, 7, 8)


def norm(t: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(t, (8,), w, w, 1e-3)


def both_used(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    t = a + x
    return norm(t, w).cos() + t


def norm_alone(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(torch.add(a, x), w)


def rows_of_frames(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    t = a + x
    table = p[:, :3].reshape(3, 1, -1)
    return (norm(t, w).unflatten(0, (2, 3)) + table).flatten(0, 1) + t


def rows_of_positions(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    t = a + x
    return (p[:, :5] + norm(t, w)).cos() + t


def norm_used_twice(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    n = norm(a + x, w)
    return (n + p[:, :5]) * n


def a_table_for_each_row(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(a + x, w) + a


def a_table_of_one(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(a + x, w) + p[:, :1]


def sum_used_before_the_table(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    t = a + x
    n = norm(t, w)
    c = t.cos()
    return (n + p[:, :5]) * c


@pytest.mark.parametrize(
    ("function", "with_position"),
    [
        (both_used, 0),
        (norm_alone, 0),
        (rows_of_frames, 1),
        (rows_of_positions, 1),
        (norm_used_twice, 0),
        (a_table_for_each_row, 0),
        (a_table_of_one, 0),
        (sum_used_before_the_table, 0),
    ],
)
def test_how_much_is_taken(function: Callable, with_position: int) -> None:
    gm, inputs = capture(function, A, X, W, P)
    after, record = fused(gm)
    assert record.matches == 1
    assert positions(after) == with_position
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    values = [value.to(dtype) for value in (A, X, W, P)]
    gm, inputs = capture(rows_of_frames, *values)
    after, record = fused(gm)
    assert record.matches == 1
    exact = rows_of_frames(*(value.double() for value in values))
    error = networks.distance(after(*inputs)[0], exact)
    assert error <= networks.distance(gm(*inputs)[0], exact)


def broadcast_sum(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(a + x[:1], w)


def two_dimensions(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return F.layer_norm(a + x, (5, 8), p[0, :5], p[0, :5])


def no_weights(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return F.layer_norm(a + x, (8,))


def weighted_sum(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(torch.add(a, x, alpha=2), w)


def no_sum(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(a * x, w)


def sum_used_before_the_norm(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    t = a + x
    return norm(t, t.cos().mean((0, 1)))


def double(a: Tensor, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(a.double() + x.double(), w.double())


@pytest.mark.parametrize(
    "function",
    [
        broadcast_sum,
        two_dimensions,
        no_weights,
        weighted_sum,
        no_sum,
        sum_used_before_the_norm,
        double,
    ],
)
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, A, X, W, P)
    after, record = fused(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)
