"""Jobs in processes that someone else started: each claims the next one, the first reports."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from lsync_compile.errors import MediaError, OptionError
from lsync_compile.jobs.listing import JobOutcome, ListedJob
from lsync_compile.jobs.ranks import Gathered, Meeting, Rank, current_rank, run_claimed


def test_two_ranks_do_each_job_once_and_the_first_has_all_outcomes(tmp_path: Path) -> None:
    store, done, both = HashStore(), list[Path](), threading.Barrier(2)
    jobs = [ListedJob(line, Path("v"), None, tmp_path / f"{line}.mp4") for line in range(2, 9)]
    found: dict[int, Gathered | None] = {}

    def sync(job: ListedJob) -> SimpleNamespace:
        if job.line < 4:
            both.wait(30)  # each has one of the first two
        done.append(job.output)
        if job.line == 5:
            raise MediaError("no such file")
        return SimpleNamespace(num_frames=4, missing_faces=0, seconds=1.0)

    def process(index: int) -> None:
        meeting = Meeting(Rank(index, 2, index), store)
        told: list[JobOutcome] = []
        mine = run_claimed(
            jobs, sync, meeting, redo=False, device=f"rank {index}", tell=told.append
        )
        assert mine == told
        found[index] = meeting.gather(mine, {"rank": index})

    threads = [threading.Thread(target=process, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == sorted(job.output for job in jobs)
    assert found[1] is None
    assert found[0] is not None
    outcomes = sorted(found[0].outcomes, key=lambda each: each.line)
    assert [each.state for each in outcomes] == ["done"] * 3 + ["failed"] + ["done"] * 3
    assert {each.device for each in outcomes} == {"rank 0", "rank 1"}
    assert found[0].abouts == [{"rank": 0}, {"rank": 1}]


def test_ranks_are_known_by_torchs_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert current_rank() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert current_rank() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert current_rank() == Rank(3, 4, 1)
    with pytest.raises(OptionError, match=r"no meeting place.*MASTER_ADDR"):
        Meeting(Rank(3, 4, 1))
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(OptionError, match="must be numbers"):
        current_rank()
