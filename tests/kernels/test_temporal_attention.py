from __future__ import annotations

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.kernels import registered, temporal_attention, temporal_attention_reference
from lsync_compile.kernels.accuracy import error
from lsync_compile.kernels.launch import INTERPRETED
from lsync_compile.models.motion import TemporalAttention

SPEC = registered()["temporal_attention"]


def judge(dtype, *args):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 tiles as if they were integers")
    assert error(SPEC, *args) <= SPEC.tolerances[dtype].relative


@pytest.mark.parametrize(
    ("batch", "frames", "tokens", "heads", "dim"),
    [
        (2, 16, 3, 2, 40),  # LatentSync's frames and first head size
        (1, 5, 2, 3, 80),  # fewer frames than a tile has
        (1, 1, 2, 1, 160),
        (1, 24, 1, 2, 16),  # most frames of a motion module
        (1, 3, 5, 1, 7),  # sizes that nothing divides
    ],
)
def test_is_exact(normal, dtype, batch, frames, tokens, heads, dim):
    q, k, v = normal(3, batch * frames, tokens, heads * dim, dtype=dtype)
    judge(dtype, q, k, v, frames, heads, None)


def test_reads_slices_of_a_fused_projection(normal, dtype):
    q, k, v = normal(8, 3, 3 * 64, dtype=dtype).chunk(3, dim=2)
    judge(dtype, q, k, v, 4, 2, 0.3)


def test_reads_any_strides(normal):
    q, k = (normal(4, 32, 6).transpose(1, 2) for _ in range(2))  # channels apart
    v = normal(6, 4, 32).transpose(0, 1)  # tokens before frames
    judge(torch.float32, q, k, v, 2, 2, None)


def test_large_scores_do_not_overflow(normal):
    q, k, v = normal(3, 6, 2, 32)
    judge(torch.float32, 100 * q, 100 * k, v, 3, 2, None)


def test_is_the_attention_of_the_motion_module(normal):
    batch, frames, tokens, dim = 2, 4, 3, 32
    module = TemporalAttention(dim, heads=2, inner_dim=dim, max_len=None).requires_grad_(False)
    x = normal(batch * frames, tokens, dim)
    expected = module(x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1))
    expected = expected.unflatten(0, (batch, tokens)).transpose(1, 2).flatten(0, 1)
    out = temporal_attention(module.to_q(x), module.to_k(x), module.to_v(x), frames, 2)
    torch.testing.assert_close(module.to_out[0](out), expected)


def test_frames_of_other_chunks_do_not_matter(normal):
    q, k, v = normal(3, 8, 2, 32)
    both = temporal_attention(q, k, v, 4, 2)
    alone = temporal_attention(q[4:], k[4:], v[4:], 4, 2)
    torch.testing.assert_close(both[4:], alone)


@pytest.mark.parametrize("fused", [False, True])
def test_passes_opcheck(normal, fused):
    q, k, v = normal(4, 3, 96).chunk(3, dim=2) if fused else normal(3, 4, 3, 32)
    torch.library.opcheck(temporal_attention, (q, k, v, 2, 2))


def test_reference_takes_one_frame_to_its_value(normal):
    q, k, v = normal(3, 2, 3, 8)
    torch.testing.assert_close(temporal_attention_reference(q, k, v, 1, 2), v)


@pytest.mark.parametrize(
    ("shapes", "frames", "heads", "message"),
    [
        ([(4, 3, 8), (4, 3, 8), (4, 2, 8)], 2, 2, "must all be"),
        ([(4, 3, 8)] * 3, 3, 2, "divide the 4 rows"),
        ([(66, 1, 8)] * 3, 33, 2, "1 to 32"),
        ([(4, 3, 8)] * 3, 2, 3, "heads=3 must divide 8"),
    ],
)
def test_refuses_what_does_not_fit(shapes, frames, heads, message):
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(OptionError, match=message):
        temporal_attention(q, k, v, frames, heads)


def test_refuses_mixed_dtypes():
    q = torch.zeros(2, 1, 8)
    with pytest.raises(OptionError, match="differ in dtype"):
        temporal_attention(q, q.half(), q, 2, 1)
