"""fuse_geglu: every feed-forward of real networks, and no other product."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor

from lsync_compile.passes.fuse_geglu import OP, FuseGeglu


def fused(gm, **options):
    return networks.run_pass(gm, FuseGeglu, **options)


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (networks.latentsync_unet, 36),  # 16 transformers, 20 motion modules
        (networks.stable_diffusion_unet, 16),
    ],
)
def test_real_networks(network: Callable, count: int) -> None:
    gm, inputs = network()
    after, record = fused(gm)
    assert (record.outcome, record.matches) == ("applied", count)
    gone = networks.ops(gm) - networks.ops(after)
    assert gone == {"chunk": count, "getitem": 2 * count, "gelu": count, "mul": count}
    assert networks.ops(after) - networks.ops(gm) == {"geglu.default": count}
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert fused(after)[1].outcome == "no match"


def gelu_first(x: Tensor) -> Tensor:
    value, gate = torch.chunk(x, 2, x.dim() - 1)
    return torch.mul(F.gelu(gate), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_spellings_and_precisions(dtype: torch.dtype) -> None:
    gm, inputs = capture(gelu_first, torch.randn(4, 5, 16, dtype=dtype))
    after, record = fused(gm)
    assert record.matches == 1
    error = networks.distance(after(*inputs)[0], gelu_first(inputs[0].double()))
    # The kernel's reference rounds between, as the plain operations do.
    assert error <= networks.distance(gm(*inputs)[0], gelu_first(inputs[0].double()))


def approximate(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


def gate_first(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def another_dimension(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=0)
    return value * F.gelu(gate)


def of_two_tensors(x: Tensor) -> Tensor:
    return x.chunk(2, dim=-1)[0] * F.gelu(x.sin().chunk(2, dim=-1)[1])


def four_parts(x: Tensor) -> Tensor:
    value, gate, _, _ = x.chunk(4, dim=-1)
    return value * F.gelu(gate)


def gate_used_again(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate) + gate


def gelu_used_again(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    gated = F.gelu(gate)
    return value * gated + gated


def broadcast(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)[:1]


def double(x: Tensor) -> Tensor:
    value, gate = x.double().chunk(2, dim=-1)
    return value * F.gelu(gate)


@pytest.mark.parametrize(
    "function",
    [
        approximate,
        gate_first,
        another_dimension,
        of_two_tensors,
        four_parts,
        gate_used_again,
        gelu_used_again,
        broadcast,
        double,
    ],
)
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, torch.randn(4, 8))
    after, record = fused(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)


def test_the_op_stands_where_the_product_stood() -> None:
    gm, inputs = capture(lambda x: gelu_first(x.sin()).cos(), torch.randn(3, 8))
    after, _ = fused(gm)
    assert [node.target for node in after.graph.nodes][1:-1] == ["sin", OP, "cos"]
    torch.testing.assert_close(after(*inputs), gm(*inputs))
