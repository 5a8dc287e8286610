"""Spreads jobs over processes, one with its own models for each device of the machine.

Jobs are handed out one by one, to whichever worker is free, so a long clip holds up nothing but its
own device. Each worker has a pipe of its own to this process and they share nothing else: one that
is killed, by the system for want of memory or by anyone, can leave no lock held and no queue torn.
Its clip goes to another worker once; where that one dies too, the clip has failed.

``torch.multiprocessing.spawn`` and the launchers of torch and accelerate end all processes when one
dies, and so do the pools of Python's library, so this is made of the library's processes and pipes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from lsync_compile.errors import Interrupted, LsyncError
from lsync_compile.files import remove_partials
from lsync_compile.jobs.listing import JobOutcome, ListedJob, do_job
from lsync_compile.progress import listening, waiting_words

ATTEMPTS = 2  # of a job whose worker dies
DEATHS = 3  # of workers in a row, none of which finished a job: the device is given up
GRACE = 10.0  # seconds that a worker has to remove its unfinished file when all is to end
_LOOK = 0.5  # seconds between two looks at whether workers live


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
class _Task:
    """A job that is open: where it was begun already."""

    job: ListedJob
    tried: list[int] = field(default_factory=list)  # numbers of devices


# What a worker sends.
@dataclass(frozen=True)
class _Ready:
    pass


@dataclass(frozen=True)
class _Steps:
    done: int
    total: int


@dataclass(frozen=True)
class _Says:
    words: str  # what it does instead of steps; empty when it goes on with them


@dataclass(frozen=True)
class _Finished:
    outcome: JobOutcome
    about: dict[str, Any]


@dataclass(frozen=True)
class _Refused:
    error: LsyncError  # while loading: what the user has to change


@dataclass(frozen=True)
class _Fault:
    words: str  # an error that no one foresaw; the process ends with it


class _Worker:
    """A process, seen from outside."""

    def __init__(
        self, number: int, state: WorkerState, prepare: Prepare, count: int, redo: bool
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork can not use CUDA
        self.pipe, theirs = context.Pipe()
        self.number = number  # of its device
        self.state = state
        self.task: _Task | None = None
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

    def give(self, task: _Task) -> None:
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

    def bury(self, wait: float = GRACE) -> str:
        """See a process off and remove its unfinished file; why it ended, in words.

        Args:
            wait: seconds after which it is killed.
        """
        self.process.join(wait)
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


class Spread:
    """Does jobs on several devices at once.

    Args:
        jobs: from :func:`lsync_compile.jobs.listing.read_jobs`.
        prepare: makes what does them; called in each worker.
        devices: one worker each; a device may be named more than once.
        redo: also those whose output exists.
        tell: called with each outcome as it is known.
        show: called when something has changed, and about twice a second.

    Attributes:
        workers: the state of each device's worker.
        outcomes: of the jobs done so far, by line.
    """

    def __init__(
        self,
        jobs: Sequence[ListedJob],
        prepare: Prepare,
        devices: Sequence[str],
        *,
        redo: bool = False,
        tell: Callable[[JobOutcome], None] = lambda outcome: None,
        show: Callable[[Spread], None] = lambda spread: None,
    ) -> None:
        self.jobs = list(jobs)
        self.workers = [WorkerState(device) for device in devices]
        self.outcomes: dict[int, JobOutcome] = {}
        self._prepare, self._redo = prepare, redo
        self._tell, self._show = tell, show
        self._open: deque[_Task] = deque()
        self._alive: list[_Worker] = []
        self._deaths = [0] * len(devices)  # in a row
        self._started = False  # any worker
        self._last_words = ""
        self._lengths: list[int] = []  # steps of the jobs done here; 0 where they are not known

    def run(self) -> list[JobOutcome]:
        """Do them; the outcomes in the order of the jobs.

        Raises:
            Interrupted: the user wants to stop; what is finished stays, nothing half is left.
            LsyncError: the models can not be loaded.
        """
        for job in self.jobs:
            if job.output.exists() and not self._redo:
                self._settle(JobOutcome(job.line, str(job.output), "skipped"))
            else:
                self._open.append(_Task(job))
        self.workers = self.workers[: len(self._open)]
        try:
            for number in range(len(self.workers)):
                self._start(number)
            while self._open or any(worker.task for worker in self._alive):
                self._hand_out()
                self._show(self)
                wait([worker.pipe for worker in self._alive], timeout=_LOOK)
                for worker in list(self._alive):
                    self._listen(worker)
                if not self._alive:
                    self._give_up()
            self._show(self)
        except KeyboardInterrupt as error:
            self._end(at_once=True)
            raise Interrupted("interrupted; clips that are finished stay") from error
        except BaseException:
            self._end(at_once=True)
            raise
        self._end(at_once=False)
        return [self.outcomes[job.line] for job in self.jobs]

    @property
    def share_done(self) -> float:
        """Of the work, 0 to 1: by steps, where clips not begun are taken for average ones."""
        begun = [worker.state.steps for worker in self._alive if worker.task]
        totals = [*self._lengths, *(total for _, total in begun)]
        known = [total for total in totals if total]
        usual = sum(known) / len(known) if known else 1.0
        all_steps = sum(known) + usual * (totals.count(0) + len(self._open))
        done = sum(length or usual for length in self._lengths) + sum(done for done, _ in begun)
        return done / all_steps if all_steps else 1.0

    def _start(self, number: int) -> None:
        state, count = self.workers[number], len(self.workers)
        self._alive.append(_Worker(number, state, self._prepare, count, self._redo))

    def _hand_out(self) -> None:
        """Give each free worker a job, one that another device failed at first to another one."""
        for worker in self._alive:
            if not worker.ready or worker.task is not None:
                continue
            others = {each.number for each in self._alive} - {worker.number}
            for task in self._open:
                if worker.number not in task.tried or others <= set(task.tried):
                    self._open.remove(task)
                    worker.give(task)
                    break

    def _listen(self, worker: _Worker) -> None:
        try:
            for message in worker.messages():
                self._take(worker, message)
        except (EOFError, OSError):  # in the middle of a message too
            self._lost(worker)

    def _take(self, worker: _Worker, message: Any) -> None:
        state = worker.state
        if isinstance(message, _Ready):
            worker.ready = self._started = True
            state.doing = "waiting"
        elif isinstance(message, _Steps):
            state.steps = (message.done, message.total)
        elif isinstance(message, _Says):
            name = worker.task.job.output.name if worker.task else "waiting"
            state.doing = message.words or name
        elif isinstance(message, _Finished):
            self._lengths.append(state.steps[1])
            worker.task = None
            self._deaths[worker.number] = 0
            state.doing, state.steps, state.about = "waiting", (0, 0), message.about
            state.jobs += 1
            self._settle(message.outcome)
        elif isinstance(message, _Fault):
            worker.fault = message.words
        elif isinstance(message, _Refused):
            if not self._started:
                raise message.error
            worker.fault = str(message.error)

    def _settle(self, outcome: JobOutcome) -> None:
        self.outcomes[outcome.line] = outcome
        self._tell(outcome)

    def _lost(self, worker: _Worker) -> None:
        """A worker is dead: its job is open again or has failed, its device has a new one."""
        self._alive.remove(worker)
        self._last_words = worker.bury()
        state, task = worker.state, worker.task
        state.deaths += 1
        state.doing, state.steps = "lost its worker", (0, 0)
        self._deaths[worker.number] += 1
        if task is not None and len(task.tried) < ATTEMPTS:
            self._open.append(task)
        elif task is not None:
            self._fail(task, f"its worker died {len(task.tried)} times: {self._last_words}")
        # One that dies before it has anything to do would do so again.
        if task is not None and self._open and self._deaths[worker.number] < DEATHS:
            self._start(worker.number)

    def _give_up(self) -> None:
        """No worker is left."""
        if self._open and not self._started:
            raise LsyncError(f"no worker could load the models: {self._last_words}")
        while self._open:
            self._fail(self._open.popleft(), f"no worker is left: {self._last_words}")

    def _fail(self, task: _Task, error: str) -> None:
        device = self.workers[task.tried[-1]].device if task.tried else ""
        self._settle(
            JobOutcome(
                task.job.line,
                str(task.job.output),
                "failed",
                error=error,
                device=device,
                attempts=len(task.tried),
            )
        )

    def _end(self, *, at_once: bool) -> None:
        """End the workers: after what they do, or in the middle of it."""
        for worker in self._alive:
            if at_once:
                worker.process.terminate()
            else:
                with contextlib.suppress(OSError):
                    worker.pipe.send(None)
        deadline = time.monotonic() + GRACE
        for worker in self._alive:
            worker.bury(max(0.0, deadline - time.monotonic()))
        self._alive.clear()


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
        send(_Ready())
        while (given := pipe.recv()) is not None:
            job, attempts = given
            with listening(lambda what, seconds: send(_Says(waiting_words(what, seconds)))):
                outcome = do_job(
                    job,
                    lambda job: work(job, lambda done, total: send(_Steps(done, total))),
                    redo=redo,
                    device=device,
                    attempts=attempts,
                )
            send(_Finished(outcome, {**work.about(), "device": device}))
    except LsyncError as error:
        send(_Refused(error))
    except (_Ended, EOFError, BrokenPipeError, ConnectionResetError):
        pass  # no one is there any more, or no one wants it
    except BaseException as error:
        first = str(error).strip().partition("\n")[0]
        with contextlib.suppress(OSError):
            send(_Fault(f"{type(error).__name__}: {first}"))
        raise


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
