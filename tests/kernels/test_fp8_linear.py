from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsync_compile.errors import OptionError
from lsync_compile.kernels import fp8_linear, registered
from lsync_compile.kernels.accuracy import exact, largest_error, poisoned_memory
from lsync_compile.kernels.fp8_linear import CODES, quantise_rows, quantised
from lsync_compile.kernels.launch import INTERPRETED

SPEC = registered()["fp8_linear"]
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of the result


def draw(normal, dtype, rows=(3, 7), inside=48, outside=32, bias=True):
    weight = (normal(outside, inside) * inside**-0.5).to(dtype)
    x = normal(*rows, inside, dtype=dtype)
    return x, weight, normal(outside, dtype=dtype) if bias else None, *quantised(weight)


def judge(dtype, *arguments):
    with poisoned_memory():
        out = fp8_linear(*arguments)
    assert out.is_contiguous()
    assert out.dtype == dtype
    # The interpreter loses the carry where a mantissa is rounded up to the next power of two.
    bound = 0.1 if INTERPRETED else ROUNDING[dtype]
    assert largest_error(out, exact(SPEC, *arguments)) <= bound


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("rows", "inside", "outside"),
    [((3, 7), 48, 32), ((130,), 17, 5), ((2, 1, 3), 320, 16), ((1,), 1, 1)],
    ids=str,
)
def test_is_the_product_of_the_codes(normal, dtype, rows, inside, outside, bias):
    judge(dtype, *draw(normal, dtype, rows, inside, outside, bias))


def test_any_strides(normal):
    x, *rest = draw(normal, torch.float32, (12, 14))
    for view in (x.transpose(0, 1), x[::2, 1:], x.flip(-1)):
        judge(torch.float32, view, *rest)


def test_what_eight_bits_cost(normal):
    """Of a layer of normal numbers 3 to 5 % of the output's norm: two roundings to 4 bits."""
    x, weight, _, codes, scales = draw(normal, torch.float32, (64,), 320, 128)
    out, wanted = fp8_linear(x, weight, None, codes, scales), F.linear(x, weight)
    assert 0.02 < largest_error(out, (wanted.double(),)) < (0.1 if INTERPRETED else 0.05)


def test_rows_are_scaled_one_by_one(normal):
    """A row a million times larger costs the others nothing."""
    x, *rest = draw(normal, torch.float32, (64,), 320, 128)
    x[3] *= 1e6
    out, wanted = fp8_linear(x, *rest), F.linear(x, rest[0], rest[1])
    errors = (out - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.max() < (0.15 if INTERPRETED else 0.08)


def test_rows_of_zeros_and_the_largest_values(normal):
    x, weight, bias, *codes = draw(normal, torch.float16, (5,), 48, 32)
    x[1], x[2] = 0, torch.finfo(torch.float16).max / 64
    out = fp8_linear(x, weight, bias, *codes)
    assert torch.equal(out[1], bias)
    assert out.isfinite().all()


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("shape", [(9, 48), (130, 17), (1, 5000), (33, 320)], ids=str)
def test_the_kernel_s_codes(normal, shape):
    x = normal(*shape)
    codes, scales = quantise_rows(x)
    wanted, wanted_scales = quantised(x)
    torch.testing.assert_close(scales, wanted_scales, rtol=1e-6, atol=0)
    assert codes.dtype == CODES
    one, other = codes.view(torch.uint8), wanted.view(torch.uint8)
    assert torch.equal(one[other % 8 != 0], other[other % 8 != 0])


def test_passes_opcheck(normal):
    # The other test compares codes, which torch cannot on a CPU.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fp8_linear, draw(normal, torch.float32), test_utils=tests)
    torch.library.opcheck(fp8_linear, draw(normal, torch.float32, bias=False), test_utils=tests)


def test_refuses_what_does_not_fit(normal):
    x, weight, bias, codes, scales = draw(normal, torch.float32)
    for arguments, message in (
        ((x[..., 1:], weight, bias, codes, scales), "must be 48"),
        ((x, weight, bias, codes[1:], scales), "of another weight"),
        ((x, weight, bias, weight, scales), "of another weight"),
        ((x, weight, bias[1:], codes, scales), "bias"),
        ((x.half(), weight, bias, codes, scales), "differ in dtype"),
    ):
        with pytest.raises(OptionError, match=message):
            fp8_linear(*arguments)
