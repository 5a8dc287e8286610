"""Which compiled object a run belongs to: its options, and the records that the run adds to.

A compiled pipeline sets its session around a call; the pipeline reads it once, while it plans the
run, and hands it on in the job. A plain pipeline has none: it runs in the reference order, and
nothing is cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsync_compile.report import Session

_session: ContextVar[Session | None] = ContextVar("lsync_session", default=None)


def current_session() -> Session | None:
    """The session of the compiled pipeline that is being called; None for a plain one."""
    return _session.get()


@contextmanager
def running(session: Session | None) -> Iterator[None]:
    """Set :func:`current_session` for the block, in this thread and asyncio task only."""
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)
