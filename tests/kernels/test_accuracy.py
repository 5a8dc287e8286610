from __future__ import annotations

import dataclasses
import math

import torch

from lsync_compile.kernels import registered
from lsync_compile.kernels.accuracy import error, exact, largest_error, poisoned_memory

SPEC = registered()["geglu"]


def test_memory_that_is_never_written_shows():
    lazy = dataclasses.replace(SPEC, op=lambda x: torch.empty(x.shape[0], x.shape[1] // 2))
    assert math.isnan(error(lazy, torch.ones(3, 4)))


def test_a_wrong_output_shows():
    wrong = dataclasses.replace(SPEC, op=lambda x: SPEC.reference(x) * 1.001)
    assert abs(error(wrong, torch.ones(3, 4)) - 1e-3) < 1e-6


def test_the_worst_of_several_outputs_counts():
    ones = torch.ones(4)
    assert largest_error((ones, ones * 1.5), (ones.double(), ones.double())) == 0.5
    assert math.isnan(largest_error((ones * torch.nan, ones), (ones.double(), ones.double())))


def test_exact_is_float64():
    (out,) = exact(SPEC, torch.ones(3, 4, dtype=torch.float16))
    assert out.dtype == torch.float64


def test_poison_ends_with_the_block():
    with poisoned_memory():
        assert torch.empty(64).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
