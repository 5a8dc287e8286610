"""The end of a transformer as one op: its reference, and its kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsync_compile.errors import OptionError
from lsync_compile.kernels import feed_forward, registered
from lsync_compile.kernels.accuracy import error, largest_error, poisoned_memory
from lsync_compile.kernels.feed_forward import (
    feed_forward_kernel,
    feed_forward_reference,
    joined_bias,
    joined_weight,
)
from lsync_compile.kernels.launch import INTERPRETED
from lsync_compile.kernels.linear_geglu import KERNELS, linear_geglu_kernel
from lsync_compile.kernels.linear_geglu_kernels import takes

SPEC = registered()["feed_forward"]


def draw(normal, shape, inner, outside, dtype=torch.float32, bias=True):
    """Arguments of the op, weights scaled as in a network."""
    channels = shape[-1]
    weight_in = (normal(2 * inner, channels) * channels**-0.5).to(dtype)
    weight_out = (normal(outside, inner + channels) * (inner + channels) ** -0.5).to(dtype)
    return (
        normal(*shape, dtype=dtype),
        normal(*shape, dtype=dtype),
        normal(channels, dtype=dtype),
        normal(channels, dtype=dtype),
        1e-5,
        weight_in,
        normal(2 * inner, dtype=dtype) if bias else None,
        weight_out,
        normal(outside, dtype=dtype) if bias else None,
    )


def judge(*arguments):
    rows = arguments[0].reshape(-1, arguments[0].shape[-1])
    if INTERPRETED and rows.dtype == torch.bfloat16 and takes(rows, *arguments[5:7]):
        pytest.skip("Triton's interpreter multiplies bfloat16 tiles as if they were integers")
    assert error(SPEC, *arguments) <= SPEC.tolerances[arguments[0].dtype].relative


@pytest.mark.parametrize(
    ("shape", "inner", "outside"),
    [((2, 75, 64), 72, 48), ((3, 64), 256, 64), ((5, 24), 56, 7), ((1, 1, 128), 8, 128)],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_is_exact(normal, dtype, shape, inner, outside, bias):
    judge(*draw(normal, shape, inner, outside, dtype, bias))


@pytest.mark.parametrize("given", [1, 3])
def test_rows_that_are_all_the_same(normal, dtype, given):
    x, *rest = draw(normal, (4, 5, 64), 64, 64, dtype)
    null = normal(64, dtype=dtype)
    judge(x[:given], *rest, null)
    whole = torch.cat([null.expand(4 - given, 5, 64), x[:given]])
    torch.testing.assert_close(
        feed_forward(x[:given], *rest, null), feed_forward(whole, *rest), rtol=0, atol=0
    )


@pytest.mark.parametrize("given", [1, 4])
def test_a_shift_is_added_to_the_rows_given(normal, dtype, given):
    x, *rest = draw(normal, (4, 5, 64), 64, 64, dtype)
    null = normal(64, dtype=dtype) if given < 4 else None
    shift = normal(64, dtype=dtype)
    judge(x[:given], *rest, null, shift)
    wide = [each.double() if isinstance(each, torch.Tensor) else each for each in (x, *rest)]
    shifted = wide[0][:given] + shift.double()
    expected = feed_forward_reference(shifted, *wide[1:], None if null is None else null.double())
    out = feed_forward(x[:given], *rest, null, shift).double()
    assert (out - expected).norm() <= SPEC.tolerances[dtype].relative * expected.norm()


def test_reads_rows_of_any_stride(normal):
    x, residual, *rest = draw(normal, (4, 6, 64), 64, 64, torch.float16)
    wider = normal(4, 6, 3 * 64, dtype=torch.float16)
    judge(wider[..., 64:128], residual, *rest)
    judge(x, wider[:, :, :64], *rest)
    judge(normal(4, 64, 6, dtype=torch.float16).transpose(1, 2), residual, *rest)


@pytest.mark.skipif(not INTERPRETED, reason="launches kernels")
@pytest.mark.parametrize("name", KERNELS)
def test_every_way_to_gate_writes_its_columns_and_no_more(normal, name):
    x = normal(150, 64, dtype=torch.float16)
    weight, bias = normal(2 * 72, 64).half() / 8, normal(144, dtype=torch.float16)
    wide = torch.full((150, 72 + 64), 7.0, dtype=torch.float16)
    KERNELS[name](x, weight, bias, wide[:, :72])
    assert (wide[:, 72:] == 7).all()
    torch.testing.assert_close(
        wide[:, :72], linear_geglu_kernel(x, weight, bias), rtol=2e-3, atol=2e-3
    )


@pytest.mark.skipif(not INTERPRETED, reason="launches kernels")
def test_all_of_the_result_is_written(normal):
    arguments = draw(normal, (150, 64), 72, 48, torch.float16)
    with poisoned_memory():
        out = feed_forward_kernel(*arguments)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    assert largest_error(out, (feed_forward_reference(*wide),)) < 1.5e-3


def test_joined_weights_are_the_two_products(normal):
    """What the pass makes of the three layers that it takes."""
    x, residual, *norm, eps, weight_in, bias_in, _, _ = draw(normal, (7, 16), 40, 1)
    weight, bias, last, shift = normal(16, 40), normal(16), normal(6, 16), normal(6)
    total = x + residual
    value, gate = F.linear(F.layer_norm(total, (16,), *norm, eps), weight_in, bias_in).chunk(2, -1)
    expected = F.linear(F.linear(value * F.gelu(gate), weight, bias) + total, last, shift)
    joined = joined_weight(weight, last), joined_bias(bias, last) + shift
    out = feed_forward(x, residual, *norm, eps, weight_in, bias_in, *joined)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_passes_opcheck(normal, bias):
    arguments = draw(normal, (3, 4, 16), 24, 8, bias=bias)
    torch.library.opcheck(feed_forward, arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, torch.zeros(3, 5), "differ"),
        (2, torch.zeros(5), "must be"),
        (5, torch.zeros(7, 4), "weight_in"),
        (5, torch.zeros(6, 5), "weight_in"),
        (6, torch.zeros(3), "bias_in"),
        (7, torch.zeros(2, 8), "weight_out"),
        (8, torch.zeros(3), "bias_out"),
        (7, torch.zeros(2, 7).half(), "differ in dtype"),
        (0, torch.zeros(2, 4), "differ"),
        (9, torch.zeros(3), "null"),
        (10, torch.zeros(3), "shift"),
    ],
)
def test_refuses_what_does_not_fit(place, value, message):
    arguments = [
        torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4), torch.zeros(4), 1e-5,
        torch.zeros(6, 4), torch.zeros(6), torch.zeros(2, 7), torch.zeros(2), None, None,
    ]  # fmt: skip
    feed_forward(*arguments)
    arguments[place] = value
    with pytest.raises(OptionError, match=message):
        feed_forward(*arguments)
