"""What the threads of a run do, and since when: so that a run that stands still says where.

Threads that wait look at the clock now and then. Where one has waited for a minute, a line in the
log says what each of them does, and for those that work the line of code that they are in. The next
one comes a minute later at the earliest. ``py-spy dump`` shows more, where it is at hand.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

LONG = 60.0  # seconds
_PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class _Doing:
    """What a thread does.

    Attributes:
        what: such as "works on chunk 3" or "waits for room".
        since: by the clock.
        thread: who does it.
        may_take_long: compiling is expected here.
    """

    what: str
    since: float
    thread: int
    may_take_long: bool


class Watch:
    """Notes what each of a run's threads does.

    Args:
        long: seconds of waiting that are worth a line in the log.
        clock: gives seconds.
    """

    def __init__(
        self, long: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._long = LONG if long is None else long
        self._clock = clock
        self._doing: dict[str, _Doing] = {}
        self._lock = threading.Lock()
        self._quiet_until = float("-inf")

    def does(self, who: str, what: str, *, may_take_long: bool = False) -> None:
        """Called by the thread ``who`` when it begins something else."""
        self._doing[who] = _Doing(what, self._clock(), threading.get_ident(), may_take_long)

    def look(self, who: str) -> None:
        """Called by ``who`` again and again while it waits."""
        now = self._clock()
        if now - self._doing[who].since < self._long:
            return
        with self._lock:
            if now < self._quiet_until:
                return
            self._quiet_until = now + self._long
        doing = dict(self._doing)
        expected = any(each.may_take_long for each in doing.values())
        level = logging.INFO if expected else logging.WARNING
        hint = "" if expected else " (where it stays so: parallel_stages='off')"
        log.log(level, "a run stands still: %s%s", self.describe(doing, now), hint)

    def describe(self, doing: dict[str, _Doing], now: float) -> str:
        """What each thread does, in the order in which they were first heard of."""
        frames = sys._current_frames()
        parts = []
        for who, each in doing.items():
            waits = each.what.startswith("waits")
            where = "" if waits else _where(frames.get(each.thread))
            parts.append(f"{who} {each.what} ({now - each.since:.0f} s{where})")
        return "; ".join(parts)


def _where(frame: FrameType | None) -> str:
    """The innermost line of this package that a thread is in, and the innermost of all."""
    calls = [] if frame is None else traceback.extract_stack(frame)
    ours = [call for call in calls if call.filename.startswith(_PACKAGE)][-1:]
    named = dict.fromkeys(
        f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in [*ours, *calls[-1:]]
    )
    return f", in {' > '.join(named)}" if named else ""
