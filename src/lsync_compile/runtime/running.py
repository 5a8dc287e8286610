"""Which compiled object a run belongs to: its options, and the records that the run adds to.

A compiled pipeline sets its session around a call; the pipeline reads it once, while it plans the
run, and hands it on in the job. A plain pipeline has none: it runs in the reference order, and
nothing is cached.

Within a run, a block may take other options than the session's, or leave what was compiled aside:
the quality guard does (:mod:`lsync_compile.runtime.guard`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from lsync_compile.scoped import scoped

if TYPE_CHECKING:
    from lsync_compile.options import Options
    from lsync_compile.report import Session

_session: ContextVar[Session | None] = ContextVar("lsync_session", default=None)
_options: ContextVar[Options | None] = ContextVar("lsync_options", default=None)
_plain: ContextVar[bool] = ContextVar("lsync_plain", default=False)


def current_session() -> Session | None:
    """The session of the compiled pipeline that is being called; None for a plain one."""
    return _session.get()


def running(session: Session | None) -> AbstractContextManager[Any]:
    """Set :func:`current_session` for the block, in this thread and asyncio task only."""
    return scoped(_session, session)


def options_of(session: Session) -> Options:
    """The options in force for a call of a session's networks."""
    return _options.get() or session.options


def other_options(options: Options | None) -> AbstractContextManager[Any]:
    """Run networks with these options instead of the session's; None changes nothing."""
    return scoped(_options, options)


def runs_plain() -> bool:
    """Whether compiled networks are to run as they were before they were compiled."""
    return _plain.get()


def plain_networks() -> AbstractContextManager[Any]:
    """Run networks as they were before they were compiled, in this thread and task only."""
    return scoped(_plain, True)
