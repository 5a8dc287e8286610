"""Inputs that all kernel tests share.

These tests run twice: as they stand, where the ops take their references on a CPU, and once more
under Triton's interpreter (see test_interpreter.py), where the same ops launch their kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that kernels support."""
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """A function that draws normal numbers of a shape and dtype, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return draw
