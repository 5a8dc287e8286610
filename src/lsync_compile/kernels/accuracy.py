"""How far a kernel is from exact: what tests and benchmarks judge kernels by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lsync_compile.kernels.spec import KernelSpec


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all memory allocated in this block with NaN, so that what is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def exact(spec: KernelSpec, *args: Any) -> tuple[Tensor, ...]:
    """The reference's outputs on the same inputs in float64."""
    return _tuple(spec.reference(*(_double(value) for value in args)))


def error(spec: KernelSpec, *args: Any) -> float:
    """Largest relative error of the op's outputs, in poisoned memory, against `exact`.

    NaN if anything was left unwritten. The bound is ``spec.tolerances[dtype].relative``.
    """
    with poisoned_memory():
        outputs = _tuple(spec.op(*args))
    return largest_error(outputs, exact(spec, *args))


def largest_error(outputs: Tensor | tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Largest of ``|output - exact| / |exact|``, 2-norms over a whole tensor; NaN beats all."""
    errors = torch.stack(
        [
            torch.linalg.vector_norm(output.double() - reference)
            / torch.linalg.vector_norm(reference)
            for output, reference in zip(_tuple(outputs), exact, strict=True)
        ]
    )
    return float(errors.max())  # torch's max gives NaN for NaN


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
