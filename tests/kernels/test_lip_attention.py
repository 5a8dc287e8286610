"""Lip attention: its own definition, and plain attention where it approximates nothing."""

from __future__ import annotations

import math

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.kernels import lip_attention, registered, spatial_attention
from lsync_compile.kernels.accuracy import error
from lsync_compile.kernels.launch import INTERPRETED
from lsync_compile.kernels.lip_tables import decode_region, encode_region, grouping, region_at

SPEC = registered()["lip_attention"]

MOUTH = torch.zeros(8, 8, dtype=torch.bool)
MOUTH[4:7, 1:6] = True
REGION = encode_region(MOUTH)


def by_definition(q, k, v, heads, region, halo, query_pool, key_pool, lip_weight, scale):
    """One token after the other, as the module's formula says, in float64."""
    n, tokens, channels = q.shape
    side, dim = math.isqrt(tokens), channels // heads
    lips, full = region_at(region, side).flatten(), region_at(region, side, halo).flatten()

    def groups(pool):
        found = {}
        for i in range(tokens):
            cell = (i // side // pool, i % side // pool)
            found.setdefault(i if full[i] else cell, []).append(i)
        return list(found.values())

    q, k, v = (x.double().view(n, tokens, heads, dim) for x in (q, k, v))
    keys = groups(key_pool)
    k = torch.stack([k[:, g].mean(1) for g in keys], 1)
    v = torch.stack([v[:, g].mean(1) for g in keys], 1)
    weights = torch.tensor([len(g) * (lip_weight if lips[g[0]] else 1) for g in keys]).double()
    out = torch.zeros(n, tokens, heads, dim, dtype=torch.float64)
    for group in groups(query_pool):
        query = q[:, group].mean(1)
        scores = torch.einsum("nhd,nghd->nhg", query, k) * (scale or dim**-0.5)
        weighted = scores.exp() * weights
        shares = weighted / weighted.sum(-1, keepdim=True)
        out[:, group] = torch.einsum("nhg,nghd->nhd", shares, v)[:, None]
    return out.flatten(2)


def judge(dtype, *args):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 tiles as if they were integers")
    assert error(SPEC, *args) <= SPEC.tolerances[dtype].relative


@pytest.mark.parametrize(
    ("side", "heads", "dim", "settings"),
    [
        (8, 2, 40, (REGION, 1, 2, 2, 1.0)),
        (8, 1, 32, (REGION, 0, 4, 2, 1.5)),
        (4, 2, 80, (REGION, 0, 1, 2, 0.5)),  # a level of fewer tokens than cells
        (8, 1, 160, (REGION, 0, 3, 3, 1.0)),  # cells that do not divide the side
    ],
)
def test_is_its_definition(normal, dtype, side, heads, dim, settings):
    q, k, v = normal(2, side * side, 3 * heads * dim, dtype=dtype).chunk(3, dim=2)
    judge(dtype, q, k, v, heads, *settings, None)
    out = lip_attention(q, k, v, heads, *settings, 0.3).double()
    expected = by_definition(q, k, v, heads, *settings, 0.3)
    assert (out - expected).norm() <= SPEC.tolerances[dtype].relative * expected.norm()
    assert out.is_contiguous()


def test_without_pooling_and_weight_it_is_plain_attention(normal):
    q, k, v = normal(3, 2, 64, 32)
    out = lip_attention(q, k, v, 2, REGION, 1, 1, 1, 1.0)
    torch.testing.assert_close(out, spatial_attention(q, k, v, 2), rtol=1e-5, atol=1e-6)


def test_pictures_that_are_smooth_outside_lose_nothing(normal):
    """Where tokens of a cell are equal, pooling them is exact."""
    q, k, v = normal(3, 2, 64, 32)
    full = region_at(REGION, 8, 1).flatten()
    groups = grouping(REGION, 64, 1, 2, 1.0)
    for x in (q, k, v):
        for group in groups.members[groups.counts > 1]:
            x[:, group[group >= 0]] = x[:, group[:1]]
    assert 0 < full.sum() < 64
    out = lip_attention(q, k, v, 2, REGION, 1, 2, 2, 1.0)
    torch.testing.assert_close(out, spatial_attention(q, k, v, 2), rtol=1e-4, atol=1e-5)


def test_a_weight_draws_attention_to_the_lips(normal):
    """Values of 1 on the lips and 0 elsewhere: the result is their share."""
    q, k = normal(2, 1, 64, 32)
    v = MOUTH.flatten().float()[None, :, None].expand(1, 64, 32).contiguous()
    shares = [lip_attention(q, k, v, 1, REGION, 0, 1, 1, w).mean().item() for w in (0.5, 1.0, 2.0)]
    assert shares == sorted(shares)
    assert shares[2] > 1.2 * shares[1] > 1.2 * 1.2 * shares[0]


def test_groups_hold_every_token_once():
    groups = grouping(REGION, 64, 1, 4, 2.0)
    members = groups.members[groups.members >= 0]
    assert sorted(members.tolist()) == list(range(64))
    for number, (row, count) in enumerate(zip(groups.members, groups.counts, strict=True)):
        assert (groups.group_of[row[:count].long()] == number).all()
    full = region_at(REGION, 8, 1)
    assert groups.alone == int((groups.counts == 1).sum()) >= int(full.sum())
    assert groups.to(torch.device("meta")).alone == groups.alone  # asks no device
    assert groups.counts.tolist() == sorted(groups.counts.tolist())
    tokens = groups.log_weights.exp().sum().item()
    assert tokens == pytest.approx(64 + int(MOUTH.sum()))  # its own tokens count twice


def test_regions_are_text():
    assert torch.equal(decode_region(REGION), MOUTH)
    assert region_at(REGION, 4).tolist()[2] == [True, True, True, False]
    assert region_at(REGION, 8, 1)[3].tolist() == [True] * 7 + [False]
    empty = torch.zeros(3, 3, dtype=torch.bool)
    assert torch.equal(decode_region(encode_region(empty)), empty)


@pytest.mark.parametrize("fused", [False, True])
def test_passes_opcheck(normal, fused):
    q, k, v = normal(2, 64, 96).chunk(3, dim=2) if fused else normal(3, 2, 64, 32)
    torch.library.opcheck(lip_attention, (q, k, v, 2, REGION, 1, 2, 2, 1.0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"region": "8"}, "is not 'side:hexadecimal'"),
        ({"region": "2:1f"}, "more cells"),
        ({"region": "9:1"}, "has no level of 8 tokens"),
        ({"heads": 5}, "heads=5 must divide"),
        ({"halo": -1}, "halo=-1 must not be negative"),
        ({"key_pool": 0}, "key_pool=0 at least 1"),
        ({"lip_weight": 0.0}, "lip_weight=0.0 positive"),
        ({"scale": -1.0}, "scale=-1.0 must be positive"),
    ],
)
def test_refuses_what_does_not_fit(changed, message):
    x = torch.zeros(1, 64, 32)
    settings = {"heads": 2, "region": REGION, "halo": 0, "query_pool": 2, "key_pool": 2}
    with pytest.raises(OptionError, match=message):
        lip_attention(x, x, x, **{**settings, "lip_weight": 1.0, **changed})


def test_refuses_pictures_that_are_not_square_and_tensors_unalike():
    x = torch.zeros(1, 60, 32)
    with pytest.raises(OptionError, match="a square picture, not 60 tokens"):
        lip_attention(x, x, x, 2, REGION, 0, 2, 2, 1.0)
    with pytest.raises(OptionError, match="must be"):
        lip_attention(x, x[:, :9], x, 2, REGION, 0, 2, 2, 1.0)
    with pytest.raises(OptionError, match="differ in dtype"):
        lip_attention(x, x.half(), x, 2, REGION, 0, 2, 2, 1.0)
    with pytest.raises(OptionError, match="square map"):
        encode_region(torch.zeros(2, 3, dtype=torch.bool))
