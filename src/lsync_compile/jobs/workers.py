"""Spreads jobs over processes, one with its own models for each device of the machine.

Jobs are handed out one by one, to whichever worker is free, so a long clip holds up nothing but its
own device. Each worker has a pipe of its own to this process and they share nothing else: one that
is killed, by the system for want of memory or by anyone, can leave no lock held and no queue torn.
Its clip goes to another worker once; where that one dies too, the clip has failed.

``torch.multiprocessing.spawn`` and the launchers of torch and accelerate end all processes when one
dies, and so do the pools of Python's library, so this is made of the library's processes and pipes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from lsync_compile.errors import Interrupted, LsyncError
from lsync_compile.jobs.listing import JobOutcome, ListedJob
from lsync_compile.jobs.worker import (
    GRACE,
    Fault,
    Finished,
    Prepare,
    Ready,
    Refused,
    Says,
    Steps,
    Task,
    Worker,
    WorkerState,
)

ATTEMPTS = 2  # of a job whose worker dies
DEATHS = 3  # of workers in a row, none of which finished a job: the device is given up
_LOOK = 0.5  # seconds between two looks at whether workers live


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
        self._open: deque[Task] = deque()
        self._alive: list[Worker] = []
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
                self._open.append(Task(job))
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
        self._alive.append(Worker(number, state, self._prepare, count, self._redo))

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

    def _listen(self, worker: Worker) -> None:
        try:
            for message in worker.messages():
                self._take(worker, message)
        except (EOFError, OSError):  # in the middle of a message too
            self._lost(worker)

    def _take(self, worker: Worker, message: Any) -> None:
        state = worker.state
        if isinstance(message, Ready):
            worker.ready = self._started = True
            state.doing = "waiting"
        elif isinstance(message, Steps):
            state.steps = (message.done, message.total)
        elif isinstance(message, Says):
            name = worker.task.job.output.name if worker.task else "waiting"
            state.doing = message.words or name
        elif isinstance(message, Finished):
            self._lengths.append(state.steps[1])
            worker.task = None
            self._deaths[worker.number] = 0
            state.doing, state.steps, state.about = "waiting", (0, 0), message.about
            state.jobs += 1
            self._settle(message.outcome)
        elif isinstance(message, Fault):
            worker.fault = message.words
        elif isinstance(message, Refused):
            if not self._started:
                raise message.error
            worker.fault = str(message.error)

    def _settle(self, outcome: JobOutcome) -> None:
        self.outcomes[outcome.line] = outcome
        self._tell(outcome)

    def _lost(self, worker: Worker) -> None:
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

    def _fail(self, task: Task, error: str) -> None:
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
        """End the workers: in the middle of what they do, or when they have nothing to do."""
        for worker in self._alive:
            worker.end(at_once=at_once)
        deadline = time.monotonic() + GRACE
        for worker in self._alive:
            worker.see_off(deadline)
        self._alive.clear()
