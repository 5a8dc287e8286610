"""Jobs in the processes that torchrun, or SLURM with torch's variables, started on some machines.

Each process has one device. What is next is a counter in the key-value store of
``torch.distributed``, so here too a long clip holds up nothing but its own device. The outcomes
come together there, and the first process reports. Nothing else is shared, and no collective
operation is used: the processes need not run in step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from lsync_compile.errors import OptionError
from lsync_compile.jobs.listing import JobOutcome, ListedJob, run_jobs

_LONG = timedelta(days=30)  # one process may wait for the last clip of another


@dataclass(frozen=True)
class Rank:
    """One of several processes.

    Attributes:
        index: from 0, over all machines.
        count: of the processes.
        local: from 0, on its machine.
    """

    index: int
    count: int
    local: int

    @property
    def first(self) -> bool:
        """Whether it is the one that reports."""
        return self.index == 0


def current_rank() -> Rank | None:
    """By ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; None for a process that is alone.

    Raises:
        OptionError: they are no numbers.
    """
    try:
        index, count, local = (
            int(os.environ.get(name, usual))
            for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
    except ValueError as error:
        raise OptionError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error
    return Rank(index, count, local) if count > 1 else None


class Meeting:
    """What the processes share: which job is next, and what became of each.

    Args:
        rank: of this one.
        store: of torch.distributed; that of ``MASTER_ADDR`` and ``MASTER_PORT`` for None.
    """

    def __init__(self, rank: Rank, store: Any = None) -> None:
        self._rank = rank
        self._store = _store(rank) if store is None else store

    def claims(self, count: int) -> Iterator[int]:
        """Numbers below the count that no other process has or will have."""
        while (number := self._store.add("lsync/next", 1) - 1) < count:
            yield number

    def gather(self, outcomes: Sequence[JobOutcome], about: dict[str, Any]) -> Gathered | None:
        """Hand in what this process did; all of it in the first one, None in the others."""
        mine = {"outcomes": [asdict(outcome) for outcome in outcomes], "about": about}
        self._store.set(_key(self._rank.index), json.dumps(mine))
        if not self._rank.first:
            return None
        keys = [_key(index) for index in range(self._rank.count)]
        self._store.wait(keys, _LONG)
        parts = [json.loads(self._store.get(key)) for key in keys]
        return Gathered(
            [JobOutcome(**each) for part in parts for each in part["outcomes"]],
            [part["about"] for part in parts],
        )


@dataclass(frozen=True)
class Gathered:
    """What all processes did.

    Attributes:
        outcomes: of all jobs, in no order.
        abouts: what each process says of itself.
    """

    outcomes: list[JobOutcome]
    abouts: list[dict[str, Any]]


def run_claimed(
    jobs: Sequence[ListedJob],
    sync: Callable[[ListedJob], Any],
    meeting: Meeting,
    *,
    redo: bool,
    device: str,
    tell: Callable[[JobOutcome], None],
) -> list[JobOutcome]:
    """Do the jobs that no other process does; their outcomes.

    Raises:
        Interrupted: the user wants to stop; what is finished stays.
    """
    # One is claimed when the one before is done.
    claimed = (jobs[number] for number in meeting.claims(len(jobs)))
    return run_jobs(claimed, sync, redo=redo, device=device, tell=tell)


def _key(index: int) -> str:
    return f"lsync/outcomes/{index}"


def _store(rank: Rank) -> Any:
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank.index, rank.count, timeout=_LONG))
    except ValueError as error:
        raise OptionError(f"WORLD_SIZE={rank.count}, but no meeting place: {error}") from error
    return store
