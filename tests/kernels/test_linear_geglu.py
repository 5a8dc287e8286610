"""A projection and its gate in one: references as they stand, both kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU

from lsync_compile.errors import OptionError
from lsync_compile.kernels import linear_geglu, registered
from lsync_compile.kernels.accuracy import error, exact, largest_error, poisoned_memory
from lsync_compile.kernels.launch import INTERPRETED, Kernel
from lsync_compile.kernels.linear_geglu_kernels import (
    _linear_geglu_tiles,
    stream,
    streams,
    takes,
    tiles,
)

SPEC = registered()["linear_geglu"]


def judge(*arguments):
    if INTERPRETED and arguments[0].dtype == torch.bfloat16 and takes(*arguments):
        pytest.skip("Triton's interpreter multiplies bfloat16 tiles as if they were integers")
    assert error(SPEC, *arguments) <= SPEC.tolerances[arguments[0].dtype].relative


def draw(normal, rows, depth, columns, dtype, bias=True):
    """Scaled as in a network, so that gates are neither all open nor all shut."""
    weight = (normal(2 * columns, depth) * depth**-0.5).to(dtype)
    return (
        normal(rows, depth, dtype=dtype),
        weight,
        normal(2 * columns, dtype=dtype) if bias else None,
    )


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(150, 128, 72), (128, 64, 64), (3, 192, 200), (5, 24, 7)],  # the last is the library's
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_is_exact(normal, dtype, rows, depth, columns, bias):
    judge(*draw(normal, rows, depth, columns, dtype, bias))


@pytest.mark.skipif(not INTERPRETED, reason="launches kernels")
@pytest.mark.parametrize("call", [tiles, stream])
@pytest.mark.parametrize(("rows", "columns"), [(150, 136), (128, 128), (1, 8)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_both_kernels_write_all_and_no_more(normal, call, rows, columns, bias):
    arguments = draw(normal, rows, 128, columns, torch.float16, bias)
    assert takes(*arguments)
    assert streams(*arguments)
    with poisoned_memory():
        out = call(*arguments)
    assert out.shape == (rows, columns)
    assert largest_error(out, exact(SPEC, *arguments)) <= SPEC.tolerances[torch.float16].relative


@pytest.mark.skipif(not INTERPRETED, reason="launches kernels")
@pytest.mark.parametrize("config", _linear_geglu_tiles.configs, ids=str)
def test_every_tile_is_exact(normal, monkeypatch, config):
    """The larger ones are for more tiles than a test has."""
    arguments = draw(normal, 260, 64, 136, torch.float16)
    monkeypatch.setattr(Kernel, "candidates", lambda self, given: [config])
    with poisoned_memory():
        out = tiles(*arguments)
    assert largest_error(out, exact(SPEC, *arguments)) <= SPEC.tolerances[torch.float16].relative


def test_hidden_channels_are_not_rounded(normal):
    """By the kernel, which the interpreter runs; the reference rounds them."""
    own = error(SPEC, *draw(normal, 100, 128, 64, torch.float16))
    assert own < 2.5e-4 if INTERPRETED else own > 2.5e-4


@pytest.mark.skipif(not INTERPRETED, reason="launches kernels")
def test_gates_are_the_exact_gelu(normal):
    """Of every gate from far below to far above, through weights that pass it on."""
    gates = torch.cat([torch.linspace(-14, 14, 28 * 64), torch.linspace(-1e3, 1e3, 64)])
    x = gates.half().view(-1, 64)
    weight = torch.cat([torch.zeros(64, 64), torch.eye(64)]).half()
    bias = torch.cat([torch.ones(64), torch.zeros(64)]).half()
    out = tiles(x, weight, bias).double()
    expected = F.gelu(x.double())
    rounding = expected.abs() * 2**-11 + 2**-25  # of float16, its smallest numbers included
    assert ((out - expected).abs() <= rounding + 6e-6).all()
    assert torch.equal(out[x > 6], x.double()[x > 6])
    assert (out[x < -6].abs() <= 2**-24).all()


def test_reads_rows_of_any_stride(normal):
    _, weight, bias = draw(normal, 12, 64, 64, torch.float16)
    wider = normal(4, 6, 3 * 64, dtype=torch.float16)
    judge(wider[..., 64:128], weight, bias)  # a slice of wider rows
    judge(wider[:, ::2, :64], weight, bias)
    judge(normal(4, 64, 6, dtype=torch.float16).transpose(1, 2), weight, bias)  # channels apart


def test_it_is_asked_for_what_it_takes(normal):
    x, weight, bias = draw(normal, 4, 64, 64, torch.float16)
    assert takes(x, weight, bias)
    assert takes(x, weight, None)
    assert not takes(x.float(), weight.float(), bias.float())
    assert not takes(x[:0], weight, bias)
    assert not takes(x[:, :32], weight[:, :32].contiguous(), bias)
    assert not takes(x, weight[:24], bias[:24])
    assert not takes(x, weight[::2], bias[::2])  # rows apart
    assert not takes(normal(4, 65, dtype=torch.float16)[:, :64], weight, bias)
    shifted = normal(5 * 64, dtype=torch.float16)[4 : 4 + 4 * 64].view(4, 64)
    assert streams(x, weight, bias)
    assert not streams(shifted, weight, bias)


def test_is_the_activation_of_diffusers(normal):
    module = GEGLU(64, 48).requires_grad_(False)
    x = normal(3, 5, 64)
    torch.testing.assert_close(linear_geglu(x, module.proj.weight, module.proj.bias), module(x))


@pytest.mark.parametrize("depth", [8, 64])
def test_passes_opcheck(normal, depth):
    x, weight, bias = normal(3, 4, depth), normal(32, depth), normal(32)
    torch.library.opcheck(linear_geglu, (x, weight, bias))
    torch.library.opcheck(linear_geglu, (x.transpose(0, 1), weight))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 5), (4, 6), None), "must be"),
        (((3, 5), (5, 5), None), "must be"),
        (((3, 5), (4, 5), (2,)), "must be"),
    ],
)
def test_refuses_what_does_not_fit(shapes, message):
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(OptionError, match=message):
        linear_geglu(*tensors)


def test_refuses_mixed_dtypes():
    with pytest.raises(OptionError, match="differ in dtype"):
        linear_geglu(torch.zeros(3, 8), torch.zeros(4, 8).half())


def test_agrees_with_the_plain_operations(normal):
    x, weight, bias = normal(2, 3, 8), normal(12, 8), normal(12)
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    torch.testing.assert_close(linear_geglu(x, weight, bias), value * F.gelu(gate))
