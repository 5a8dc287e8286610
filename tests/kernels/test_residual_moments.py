from __future__ import annotations

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.kernels import registered, residual_moments
from lsync_compile.kernels.accuracy import exact, largest_error, poisoned_memory
from lsync_compile.kernels.residual_moments import run_length

SPEC = registered()["residual_moments"]

# name: a function from normal numbers (N, C, [F,] H, W) to the same in another memory layout
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "frames apart": lambda x: x.movedim(1, -3).contiguous().movedim(-3, 1),
    "width before height": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other pixel": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)[
        ..., ::2, ::2
    ],
}


def judge(dtype, x, residual, bias):
    with poisoned_memory():
        total, moments = residual_moments(x, residual, bias)
    assert total.stride() == torch.empty_like(x).stride()
    assert moments.dtype == torch.float32
    wanted, (means, squares) = exact(SPEC, x, residual, bias)
    bound = SPEC.tolerances[dtype].relative
    found = (total, moments[0], moments[1])
    assert largest_error(found, (wanted, means, squares)) <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 12, 6, 5),
        (1, 12, 3, 6, 5),
        (1, 20, 13, 17),  # runs, the last one shorter
        (1, 70, 2, 5, 3),  # more channels than a block has
        (1, 3, 1, 7),
        (3, 4, 5, 1),
    ],
    ids=str,
)
def test_is_exact_in_any_layout(normal, layout, shape):
    x, residual = LAYOUTS[layout](normal(*shape) + 1), normal(*shape)
    judge(torch.float32, x, residual, normal(shape[1]))
    judge(torch.float32, x, LAYOUTS["channels-last"](residual), None)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_is_exact_in_every_dtype(normal, dtype, residual, bias):
    x = LAYOUTS["channels-last"](normal(2, 20, 9, 13, dtype=dtype))
    other = LAYOUTS["channels-last"](normal(2, 20, 9, 13, dtype=dtype))
    judge(dtype, x, other if residual else None, normal(20) if bias else None)


def test_a_mean_far_from_zero_costs_no_more_than_rounding(normal):
    """Sums of squares of 1000 would leave no digit of a variance of 1: float32 has 6e-8."""
    x = normal(1, 12, 33, 67) + 1000
    _, moments = residual_moments(x, None, None)
    _, wanted = exact(SPEC, x, None, None)
    assert largest_error(moments[1], (wanted[1],)) <= 1e-4


def test_moments_are_of_the_sum_before_it_is_rounded(normal):
    x = normal(1, 4, 8, 8, dtype=torch.float16)
    _, moments = residual_moments(x, x * 100, None)
    _, wanted = exact(SPEC, x, x * 100, None)
    assert largest_error((moments[0], moments[1]), (wanted[0], wanted[1])) <= 1e-6


def test_the_run_does_not_depend_on_the_channels():
    """So that moments of tensors joined along their channels are joined likewise."""
    for shape in ((64, 64), (9, 7), (1, 1)):
        runs = {run_length(torch.empty(2, c, 16, *shape, device="meta")) for c in (1, 320, 960)}
        assert len(runs) == 1
        assert runs == {run_length(torch.empty(32, 8, *shape, device="meta"))}


@pytest.mark.parametrize("layout", ["channels-last", "every other pixel"])
def test_passes_opcheck(normal, layout):
    for shape in ((2, 8, 3, 4), (2, 8, 2, 3, 4)):
        x = LAYOUTS[layout](normal(*shape))
        torch.library.opcheck(residual_moments, (x, normal(*shape), normal(8)))
        torch.library.opcheck(residual_moments, (x, None, None))


@pytest.mark.parametrize(
    ("x", "residual", "bias", "message"),
    [
        ((2, 8, 4), None, None, r"must be \(N, C, H, W\)"),
        ((2, 8, 4, 4), (2, 8, 4, 1), None, "residual"),
        ((2, 8, 4, 4), None, (4,), r"must be \(8,\)"),
    ],
)
def test_refuses_what_does_not_fit(x, residual, bias, message):
    made = [None if shape is None else torch.zeros(shape) for shape in (x, residual, bias)]
    with pytest.raises(OptionError, match=message):
        residual_moments(*made)


def test_refuses_mixed_dtypes():
    with pytest.raises(OptionError, match="residual"):
        residual_moments(torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 4, 4).half(), None)
