"""From options and a rewritten graph to a UNet that reuses deep features."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch.fx import GraphModule

from lsync_compile.graph.deep_cache import DeepCut, cut, why_not
from lsync_compile.lowering.base import GraphFunction
from lsync_compile.options import Options
from lsync_compile.report import DeepCacheRecord, GraphRecord, Session
from lsync_compile.runtime.cache_schedule import CacheSchedule
from lsync_compile.runtime.context import Terms
from lsync_compile.runtime.deep_cache import CachePolicy, DeepCacheUNet
from lsync_compile.runtime.running import options_of

# Order of the polynomial through the last computed features.
PREDICTORS = {"reuse": 0, "linear": 1, "quadratic": 2}


def wanted(options: Options, target: str) -> bool:
    """Whether a graph is to be cut for the option ``deep_cache``."""
    return options.deep_cache and target == "unet"


def deep_cut(
    gm: GraphModule, options: Options, terms: Terms, record: GraphRecord
) -> DeepCut | None:
    """Cut a UNet's main graph in two and note it; None, with the reason noted, where it stays."""
    branch = options.deep_cache_branch
    noted = record.deep_cache = DeepCacheRecord(branch)
    if not terms.chunks:
        noted.reason = "nothing says which step of a chunk a call is"
        return None
    noted.reason = why_not(gm.graph, branch)
    if noted.reason:
        return None
    made = cut(gm, branch)
    noted.operations, noted.shallow_operations = made.operations
    noted.bytes = made.features.numel() * made.features.element_size()
    return made


def deep_cache_unet(
    made: DeepCut,
    full: GraphFunction,
    shallow: GraphFunction,
    session: Session,
    record: GraphRecord,
) -> DeepCacheUNet:
    """What runs the two lowered graphs; reads the schedule from the session in each call."""
    noted = record.deep_cache
    assert noted is not None  # deep_cut made it
    count: Callable[..., None] = functools.partial(session.count_deep_cache, noted)
    return DeepCacheUNet(full, shallow, made.features, functools.partial(policy, session), count)


def policy(session: Session, steps: int) -> CachePolicy:
    """What the options say of chunks of so many steps."""
    options = options_of(session)
    return CachePolicy(
        schedule=_calibrated(session, steps) or schedule(options),
        order=PREDICTORS[options.deep_cache_predictor],
        blend=options.deep_cache_blend,
        similarity=options.deep_cache_similarity,
    )


def _calibrated(session: Session, steps: int) -> CacheSchedule | None:
    """The schedule that was measured for so many steps; None where none is wanted or there."""
    options = options_of(session)
    if options.deep_cache_schedule != "calibrated" or options.deep_cache_steps is not None:
        return None
    key = steps, options.deep_cache_branch, options.deep_cache_predictor
    found = session.calibrations.get(key)
    if found is None:
        session.note(
            f"deep_cache: no calibration for {steps} steps with branch {key[1]} and predictor "
            f"{key[2]!r}; every {options.deep_cache_interval}. step computes"
        )
        return None
    return CacheSchedule(listed=found.computed)


def schedule(options: Options) -> CacheSchedule:
    """Which steps compute by the options alone."""
    return CacheSchedule(
        interval=options.deep_cache_interval,
        head=options.deep_cache_head,
        tail=options.deep_cache_tail,
        listed=options.deep_cache_steps,
    )
