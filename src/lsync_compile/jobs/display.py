"""One display for all workers: a bar for the list with the time left, and one for each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import TaskID

from lsync_compile.bars import work_bars
from lsync_compile.jobs.workers import Spread

SPEED_OF = 600.0  # seconds of which the speed is taken for the time left of a whole list


@contextmanager
def spread_bars(console: Console) -> Iterator[Callable[[Spread], None]]:
    """Yields what shows the state of a :class:`Spread`."""
    with work_bars(console, speed_of=SPEED_OF) as bars:
        whole = bars.add_task("clips", total=1.0)
        rows = list[TaskID]()

        def show(spread: Spread) -> None:
            finished, count = len(spread.outcomes), len(spread.jobs)
            words = f"{finished} of {count} clips"
            bars.update(whole, description=words, completed=spread.share_done)
            while len(rows) < len(spread.workers):
                rows.append(bars.add_task("", total=None))
            for row, worker in zip(rows, spread.workers, strict=True):
                done, total = worker.steps
                words = f"  {worker.device}: {worker.doing}"
                bars.update(row, description=words, completed=done, total=total or None)

        try:
            yield show
        finally:
            for row in rows:  # what is over says nothing
                bars.update(row, visible=False)
