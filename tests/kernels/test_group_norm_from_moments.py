from __future__ import annotations

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.kernels import group_norm_from_moments, registered, residual_moments
from lsync_compile.kernels.accuracy import error, exact, largest_error, poisoned_memory

SPEC = registered()["group_norm_from_moments"]
DIRECT = registered()["group_norm_silu"]


def together(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def judge(dtype, x, groups, weight, bias, eps=1e-5, silu=True):
    """Against the norm that measures in float64 what it is given."""
    _, moments = residual_moments(x, None, None)
    with poisoned_memory():
        out = group_norm_from_moments(x, moments, groups, weight, bias, eps, silu)
    assert out.stride() == torch.empty_like(x).stride()
    wanted = exact(DIRECT, x, groups, weight, bias, eps, silu, None)
    assert largest_error(out, wanted) <= SPEC.tolerances[dtype].relative


@pytest.mark.parametrize("layout", [together, lambda x: x, lambda x: x.transpose(-1, -2)])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 12, 6, 5), (1, 12, 33, 7), (2, 20, 3, 9, 17), (1, 6, 2, 1, 3)], ids=str
)
def test_is_the_group_norm_of_what_was_measured(normal, dtype, silu, shape, layout):
    x = layout(normal(*shape, dtype=dtype) + 1)
    weight, bias = normal(2, shape[1], dtype=dtype)
    judge(dtype, x, 2, weight, bias, 1e-6, silu)


@pytest.mark.parametrize("frames", [64, 70, 300])
def test_more_runs_than_are_read_at_once(normal, frames):
    """Moments of a group are merged 64 or 256 runs at a time."""
    x = together(normal(1, 6, frames, 2, 3) + 1)
    judge(torch.float32, x, 2, *normal(2, 6))


def test_its_own_reference_takes_the_same_moments(normal, dtype):
    x = together(normal(2, 20, 3, 9, 17, dtype=dtype))
    _, moments = residual_moments(x, None, None)
    arguments = x, moments, 4, *normal(2, 20, dtype=dtype), 1e-5, True
    assert error(SPEC, *arguments) <= SPEC.tolerances[dtype].relative


@pytest.mark.parametrize("shape", [(1, 12, 6, 6), (1, 12, 33, 67)], ids=str)
def test_a_mean_far_from_zero_costs_no_more_than_rounding(normal, shape):
    x = normal(*shape) + 1000
    _, moments = residual_moments(x, None, None)
    weight, bias = torch.ones(shape[1]), torch.zeros(shape[1])
    out = group_norm_from_moments(x, moments, 2, weight, bias, 1e-5, False)
    wanted = exact(DIRECT, x, 2, weight, bias, 1e-5, False, None)
    assert largest_error(out, wanted) <= 1e-4


def test_moments_of_joined_channels_are_joined(normal):
    """Groups reach over the seam: 2 of (8 + 4) channels."""
    one, other = normal(2, 8, 3, 9, 17), normal(2, 4, 3, 9, 17) * 3
    moments = [residual_moments(part, None, None)[1] for part in (one, other)]
    x, weight, bias = torch.cat([one, other], 1), *normal(2, 12)
    out = group_norm_from_moments(x, torch.cat(moments, 3), 2, weight, bias)
    wanted = exact(DIRECT, x, 2, weight, bias, 1e-5, True, None)
    assert largest_error(out, wanted) <= SPEC.tolerances[torch.float32].relative


def test_frames_measured_as_pictures_serve_a_video(normal):
    pictures = normal(6, 8, 9, 17)
    _, moments = residual_moments(pictures, None, None)
    video = pictures.view(2, 3, 8, 9, 17).transpose(1, 2)
    weight, bias = normal(2, 8)
    out = group_norm_from_moments(video, moments, 2, weight, bias)
    wanted = exact(DIRECT, video, 2, weight, bias, 1e-5, True, None)
    assert largest_error(out, wanted) <= SPEC.tolerances[torch.float32].relative


def test_passes_opcheck(normal):
    for shape in ((2, 8, 3, 4), (2, 8, 2, 3, 4)):
        x = together(normal(*shape))
        _, moments = residual_moments(x, None, None)
        torch.library.opcheck(group_norm_from_moments, (x, moments, 4, *normal(2, 8)))


@pytest.mark.parametrize(
    ("shapes", "groups", "message"),
    [
        ([(2, 8, 4), (2, 2, 1, 8), (8,), (8,)], 2, r"must be \(N, C, H, W\)"),
        ([(2, 8, 4, 4), (2, 2, 1, 8), (8,), (8,)], 3, "groups=3 must divide 8"),
        ([(2, 8, 4, 4), (2, 2, 2, 8), (8,), (8,)], 2, "moments"),
        ([(2, 8, 4, 4), (2, 2, 1, 8), (8,), (4,)], 2, r"must be \(8,\)"),
    ],
)
def test_refuses_what_does_not_fit(shapes, groups, message):
    x, moments, weight, bias = map(torch.zeros, shapes)
    with pytest.raises(OptionError, match=message):
        group_norm_from_moments(x, moments, groups, weight, bias)
