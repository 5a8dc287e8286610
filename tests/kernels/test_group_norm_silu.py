from __future__ import annotations

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.kernels import group_norm_silu, registered
from lsync_compile.kernels.accuracy import error, exact, largest_error, poisoned_memory
from lsync_compile.models.resnet import ResnetBlock3D

SPEC = registered()["group_norm_silu"]

# name: a function from normal numbers (N, C, [F,] H, W) to the same in another memory layout
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "slice of channels-last": lambda x: (
        torch.cat([x, x], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : x.shape[1]]
    ),
    "frames apart": lambda x: x.movedim(1, -3).contiguous().movedim(-3, 1),
    "width before height": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other pixel": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)[
        ..., ::2, ::2
    ],
}


def judge(dtype, x, groups, weight, bias, eps=1e-5, silu=True, shift=None):
    args = (x, groups, weight, bias, eps, silu, shift)
    with poisoned_memory():
        out = group_norm_silu(*args)
    assert out.stride() == torch.empty_like(x).stride()
    assert largest_error(out, exact(SPEC, *args)) <= SPEC.tolerances[dtype].relative


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 12, 6, 5),  # one program holds a group
        (1, 12, 3, 6, 5),
        (1, 12, 33, 67),  # groups split into runs, the last one shorter
        (2, 12, 2, 9, 67),
    ],
    ids=str,
)
def test_is_exact_in_any_layout(normal, layout, shape):
    x = LAYOUTS[layout](normal(*shape) * 2 + 1)
    weight, bias = normal(2, shape[1])
    judge(torch.float32, x, 2, weight, bias)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(2, 20, 4, 8, 8), (2, 20, 5, 7), (1, 20, 48, 40)], ids=str)
def test_is_exact_in_every_dtype(normal, dtype, silu, shape):
    x = LAYOUTS["channels-last"](normal(*shape, dtype=dtype))
    weight, bias = normal(2, 20, dtype=dtype)
    judge(dtype, x, 2, weight, bias, 1e-6, silu, normal(shape[0], 20, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 12, 6, 6), (1, 12, 33, 67)], ids=str)
def test_a_mean_far_from_zero_costs_no_more_than_rounding(normal, shape):
    x = normal(*shape) + 1000
    weight, bias = torch.ones(shape[1]), torch.zeros(shape[1])
    # Without a shift, squares of 1000 would leave no digit of a variance of 1: float32 has 6e-8.
    assert error(SPEC, x, 2, weight, bias, 1e-5, False, None) <= 1e-4


def test_a_run_that_starts_with_an_outlier(normal):
    x = normal(1, 12, 33, 67) / 100 + 100
    x[..., 0, :] = 0
    judge(torch.float32, x, 2, torch.ones(12), torch.zeros(12), silu=False)


def test_a_constant_group_gives_the_bias():
    x = torch.full((1, 4, 70, 70), 3.25)
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out = group_norm_silu(x, 2, torch.ones(4), bias, 1e-5, silu=False)
    torch.testing.assert_close(out, bias.view(1, 4, 1, 1).expand_as(x), rtol=0, atol=2e-4)


def test_the_shift_is_not_rounded(normal):
    x, shift = normal(1, 4, 6, 6, dtype=torch.float16), torch.full((1, 4), 1024.0).half()
    weight, bias = torch.ones(4).half(), torch.zeros(4).half()
    judge(torch.float16, x, 2, weight, bias, 1e-5, False, shift)


def test_is_the_entrance_of_a_residual_block(normal):
    block = ResnetBlock3D(8, 8, temb_channels=4, groups=4, eps=1e-5).requires_grad_(False)
    x, temb = normal(2, 8, 3, 6, 5), normal(2, 8)
    norm = block.norm2
    out = group_norm_silu(x, 4, norm.weight, norm.bias, norm.eps, True, temb)
    torch.testing.assert_close(out, block.nonlinearity(norm(x + temb[:, :, None, None, None])))


@pytest.mark.parametrize("layout", ["channels-last", "every other pixel"])
def test_passes_opcheck(normal, layout):
    weight, bias = normal(2, 8)
    for shape in ((2, 8, 3, 4), (2, 8, 2, 3, 4)):
        x = LAYOUTS[layout](normal(*shape))
        torch.library.opcheck(group_norm_silu, (x, 4, weight, bias))
        torch.library.opcheck(group_norm_silu, (x, 4, weight, bias, 1e-6, False, normal(2, 8)))


@pytest.mark.parametrize(
    ("shapes", "groups", "message"),
    [
        ([(2, 8, 4), (8,), (8,)], 2, r"must be \(N, C, H, W\)"),
        ([(2, 8, 4, 4), (8,), (8,)], 3, "groups=3 must divide 8"),
        ([(2, 8, 4, 4), (8,), (4,)], 2, r"must be \(8,\)"),
    ],
)
def test_refuses_what_does_not_fit(shapes, groups, message):
    x, weight, bias = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(OptionError, match=message):
        group_norm_silu(x, groups, weight, bias)


def test_refuses_a_shift_of_another_shape():
    with pytest.raises(OptionError, match=r"shift \(8,\) must be \(2, 8\)"):
        group_norm_silu(torch.zeros(2, 8, 4, 4), 2, *torch.zeros(2, 8), shift=torch.zeros(8))
