"""Values that hold for a block, in one thread and asyncio task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def scoped(variable: ContextVar[T], value: T) -> Iterator[T]:
    """Set a context variable for the block; gives the value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
