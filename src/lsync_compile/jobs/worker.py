"""A process that does jobs on one device, from both sides of its pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from lsync_compile.errors import LsyncError
from lsync_compile.files import remove_partials
from lsync_compile.jobs.listing import JobOutcome, ListedJob, do_job
from lsync_compile.progress import listening, waiting_words

GRACE = 10.0  # seconds that a worker has to remove its unfinished file when all is to end


class Work(Protocol):
    """What syncs clips in a worker, see :class:`lsync_compile.jobs.settings.Syncer`."""

    def __call__(self, job: ListedJob, advance: Callable[[int, int], None]) -> Any:
        """Do a job, telling ``advance`` of the steps done and their total."""
        ...

    def about(self) -> dict[str, Any]:
        """Plain values for the report."""
        ...


# Called in a worker with its device and the number of workers on the machine. It is pickled.
Prepare = Callable[[str, int], Work]


@dataclass
class WorkerState:
    """A worker as the display and the report show it.

    Attributes:
        device: its own.
        doing: in words; the name of a clip's output while it syncs one.
        steps: denoising steps done of that clip, and their total; 0 while it is not known.
        jobs: finished by this device's workers.
        deaths: of workers of this device.
        about: what the last one said of itself.
    """

    device: str
    doing: str = "loading"
    steps: tuple[int, int] = (0, 0)
    jobs: int = 0
    deaths: int = 0
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """A job that is open: where it was begun already."""

    job: ListedJob
    tried: list[int] = field(default_factory=list)  # numbers of devices


# What a worker sends.
@dataclass(frozen=True)
class Ready:
    pass


@dataclass(frozen=True)
class Steps:
    done: int
    total: int


@dataclass(frozen=True)
class Says:
    words: str  # what it does instead of steps; empty when it goes on with them


@dataclass(frozen=True)
class Finished:
    outcome: JobOutcome
    about: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    error: LsyncError  # while loading: what the user has to change


@dataclass(frozen=True)
class Fault:
    words: str  # an error that no one foresaw; the process ends with it


class Worker:
    """A process, seen from the one that started it.

    Args:
        number: of its device, from 0.
        state: what is shown of it; kept up to date by who reads its messages.
        prepare: makes what does the work there.
        count: of the workers on the machine.
        redo: also jobs whose output exists.

    Attributes:
        pipe: this side's end.
        task: what it does now.
        ready: whether its models are loaded.
        fault: why it is about to die, in words, where it could still say so.
    """

    def __init__(
        self, number: int, state: WorkerState, prepare: Prepare, count: int, redo: bool
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork can not use CUDA
        self.pipe, theirs = context.Pipe()
        self.number = number
        self.state = state
        self.task: Task | None = None
        self.ready = False
        self.fault = ""
        self.process = context.Process(
            target=_serve,
            args=(theirs, prepare, state.device, count, redo),
            name=f"lsync worker {number} ({state.device})",
        )
        self.process.start()
        theirs.close()  # or its end would not be seen
        state.doing, state.steps = "loading", (0, 0)

    def give(self, task: Task) -> None:
        """Have it do a job."""
        task.tried.append(self.number)
        self.task = task
        self.state.doing, self.state.steps = task.job.output.name, (0, 0)
        with contextlib.suppress(OSError):  # dead: found when its pipe is read
            self.pipe.send((task.job, len(task.tried)))

    def messages(self) -> Iterator[Any]:
        """What it has sent; EOFError when it is dead and all is read."""
        while self.pipe.poll():
            yield self.pipe.recv()
        if not self.process.is_alive() and not self.pipe.poll():
            raise EOFError

    def end(self, *, at_once: bool) -> None:
        """Have it end, in the middle of what it does or when it has nothing to do."""
        if at_once:
            self.process.terminate()
        else:
            with contextlib.suppress(OSError):
                self.pipe.send(None)

    def see_off(self, deadline: float) -> None:
        """Wait until it has tidied up, which its pipe's end says, and kill it.

        What it would do after that is take Python and torch down, which may last for seconds.

        Args:
            deadline: on the monotonic clock; it is killed then in any case.
        """
        with contextlib.suppress(EOFError, OSError):
            while (left := deadline - time.monotonic()) > 0 and self.pipe.poll(left):
                self.pipe.recv()
        self.process.kill()
        self.bury()

    def bury(self) -> str:
        """Take leave of a process that is ending, with its unfinished file; why it ended."""
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()
        if self.task is not None and self.process.pid is not None:
            remove_partials(self.task.job.output, self.process.pid)
        code = self.process.exitcode or 0
        if self.fault:
            return self.fault
        if code == -signal.SIGKILL:
            return "it was killed (signal 9); the system does so when memory is short"
        return f"it was ended by signal {-code}" if code < 0 else f"it left with code {code}"


class _Ended(BaseException):
    """The process is to end; raised wherever it is."""


def _serve(pipe: Connection, prepare: Prepare, device: str, count: int, redo: bool) -> None:
    """What a worker does from its start to its end."""
    # Ctrl-C reaches all processes of a terminal; who started this one says what is to happen.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_here)
    lock = threading.Lock()  # a network may be compiled in another thread than tells of steps

    def send(message: Any) -> None:
        with lock:
            pipe.send(message)

    try:
        work = prepare(use_only(device), count)
        send(Ready())
        while (given := pipe.recv()) is not None:
            job, attempts = given
            with listening(lambda what, seconds: send(Says(waiting_words(what, seconds)))):
                outcome = do_job(
                    job,
                    lambda job: work(job, lambda done, total: send(Steps(done, total))),
                    redo=redo,
                    device=device,
                    attempts=attempts,
                )
            send(Finished(outcome, {**work.about(), "device": device}))
    except LsyncError as error:
        send(Refused(error))
    except (_Ended, EOFError, BrokenPipeError, ConnectionResetError):
        pass  # no one is there any more, or no one wants it
    except BaseException as error:
        first = str(error).strip().partition("\n")[0]
        with contextlib.suppress(OSError):
            send(Fault(f"{type(error).__name__}: {first}"))
        raise
    finally:
        pipe.close()


def _end_here(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: tidying up is not to be interrupted
    raise _Ended


def use_only(device: str) -> str:
    """Hide other GPUs from this process, before it has used any; the device's name after that.

    Whatever thread or library takes "the first GPU" then takes this one.
    """
    if not device.startswith("cuda:"):
        return device
    index = int(device.removeprefix("cuda:"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else []
    os.environ["CUDA_VISIBLE_DEVICES"] = names[index] if names else str(index)
    return "cuda:0"
