"""Progress bars on the terminal, for all commands the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lsync_compile.errors import Interrupted
from lsync_compile.progress import Compiling, listening, waiting_words

Advance = Callable[[int, int], None]


def work_bars(console: Console, *, speed_of: float = 30.0) -> Progress:
    """Bars with the time left, none on a quiet console.

    Args:
        console: where.
        speed_of: the time left is by the speed of the last so many seconds.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
        speed_estimate_period=speed_of,
    )


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str], Advance]]:
    """A bar for each run; yields ``bar(name) -> advance(done, total)``."""
    with work_bars(console) as bars:

        def bar(name: str) -> Advance:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar


@contextmanager
def one_bar(console: Console, label: str) -> Iterator[Advance]:
    """A bar that also says what is being compiled; yields ``advance(done, total)``.

    Raises:
        Interrupted: Ctrl-C.
    """
    with work_bars(console) as bars:
        task = bars.add_task(label, total=None)

        def tell(compiling: Compiling, seconds: float | None) -> None:
            bars.update(task, description=waiting_words(compiling, seconds).capitalize() or label)

        try:
            with listening(tell):
                yield lambda done, total: bars.update(task, completed=done, total=total)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; no output was written") from error
