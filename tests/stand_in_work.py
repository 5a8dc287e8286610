"""Work for worker processes without models: what happens to a clip is in its name.

It imports nothing that takes long, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lsync_compile.errors import CheckpointError, MediaError
from lsync_compile.files import replaced
from lsync_compile.jobs.listing import ListedJob

PATIENCE = 30.0  # seconds


class StandIn:
    """Writes its process's number into an output."""

    def __init__(self, device: str, workers: int) -> None:
        self.device, self.workers = device, workers

    def __call__(self, job: ListedJob, advance: Callable[[int, int], None]) -> Any:
        what, folder = job.video.name.partition("-")[0], job.output.parent
        with replaced(job.output) as partial:
            partial.write_text(str(os.getpid()))
            advance(1, 4)
            if what == "killed" or (what == "once" and first_time(folder / "tried")):
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "wrong":
                raise ValueError("something no one foresaw\nwith details")
            if what == "missing":
                raise MediaError(f"{job.video}: no such file")
            if what == "long":
                wait_until(lambda: len(list(folder.glob("[!.]*.mp4"))) == int(job.audio.name))
            if what == "endless":
                wait_until(lambda: False)
            advance(4, 4)
        return SimpleNamespace(num_frames=4, missing_faces=0, seconds=0.1)

    def about(self) -> dict[str, Any]:
        return {"report": {"workers": self.workers}}


def first_time(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not met():
        if time.monotonic() > end:
            raise MediaError("what was waited for did not happen")
        time.sleep(0.01)


def refuses(device: str, workers: int) -> StandIn:
    raise CheckpointError(f"no weights for {device}")


def dies(device: str, workers: int) -> StandIn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dies_on_one(device: str, workers: int) -> StandIn:
    return dies(device, workers) if device == "cpu:1" else StandIn(device, workers)
