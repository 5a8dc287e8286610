from __future__ import annotations

import pytest
import torch
from diffusers.models.activations import GEGLU

from lsync_compile.errors import OptionError
from lsync_compile.kernels import geglu, registered
from lsync_compile.kernels.accuracy import error

SPEC = registered()["geglu"]


@pytest.mark.parametrize("shape", [(3, 5, 2 * 64), (7, 2 * 301), (2 * 1,), (2, 1, 3, 2 * 257)])
def test_is_exact(normal, dtype, shape):
    assert error(SPEC, normal(*shape, dtype=dtype)) <= SPEC.tolerances[dtype].relative


def test_reads_any_strides(normal):
    bound = SPEC.tolerances[torch.float32].relative
    x = normal(4, 6, 3 * 64)
    assert error(SPEC, x[..., 16:80]) <= bound  # a slice of wider rows
    assert error(SPEC, x[:, ::2]) <= bound
    assert error(SPEC, x.transpose(1, 2)) <= bound  # channels apart


def test_tails_of_the_gate_are_exact():
    gate = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    x = torch.cat([torch.ones_like(gate), gate])
    out = geglu(x.float())
    expected = torch.nn.functional.gelu(gate)
    torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-6)
    assert geglu(torch.tensor([1.0, -torch.inf])).isnan()  # as torch's: -inf * 0


def test_is_the_activation_of_diffusers(normal):
    module = GEGLU(8, 16).requires_grad_(False)
    x = normal(3, 5, 8)
    torch.testing.assert_close(geglu(module.proj(x)), module(x))


def test_passes_opcheck(normal):
    torch.library.opcheck(geglu, (normal(3, 4, 8),))
    torch.library.opcheck(geglu, (normal(4, 8, 3).transpose(1, 2),))


def test_refuses_odd_channels():
    with pytest.raises(OptionError, match="must be even"):
        geglu(torch.zeros(3, 5))
