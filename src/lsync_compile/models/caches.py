"""What a run keeps of its clip by its options, and what it says of it in the report."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any

import torch

from lsync_compile.errors import OptionError
from lsync_compile.media.sources import ClipSource, FrameArray
from lsync_compile.models.job import Job
from lsync_compile.report import Session
from lsync_compile.runtime.clip_cache import ClipCache, ClipStore, clip_key, networks_key
from lsync_compile.runtime.encodings import Encodings
from lsync_compile.runtime.face_cache import CachedFaceDetector
from lsync_compile.runtime.timeline import check_trace_path

log = logging.getLogger(__name__)


def wanted(session: Session | None, option: str, device: torch.device) -> bool:
    """Whether a choice of on, off and auto (on for a GPU) is on; never for a plain pipeline."""
    if session is None:
        return False
    choice = getattr(session.options, option)
    return bool(choice == "on" or (choice == "auto" and device.type == "cuda"))


class JobCaches:
    """The caches of one run. Without a session there are none.

    Args:
        job: its tracker is given the faces that are known.
        pipeline: whose networks encode.
        device: where.
    """

    def __init__(self, job: Job, pipeline: Any, device: torch.device) -> None:
        self._job = job
        self._store: ClipStore | None = None
        self.encodings: Encodings | None = None
        if job.session is None:
            return
        options = job.session.options
        if options.trace is not None:
            check_trace_path(options.trace)  # before the work, not after
        if options.clip_cache:
            cache = ClipCache(limit=math.floor(options.clip_cache_gib * 2**30))
            faces = f"{type(pipeline.detector).__name__} {job.fps} " + " ".join(
                str(getattr(options, name)) for name in _FACES
            )
            # Any option may change how faces are encoded, but for a few that cannot.
            rest = {name: value for name, value in options.to_dict().items() if name not in _APART}
            encodings = f"{rest} " + networks_key(pipeline.vae, job.mask, device)
            self._store = cache.open(_key(job.video_path), faces, encodings)
            job.tracker.faces.update(self._store.faces)
        if options.face_cache or options.clip_cache:
            self.encodings = Encodings(self._store)

    def keep(self) -> None:
        """At the end of a run that went well: store what is new of the clip."""
        if self._store is not None:
            self._store.commit(self._job.tracker.faces, _key(self._job.video_path))

    def account(self) -> None:
        """Put counters, times and warnings into the report, and write the trace."""
        job, session = self._job, self._job.session
        if session is None:
            return
        detector = job.tracker.detector
        if isinstance(detector, CachedFaceDetector):
            counts = detector.counts.to_dict()
            worst = counts.pop("worst_px")
            session.count("face cache", **counts)
            session.most("face cache", worst_px=worst)
            _warn(session, detector)
        numbers: dict[str, int] = {}
        if self.encodings is not None:
            numbers = asdict(self.encodings.counts)
            held = numbers.pop("bytes")
            session.count("encodings", **numbers)
            if numbers["frames"] > 2 * len(job.tracker.faces) and not numbers["reused"]:
                session.note("encodings: a loop was shown again and none of them was of use")
            session.most("encodings", bytes=held)
        if self._store is not None:
            self._store.discard()
            session.count("clip cache", **self._store.counts())
            if self._store.counts()["encodings"] and not (numbers and numbers["stored"]):
                session.note("clip cache: its encodings fitted no chunk of a run")
        for work, seconds in job.timeline.seconds().items():
            for each in seconds:
                session.time(work, each)
        if session.options.trace is not None:
            try:
                job.timeline.save(session.options.trace)
            except (OSError, OptionError) as error:  # a full disk must not cost the film
                session.note(f"no trace was written: {error}")
                log.warning("no trace was written: %s", error)


# What faces depend on, beside the clip and the detector.
_FACES = ("face_tolerance", "track_faces")
_APART = frozenset(
    {
        *("preset", "strict", "dump_dir", "trace", "parallel_stages"),
        *("face_cache", "clip_cache", "clip_cache_gib", "batch_chunks", "batch_memory_gib"),
    }
)


def _key(clip: ClipSource) -> str:
    """A hash of a clip's content."""
    return clip.key() if isinstance(clip, FrameArray) else clip_key(clip)


def _warn(session: Session, detector: CachedFaceDetector) -> None:
    counts, options = detector.counts, session.options
    if counts.wrong:
        session.note(
            f"face cache: {counts.wrong} of {counts.checked} faces checked were wrong, the worst "
            f"by {counts.worst_px:.0f} pixels; use face_tolerance=0, track_faces=False"
        )
    if options.face_tolerance > 0 and counts.frames >= 50 and not counts.near:
        session.note("face cache: no near hit in a run; face_tolerance=0 spares looking for them")
    if options.track_faces and counts.frames >= 50 and not counts.tracked:
        session.note("face cache: no face could be tracked; track_faces did nothing in a run")
