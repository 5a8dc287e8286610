from __future__ import annotations

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.kernels import layer_norm, registered
from lsync_compile.kernels.accuracy import error
from lsync_compile.kernels.launch import INTERPRETED
from lsync_compile.models.motion import PositionalEncoding

SPEC = registered()["layer_norm"]


@pytest.mark.parametrize("shape", [(6, 3, 320), (5, 40), (1, 2, 1), (2, 3, 5, 513)])
def test_is_exact(normal, dtype, shape):
    x = normal(*shape, dtype=dtype)
    weight, bias = normal(2, shape[-1], dtype=dtype)
    assert error(SPEC, x, weight, bias, 1e-3, None) <= SPEC.tolerances[dtype].relative


def test_adds_the_encoding_of_each_frame(normal, dtype):
    x, position = normal(6, 5, 48, dtype=dtype), normal(3, 48, dtype=dtype)
    weight, bias = normal(2, 48, dtype=dtype)
    assert error(SPEC, x, weight, bias, 1e-5, position) <= SPEC.tolerances[dtype].relative


def test_a_shift_is_added_before_the_norm(normal, dtype):
    x, position = normal(6, 5, 48, dtype=dtype), normal(3, 48, dtype=dtype)
    weight, bias = normal(2, 48, dtype=dtype)
    bound = SPEC.tolerances[dtype].relative
    if dtype != torch.float32 and not INTERPRETED:
        bound *= 2  # without the kernel it is rounded to the values' dtype, as x + shift is
    for frames in (None, position):
        assert error(SPEC, x, weight, bias, 1e-5, frames, 3 * normal(48)) <= bound


def test_encodes_positions_like_the_motion_module(normal):
    batch, frames, tokens, dim = 2, 3, 4, 32
    encoder = PositionalEncoding(dim, max_len=24)
    x, (weight, bias) = normal(batch * frames, tokens, dim), normal(2, dim)
    expected = torch.nn.functional.layer_norm(x, (dim,), weight, bias)
    expected = expected.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
    expected = encoder(expected).unflatten(0, (batch, tokens)).transpose(1, 2).flatten(0, 1)
    normed = layer_norm(x, weight, bias, 1e-5, encoder.pe[0, :frames])
    torch.testing.assert_close(normed, expected)


def test_reads_any_strides(normal):
    bound = SPEC.tolerances[torch.float32].relative
    weight, bias = normal(2, 32)
    for x in (normal(4, 6, 48)[..., 8:40], normal(4, 32, 6).transpose(1, 2)):
        assert error(SPEC, x, weight, bias.flip(0), 1e-5, None) <= bound


def test_a_mean_far_from_zero_costs_no_more_than_rounding(normal):
    weight, bias = torch.ones(320), torch.zeros(320)
    assert error(SPEC, normal(8, 320) + 1000, weight, bias, 1e-5, None) <= 1e-4


def test_weights_may_be_wider_than_the_values(normal):
    x, (weight, bias) = normal(4, 64, dtype=torch.float16), normal(2, 64)
    bound = SPEC.tolerances[torch.float16].relative
    assert error(SPEC, x, weight, bias, 1e-5, None) <= bound


def test_passes_opcheck(normal):
    x, (weight, bias) = normal(6, 3, 16), normal(2, 16)
    torch.library.opcheck(layer_norm, (x, weight, bias))
    torch.library.opcheck(layer_norm, (x, weight, bias, 1e-5, normal(3, 16)))
    torch.library.opcheck(layer_norm, (x, weight, bias, 1e-5, None, normal(16)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 8), (7,), (8,)], r"layer_norm: .* must be \(8,\)"),
        ([(4, 8200), (8200,), (8200,)], "more than 8192"),
        ([(6, 2, 8), (8,), (8,), (4, 8)], "4 positions"),
    ],
)
def test_refuses_what_does_not_fit(shapes, message):
    x, weight, bias, *position = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(OptionError, match=message):
        layer_norm(x, weight, bias, 1e-5, *position)
