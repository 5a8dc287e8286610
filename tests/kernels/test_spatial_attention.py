from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsync_compile.errors import OptionError
from lsync_compile.kernels import registered, spatial_attention
from lsync_compile.kernels.accuracy import error
from lsync_compile.kernels.launch import INTERPRETED
from lsync_compile.kernels.spatial_attention_kernels import takes, tiles

SPEC = registered()["spatial_attention"]


def judge(dtype, *args):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 tiles as if they were integers")
    assert error(SPEC, *args) <= SPEC.tolerances[dtype].relative


@pytest.mark.parametrize(
    ("batch", "tokens", "keys", "heads", "dim"),
    [
        (2, 133, 133, 2, 40),  # LatentSync's first head size, no multiple of a tile
        (1, 40, 192, 1, 40),  # whole tiles of keys
        (3, 16, 50, 8, 16),  # few keys
        (1, 20, 50, 2, 80),  # no padding in the second tile
        (1, 7, 1, 1, 160),
        (1, 9, 70, 2, 48),
        (2, 1, 5, 3, 7),  # sizes that nothing divides
    ],
)
def test_is_exact(normal, dtype, batch, tokens, keys, heads, dim):
    q = normal(batch, tokens, heads * dim, dtype=dtype)
    k, v = normal(2, batch, keys, heads * dim, dtype=dtype)
    judge(dtype, q, k, v, heads, None)
    judge(dtype, q, k, v, heads, 0.3)


def test_large_scores_do_not_overflow(normal):
    q, k, v = normal(3, 1, 100, 80, dtype=torch.float16)
    judge(torch.float16, 30 * q, 30 * k, v, 2, None)


def test_a_negative_scale(normal, dtype):
    q, k, v = normal(3, 1, 70, 80, dtype=dtype)
    judge(dtype, q, k, v, 2, -0.2)


@pytest.mark.parametrize(
    ("dim", "expected"),
    [(16, (16, 16)), (40, (32, 16)), (64, (32, 32)), (80, (64, 16)), (160, (128, 32))],
)
def test_heads_are_two_tiles(dim, expected):
    assert tiles(dim) == expected
    assert all(each <= sum(tiles(each)) < 2 * each for each in range(24, 161, 8))


def test_it_is_asked_for_what_it_takes(normal):
    def views(tokens, keys, dim, dtype=torch.float16):
        shapes = ((2, tokens, 2 * dim), (2, keys, 2 * dim), (2, keys, 2 * dim))
        drawn = (normal(*shape, dtype=dtype) for shape in shapes)
        return [x.unflatten(2, (2, dim)).transpose(1, 2) for x in drawn]

    assert takes(*views(99, 99, 40), None)
    assert takes(*views(99, 50, 160), 0.1)
    assert not takes(*views(99, 99, 80), None)  # many keys and wide heads
    assert not takes(*views(99, 50, 168), None)
    assert not takes(*views(99, 50, 36), None)
    assert not takes(*views(99, 50, 40), -0.1)
    assert not takes(*views(99, 50, 40, torch.float32), None)
    assert not takes(*(x.contiguous() for x in views(99, 50, 40)), None)  # heads apart


def test_reads_slices_of_a_fused_projection(normal, dtype):
    q, k, v = normal(3, 9, 3 * 32, dtype=dtype).chunk(3, dim=2)
    judge(dtype, q, k, v, 2, None)


def test_is_torchs_attention_by_head(normal):
    q, k, v = normal(3, 2, 6, 12)
    out = spatial_attention(q, k, v, 3)
    split = (x.view(2, 6, 3, 4).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(2, 6, 12)
    assert torch.equal(out, expected)
    assert out.is_contiguous()


@pytest.mark.parametrize("fused", [False, True])
def test_passes_opcheck(normal, fused):
    q, k, v = normal(4, 3, 96).chunk(3, dim=2) if fused else normal(3, 4, 3, 32)
    torch.library.opcheck(spatial_attention, (q, k, v, 2))


@pytest.mark.parametrize(
    ("shapes", "heads", "message"),
    [
        ([(4, 3, 8), (4, 2, 8), (4, 3, 8)], 2, "must be"),
        ([(4, 3, 8), (2, 3, 8), (2, 3, 8)], 2, "must be"),
        ([(4, 8)] * 3, 2, "must be"),
        ([(4, 3, 8)] * 3, 3, "heads=3 must divide 8"),
    ],
)
def test_refuses_what_does_not_fit(shapes, heads, message):
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(OptionError, match=message):
        spatial_attention(q, k, v, heads)


def test_refuses_mixed_dtypes():
    q = torch.zeros(2, 1, 8)
    with pytest.raises(OptionError, match="differ in dtype"):
        spatial_attention(q, q.half(), q, 2)
