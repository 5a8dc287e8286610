from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsync_compile.errors import OptionError
from lsync_compile.kernels import registered, spatial_attention
from lsync_compile.kernels.accuracy import error
from lsync_compile.kernels.launch import INTERPRETED

SPEC = registered()["spatial_attention"]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel in Triton's language")


def judge(dtype, *args):
    assert error(SPEC, *args) <= SPEC.tolerances[dtype].relative


@pytest.mark.parametrize(
    ("batch", "tokens", "keys", "heads", "dim"),
    [(2, 33, 33, 2, 40), (3, 16, 50, 8, 16), (1, 7, 1, 1, 160), (2, 1, 5, 3, 7)],
)
def test_is_exact(normal, dtype, batch, tokens, keys, heads, dim):
    q = normal(batch, tokens, heads * dim, dtype=dtype)
    k, v = normal(2, batch, keys, heads * dim, dtype=dtype)
    judge(dtype, q, k, v, heads, None)
    judge(dtype, q, k, v, heads, 0.3)


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
