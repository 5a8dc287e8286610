"""When each piece of a run's work was done: sums, a Chrome trace, a picture.

Work on the device is timed there, between two events on its stream, so launches that return at
once do not count as work done. Nothing waits for the device until the timeline is read.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsync_compile.errors import OptionError
from lsync_compile.option_checks import TRACE_SUFFIXES


@dataclass
class Span:
    """One piece of work.

    Attributes:
        work: its kind, such as "decode".
        number: of the chunk.
        begin, end: seconds since the timeline began.
        keep: set to False in the block, the span is forgotten.
    """

    work: str
    number: int
    begin: float
    end: float
    keep: bool = True


class Timeline:
    """Gathers spans from all threads of a run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._pending: list[tuple[Span, Any, Any]] = []
        self._zero = time.perf_counter()
        self._device_zero: Any = None

    @contextmanager
    def span(self, work: str, number: int, device: torch.device | None = None) -> Iterator[Span]:
        """Time the block, on the device's current stream where one is given.

        A block that raises is not recorded.
        """
        span = Span(work, number, self._now(), 0.0)
        begin = self._mark(device)
        yield span
        end = self._mark(device)
        span.end = self._now()
        if not span.keep:
            return
        with self._lock:
            if device is None:
                self._spans.append(span)
            else:
                self._pending.append((span, begin, end))
                self._settle()

    def spans(self) -> list[Span]:
        """All finished work by the time it began; waits for the device."""
        with self._lock:
            for _, _, end in self._pending:
                end.synchronize()
            self._settle()
            return sorted(self._spans, key=lambda span: (span.begin, span.number))

    def _settle(self) -> None:
        """Read the times of the work that the device has done; the others wait on."""
        waiting = []
        for span, begin, end in self._pending:
            if end.query():
                anchor, at = self._device_zero
                span.begin = at + anchor.elapsed_time(begin) / 1000
                span.end = at + anchor.elapsed_time(end) / 1000
                self._spans.append(span)
            else:
                waiting.append((span, begin, end))
        self._pending = waiting

    def seconds(self) -> dict[str, list[float]]:
        """The durations of each kind of work, kinds in the order in which they first began."""
        found: dict[str, list[float]] = {}
        for span in self.spans():
            found.setdefault(span.work, []).append(span.end - span.begin)
        return found

    def save(self, path: str | Path) -> None:
        """Write a Chrome trace (``.json``, for chrome://tracing and Perfetto) or a picture.

        Raises:
            OptionError: the suffix is neither ``.json`` nor ``.png`` nor ``.svg``, or the
                picture needs matplotlib, which is missing.
        """
        path = check_trace_path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.chrome_trace()) + "\n")
        else:
            self._draw(path)

    def chrome_trace(self) -> dict[str, Any]:
        """The trace-event format, a row for each kind of work; times in microseconds."""
        rows = {work: row for row, work in enumerate(self.seconds())}
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": work}}
            for work, row in rows.items()
        ]
        events = [
            {
                "name": f"{span.work} {span.number}",
                "ph": "X",
                "pid": 0,
                "tid": rows[span.work],
                "ts": round(1e6 * span.begin, 1),
                "dur": round(1e6 * (span.end - span.begin), 1),
                "args": {"chunk": span.number},
            }
            for span in self.spans()
        ]
        return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}

    def _draw(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise OptionError(
                f"trace {path}: a picture needs matplotlib (pip install matplotlib); "
                "a name ending in .json does not"
            ) from error
        spent = self.seconds()
        rows = {work: row for row, work in enumerate(spent)}
        figure = Figure(figsize=(11, 0.9 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for span in self.spans():
            colour = f"C{span.number % 10}"
            axes.barh(rows[span.work], span.end - span.begin, left=span.begin, color=colour)
        axes.set_yticks(list(rows.values()), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel("seconds; one colour is one chunk")
        figure.savefig(path, dpi=110)

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    def _mark(self, device: torch.device | None) -> Any:
        """An event on the current stream of a device, after an anchor that ties it to the host."""
        if device is None:
            return None
        with self._lock:
            if self._device_zero is None:
                anchor = torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize(device)  # once a run
                anchor.record(torch.cuda.current_stream(device))
                self._device_zero = anchor, self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event


def check_trace_path(path: str | Path) -> Path:
    """The path, if its suffix names a form of trace and its folder is there.

    Raises:
        OptionError: it does not, or is not.
    """
    path = Path(path)
    if path.suffix not in TRACE_SUFFIXES:
        raise OptionError(f"trace {path}: the name must end in .json, .png or .svg")
    if not path.parent.is_dir():
        raise OptionError(f"trace {path}: the folder {path.parent} does not exist")
    return path
