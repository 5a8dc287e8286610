from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsync_compile.kernels import wide_attention
from lsync_compile.kernels.launch import INTERPRETED, record_launches, runs_kernel, triton
from lsync_compile.kernels.wide_attention import attend, takes

HALF = (torch.float16, torch.bfloat16)
needs_kernel = pytest.mark.skipif(
    not runs_kernel(torch.empty(0)), reason="needs the interpreter, see test_interpreter.py"
)


def heads_of(normal, dtype, *, batch=2, heads=1, tokens=20, keys=20, width=264, spread=1.0):
    """Queries, keys and values as views of rows of tokens."""
    return [
        (factor * normal(batch, count, heads, width)).to(dtype).transpose(1, 2)
        for count, factor in ((tokens, spread), (keys, 1.0), (keys, 1.0))
    ]


def relative_error(out, reference):
    return float((out.double() - reference).norm() / reference.norm())


def exact(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)


@needs_kernel
@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 2, "tokens": 5, "keys": 33},  # keys are no power of two
        {"batch": 3, "tokens": 1, "keys": 1},
        {"width": 512, "tokens": 17, "keys": 64},
        {"spread": 20.0},  # one key takes nearly all of the weight
        {"spread": 0.0},  # all keys the same
    ],
)
def test_no_less_exact_than_torch(normal, half, shape):
    q, k, v = heads_of(normal, half, **shape)
    reference = exact(q, k, v)
    out = attend(q, k, v, None)
    assert out.dtype == half
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[half]
    assert relative_error(out, reference) <= bound


@needs_kernel
def test_a_few_pictures_at_a_time_give_the_same(normal, monkeypatch):
    q, k, v = heads_of(normal, torch.float16, batch=5)
    whole = attend(q, k, v, 0.1)
    monkeypatch.setattr(wide_attention, "SCORES_AT_A_TIME", 2 * 20 * 20)
    assert torch.equal(attend(q, k, v, 0.1), whole)
    assert relative_error(whole, exact(q, k, v, 0.1)) <= 1e-3


@needs_kernel
def test_scores_beyond_the_range_of_half_precision(normal):
    """Scores of 10^5 and sums of values of 10^4: nothing on the way is stored in float16."""
    q, k, v = heads_of(normal, torch.float16, spread=100.0)
    out = attend(100 * q.clamp(-100, 100), k, 1e4 * v.clamp(-2, 2), 1.0)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "width", "keys", "expected"),
    [
        (torch.float16, 512, 4096, True),
        (torch.bfloat16, 264, 1, True),
        (torch.float32, 512, 4096, False),
        (torch.float16, 256, 4096, False),
        (torch.float16, 512, 32768, False),
        (torch.float16, 512, 0, False),
    ],
)
def test_what_it_is_for(dtype, width, keys, expected):
    q = torch.empty(1, 1, 8, width, dtype=dtype, device="meta")
    k = torch.empty(1, 1, keys, width, dtype=dtype, device="meta")
    assert takes(q, k) is expected


@pytest.mark.skipif(triton is None or INTERPRETED, reason="compiles with Triton")
def test_compiles_for_sm90_without_spills():
    from lsync_compile.kernels.resources import compile_for

    for keys in (1024, 4096, 16384):
        q = torch.empty(2, 1, keys, 512, dtype=torch.float16, device="meta")
        with record_launches() as launches:
            attend(q, q, q, None)
        launch = launches[0]
        for config in launch.kernel.candidates(launch.arguments):
            assert compile_for(launch, config).spills == 0, (keys, config)
