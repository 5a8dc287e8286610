"""Says what is being compiled while someone waits for it.

Compiling a full-size UNet takes minutes the first time, in which nothing else happens. Who shows
progress of its own takes the news with :func:`listening`; otherwise it goes to the log, and in a
terminal to standard error.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lsync_compile.scoped import scoped

log = logging.getLogger(__name__)

# Seconds that Inductor takes for an operation of a captured graph, by device, with empty caches.
# cuda: 149 s for some 4,200, benchmarks/results/unet_step_baselines.json; cpu: small networks on
# two cores.
SECONDS_AN_OPERATION = {"cuda": 0.035, "cpu": 0.1}
WORTH_SAYING = 5.0  # seconds; shorter waits are not announced


@dataclass(frozen=True)
class Compiling:
    """What is being compiled.

    Attributes:
        name: the graph's target, such as "unet".
        inputs: shapes and dtypes of its data.
        operations: nodes of the graph.
        typical_seconds: how long it takes when no cache has it.
    """

    name: str
    inputs: str
    operations: int
    typical_seconds: float

    @property
    def typically(self) -> str:
        """The time in words."""
        minutes = self.typical_seconds / 60
        return f"{minutes:.0f} min" if minutes >= 1.5 else f"{self.typical_seconds:.0f} s"


# Called with the seconds it took when it is done, and with None when it begins.
Listener = Callable[[Compiling, "float | None"], None]
_listener: ContextVar[Listener | None] = ContextVar("lsync_progress", default=None)


def typical_seconds(lowering: str, device: str, operations: int) -> float:
    """How long a lowering takes for a graph on a device type when no cache has it."""
    if lowering == "eager":
        return 0.0
    return operations * SECONDS_AN_OPERATION.get(device, SECONDS_AN_OPERATION["cuda"])


def waiting_words(compiling: Compiling, seconds: float | None) -> str:
    """What a display says while someone waits; empty where the wait is short or over."""
    if seconds is not None or compiling.typical_seconds < WORTH_SAYING:
        return ""
    return f"compiling {compiling.name}, typically {compiling.typically} the first time"


def listening(listener: Listener) -> AbstractContextManager[Any]:
    """Take the news of this block, also of short waits; nothing is printed then."""
    return scoped(_listener, listener)


@contextmanager
def announced(compiling: Compiling) -> Iterator[None]:
    """Tell of the compilation that the block does: its begin, and its end if it ends well."""
    listener = _listener.get() or _to_log_and_terminal
    listener(compiling, None)
    started = time.perf_counter()
    yield
    listener(compiling, time.perf_counter() - started)


def _to_log_and_terminal(compiling: Compiling, seconds: float | None) -> None:
    if seconds is None:
        line = (
            f"compiling {compiling.name} ({compiling.inputs}; {compiling.operations} operations): "
            f"typically {compiling.typically}, seconds where torch's cache has it"
        )
    else:
        line = f"compiled {compiling.name} in {seconds:.0f} s"
    log.info(line)
    if compiling.typical_seconds >= WORTH_SAYING and sys.stderr.isatty():
        print(f"lsync: {line}", file=sys.stderr, flush=True)
