"""The kernel that the copy engine feeds, in the interpreter and compiled for Hopper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsync_compile.kernels.accuracy import poisoned_memory
from lsync_compile.kernels.attention_stream import WAYS, attend, takes
from lsync_compile.kernels.launch import INTERPRETED, record_launches, triton


def heads_of(rows, heads):
    return [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in rows.chunk(3, dim=2)]


@pytest.mark.skipif(not INTERPRETED, reason="launches a kernel")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [40, 64])
def test_attends_to_slices_of_a_fused_projection(normal, way, dim):
    q, k, v = heads_of(normal(2, 256, 3 * 2 * dim, dtype=torch.float16), 2)
    q = q[:, :, :130]  # a tile and a bit
    assert takes(q, k, v)
    with poisoned_memory():
        out = attend(way, q, k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (out.double() - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.skipif(triton is None or INTERPRETED, reason="compiles with Triton")
@pytest.mark.parametrize("way", list(WAYS)[1:3])
def test_compiles_for_sm90_without_spills(way):
    from lsync_compile.kernels.resources import compile_sm90

    rows = torch.empty(32, 4096, 3 * 320, dtype=torch.float16, device="meta")
    with record_launches() as recorded:
        attend(way, *heads_of(rows, 8))
    (launch,) = recorded
    resources = compile_sm90(launch, launch.configs[0])
    assert resources.spills == 0
    assert "UTMALDG" in resources.sass
    assert "HGMMA" in resources.sass


def test_it_is_asked_for_what_it_takes(normal):
    q, k, v = heads_of(normal(1, 128, 3 * 80, dtype=torch.float16), 2)
    assert takes(q, k, v)
    assert not takes(q, k, v, -1.0)
    assert not takes(q.float(), k.float(), v.float())
    assert not takes(q, k[:, :, :100], v[:, :, :100])
    assert not takes(*(x[..., :36] for x in (q, k, v)))
    assert not takes(*heads_of(normal(1, 128, 3 * 160, dtype=torch.float16), 2))
