from __future__ import annotations

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.kernels import add_layer_norm, registered
from lsync_compile.kernels.accuracy import error
from lsync_compile.kernels.launch import INTERPRETED
from lsync_compile.models.motion import PositionalEncoding

SPEC = registered()["add_layer_norm"]


@pytest.mark.parametrize("shape", [(6, 3, 320), (5, 40), (1, 2, 1), (2, 3, 5, 513)])
def test_is_exact(normal, dtype, shape):
    x, residual = normal(2, *shape, dtype=dtype)
    weight, bias = normal(2, shape[-1], dtype=dtype)
    assert error(SPEC, x, residual, weight, bias, 1e-3, None) <= SPEC.tolerances[dtype].relative


def test_adds_the_encoding_of_each_frame(normal, dtype):
    x, residual = normal(2, 6, 5, 48, dtype=dtype)
    weight, bias = normal(2, 48, dtype=dtype)
    position = normal(3, 48, dtype=dtype)
    assert error(SPEC, x, residual, weight, bias, 1e-5, position) <= SPEC.tolerances[dtype].relative


def test_a_shift_is_added_before_the_sum_is_rounded(normal, dtype):
    x, residual = normal(2, 6, 5, 48, dtype=dtype)
    weight, bias = normal(2, 48, dtype=dtype)
    bound = SPEC.tolerances[dtype].relative
    if dtype != torch.float32 and not INTERPRETED:
        bound *= 2  # without the kernel it is rounded to the values' dtype, as x + shift is
    for position in (None, normal(3, 48, dtype=dtype)):
        shift = 3 * normal(48)
        assert error(SPEC, x, residual, weight, bias, 1e-5, position, shift) <= bound


def test_encodes_positions_like_the_motion_module(normal):
    batch, frames, tokens, dim = 2, 3, 4, 32
    encoder = PositionalEncoding(dim, max_len=24)
    x, residual = normal(2, batch * frames, tokens, dim)
    weight, bias = normal(2, dim)
    expected = torch.nn.functional.layer_norm(x + residual, (dim,), weight, bias)
    expected = expected.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
    expected = encoder(expected).unflatten(0, (batch, tokens)).transpose(1, 2).flatten(0, 1)
    _, normed = add_layer_norm(x, residual, weight, bias, 1e-5, encoder.pe[0, :frames])
    torch.testing.assert_close(normed, expected)


def test_the_sum_is_rounded_as_torch_rounds_it(normal):
    x, residual = normal(2, 4, 64, dtype=torch.float16)
    weight, bias = normal(2, 64, dtype=torch.float16)
    total, _ = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)


def test_reads_any_strides(normal):
    bound = SPEC.tolerances[torch.float32].relative
    weight, bias = normal(2, 32)
    wide, apart = normal(4, 6, 48)[..., 8:40], normal(4, 32, 6).transpose(1, 2)
    assert error(SPEC, wide, apart, weight, bias, 1e-5, None) <= bound
    assert error(SPEC, apart, wide, weight[::1], bias.flip(0), 1e-5, None) <= bound


def test_a_mean_far_from_zero_costs_no_more_than_rounding(normal):
    x, residual = normal(2, 8, 320)
    weight, bias = torch.ones(320), torch.zeros(320)
    # Sum and mean are rounded at 1000, where float32 steps by 6e-5; squares would lose all digits.
    assert error(SPEC, x + 1000, residual, weight, bias, 1e-5, None) <= 1e-4


def test_weights_may_be_wider_than_the_values(normal):
    x, residual = normal(2, 4, 64, dtype=torch.float16)
    weight, bias = normal(2, 64)
    bound = SPEC.tolerances[torch.float16].relative
    assert error(SPEC, x, residual, weight, bias, 1e-5, None) <= bound


def test_passes_opcheck(normal):
    x, residual = normal(2, 6, 3, 16)
    weight, bias = normal(2, 16)
    torch.library.opcheck(add_layer_norm, (x, residual, weight, bias))
    torch.library.opcheck(add_layer_norm, (x, residual, weight, bias, 1e-5, normal(3, 16)))
    torch.library.opcheck(add_layer_norm, (x, residual, weight, bias, 1e-5, None, normal(16)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 8), (5, 8), (8,), (8,)], "residual is"),
        ([(4, 8), (4, 8), (7,), (8,)], r"must be \(8,\)"),
        ([(4, 8200), (4, 8200), (8200,), (8200,)], "more than 8192"),
        ([(6, 2, 8), (6, 2, 8), (8,), (8,), (3, 7)], r"must be \(frames, 8\)"),
        ([(6, 2, 8), (6, 2, 8), (8,), (8,), (4, 8)], "4 positions"),
        ([(6, 8), (6, 8), (8,), (8,), (3, 8)], "3 positions"),
    ],
)
def test_refuses_what_does_not_fit(shapes, message):
    x, residual, weight, bias, *position = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(OptionError, match=message):
        add_layer_norm(x, residual, weight, bias, 1e-5, *position)


def test_refuses_a_shift_of_another_size():
    x, weight = torch.zeros(4, 8), torch.zeros(8)
    with pytest.raises(OptionError, match=r"shift \(7,\) must be \(8,\)"):
        add_layer_norm(x, x, weight, weight, 1e-5, None, torch.zeros(7))
