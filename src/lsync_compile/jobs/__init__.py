"""Many clips with models that stay loaded: in one process, on the GPUs of a machine, or on many.

``listing`` reads lists and does jobs one by one, ``settings`` says how a clip is synced and loads
what that takes, ``workers`` spreads jobs over processes with a device each (``worker`` is one of
them), ``ranks`` over those that torchrun or SLURM started, ``command`` is ``lsync sync --jobs``.
"""

from __future__ import annotations

from lsync_compile.jobs.listing import JobOutcome, ListedJob, do_job, read_jobs, run_jobs
from lsync_compile.jobs.settings import Syncer, SyncSettings

__all__ = [
    "JobOutcome",
    "ListedJob",
    "SyncSettings",
    "Syncer",
    "do_job",
    "read_jobs",
    "run_jobs",
]
