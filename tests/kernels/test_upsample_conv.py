from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsync_compile.errors import OptionError
from lsync_compile.kernels import registered, upsample_conv
from lsync_compile.kernels.accuracy import error
from lsync_compile.kernels.upsample_conv import phases_of

SPEC = registered()["upsample_conv"]


def draw(normal, dtype, shape=(2, 6, 5, 7), outside=8, bias=True):
    weight = (normal(outside, shape[1], 3, 3) / 7).to(dtype)
    phases = phases_of(weight.float()).to(dtype)
    return (
        normal(*shape, dtype=dtype),
        weight,
        normal(outside, dtype=dtype) if bias else None,
        phases,
    )


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 3, 1, 1), (3, 16, 8, 8)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_is_exact(normal, dtype, shape, bias):
    arguments = draw(normal, dtype, shape, bias=bias)
    assert error(SPEC, *arguments) <= SPEC.tolerances[dtype].relative


def test_whole_numbers_are_exact(normal):
    """Every window, borders included: with small integers nothing rounds."""
    x, weight = normal(2, 3, 4, 5).mul(3).round(), normal(4, 3, 3, 3).mul(3).round()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    assert torch.equal(upsample_conv(x, weight, None, phases_of(weight)), expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_keeps_the_layout(normal, memory_format):
    x, *rest = draw(normal, torch.float32)
    out = upsample_conv(x.contiguous(memory_format=memory_format), *rest)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, SPEC.reference(x, *rest))


def test_reads_any_strides(normal):
    x, *rest = draw(normal, torch.float32)
    for view in (x.transpose(2, 3), normal(2, 12, 5, 7)[:, ::2], normal(2, 6, 10, 7)[:, :, ::2]):
        assert error(SPEC, view, *rest) <= SPEC.tolerances[torch.float32].relative


def test_it_makes_fewer_products():
    """4/9 of them, and a row and a column more for the borders."""
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = torch.zeros(1, 8, 32, 32), torch.zeros(8, 8, 3, 3)
    counts = []
    for call in (SPEC.reference, SPEC.kernel):
        with FlopCounterMode(display=False) as counter:
            call(x, weight, None, phases_of(weight))
        counts.append(counter.get_total_flops())
    assert counts[1] / counts[0] == pytest.approx(4 / 9 * (33 / 32) ** 2)


def test_passes_opcheck(normal):
    x, *rest = draw(normal, torch.float32)
    torch.library.opcheck(upsample_conv, (x, *rest))
    torch.library.opcheck(upsample_conv, (x.contiguous(memory_format=torch.channels_last), *rest))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 6, 5), (8, 6, 3, 3), (8,), (4, 8, 2, 2, 6)), "must be"),
        (((2, 6, 5, 5), (8, 5, 3, 3), (8,), (4, 8, 2, 2, 6)), "must be"),
        (((2, 6, 5, 5), (8, 6, 3, 3), (8,), (4, 6, 2, 2, 8)), "of another weight"),
        (((2, 6, 5, 5), (8, 6, 3, 3), (6,), (4, 8, 2, 2, 6)), "bias"),
    ],
)
def test_refuses_what_does_not_fit(shapes, message):
    with pytest.raises(OptionError, match=message):
        upsample_conv(*map(torch.zeros, shapes))


def test_refuses_mixed_dtypes(normal):
    x, *rest = draw(normal, torch.float32)
    with pytest.raises(OptionError, match="differ in dtype"):
        upsample_conv(x.half(), *rest)
