"""The rows of the ablation: every approximate optimisation alone, at its settings, and together.

A row is a way to run a pipeline. An optimisation adds its rows to a list of its own below and that
list to :data:`ROWS`; ``ablation.py`` measures whatever is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One way to run.

    Attributes:
        name: unique; what results are filed under.
        options: of ``lsync_compile.compile`` on top of the preset ``exact``; None is the plain
            pipeline.
        steps: denoising steps a chunk.
        solver: a key of ``lsync_compile.runtime.timesteps.SOLVERS``.
    """

    name: str
    options: dict[str, Any] | None = None
    steps: int = 20
    solver: str = "ddim"


def deep(name: str, steps: int = 20, **options: Any) -> Row:
    """A row of DeepCacheUNet; options without their prefix ``deep_cache_``."""
    named = {f"deep_cache_{key}": value for key, value in options.items()}
    return Row(name, {"deep_cache": True, **named}, steps)


def lip(name: str, decode: bool = False, deep_interval: int = 0, **options: Any) -> Row:
    """A row of OptimizedLipAttention; options without their prefix ``lip_``."""
    named: dict[str, Any] = {f"lip_{key}": value for key, value in options.items()}
    if deep_interval:
        cache = deep("", interval=deep_interval, head=2, predictor="linear")
        named.update(cache.options or {})
    return Row(name, {"lip_attention": True, "crop_decode": decode, **named})


def temporal(start: str, steps: int) -> dict[str, Any]:
    """Options of TemporalCoherenceOptimizer: chunks after the first in so many of 20 steps."""
    return {"temporal_start": start, "temporal_strength": steps / 20}


def adaptive(minimum: int) -> dict[str, Any]:
    """Options of AdaptiveTimestepScheduler with its own thresholds."""
    return {"adaptive_steps": True, "adaptive_min_steps": minimum}


# What every optimisation has to beat: the same time by fewer steps.
FEWER_STEPS = [Row(f"{count} steps", {}, count) for count in (15, 12, 10, 9, 8, 7, 6, 5, 4, 3)]

# In the DeepCache package's way: every so many-th step, the last features as they are.
PACKAGE = [
    deep("DeepCache 2/0", interval=2),
    deep("DeepCache 3/0", interval=3),
    deep("DeepCache 5/0", interval=5),
]

DEEP_CACHE = [
    deep("3/0 linear", interval=3, head=2, predictor="linear"),
    deep("3/0 quadratic", interval=3, head=3, predictor="quadratic"),
    deep("5/0 reuse, head 2", interval=5, head=2),
    deep("5/0 linear", interval=5, head=2, predictor="linear"),
    deep("5/0 linear, tail 1", interval=5, head=2, tail=1, predictor="linear"),
    deep("5/0 quadratic", interval=5, head=3, predictor="quadratic"),
    deep("5/0 linear, blend 0.3", interval=5, head=2, predictor="linear", blend=0.3),
    deep("5/1 linear", interval=5, head=2, predictor="linear", branch=1),
    deep("5/2 linear", interval=5, head=2, predictor="linear", branch=2),
    deep("8/0 linear", interval=8, head=2, predictor="linear"),
    deep("3/0 similarity 0.8", interval=3, similarity=0.8),
]

# Both at once: few steps, most of them shallow.
DEEP_CACHE_AND_FEWER_STEPS = [
    deep("15 steps, 5/0 linear", 15, interval=5, head=2, predictor="linear"),
    deep("12 steps, 4/0 linear", 12, interval=4, head=2, predictor="linear"),
    deep("10 steps, 3/0 linear", 10, interval=3, head=2, predictor="linear"),
    deep("10 steps, 4/0 linear", 10, interval=4, head=2, predictor="linear"),
    deep("8 steps, 3/0 linear", 8, interval=3, head=2, predictor="linear"),
]

LIP_ATTENTION = [
    lip("lip attention, cells of 2", pool="2"),
    lip("lip attention, cells of 4", pool="4"),
    lip("lip attention, cells of 4, no halo", pool="4", halo=0),
    lip("lip attention, cells of 2, weight 1.5", pool="2", weight=1.5),
]

# Of the decoder alone: the speed of the UNet's steps stays.
CROP_DECODE = [
    Row(f"crop decode, {kind}", {"crop_decode": True, "crop_statistics": kind})
    for kind in ("own", "first", "both")
]

# Of the encoder alone, likewise.
CROP_ENCODE = [
    Row(f"crop encode, halo {halo}", {"crop_encode": True, "crop_halo": halo}) for halo in (1, 2)
]

MULTI_SCALE = [
    *LIP_ATTENTION,
    *CROP_DECODE,
    *CROP_ENCODE,
    lip("multi-scale: cells of 4, crop decode", pool="4", decode=True),
    lip("multi-scale with 3/0 linear", pool="4", decode=True, deep_interval=3),
]

THREE_LINEAR = deep("", interval=3, head=2, predictor="linear").options or {}
DEEP_2_0 = {"deep_cache": True, "deep_cache_interval": 2}

# Steps of the base schedule left out evenly; then with what long steps missed before added to them.
PACE = [
    *(Row(f"{n} steps, spread", {"few_steps": n}) for n in (10, 8, 5, 4, 3, 2)),
    *(Row(f"path, {n} steps", temporal("path", n)) for n in (10, 5, 4, 3, 2)),
    *(
        Row(f"path, {n} steps, guided 1", {**temporal("path", n), "guided_steps": 1})
        for n in (5, 3, 2)
    ),
    Row("path, 3 steps, 2/0", {**temporal("path", 3), **DEEP_2_0}),
    Row("path, 3 steps, refresh 4", {**temporal("path", 3), "temporal_refresh": 4}),
    Row("path, 3 to 20 steps, adaptive", {**temporal("path", 3), **adaptive(3)}),
    Row("adaptive, 10 to 30 steps", adaptive(10)),
    Row("renoise, 15 steps", temporal("renoise", 15)),
    Row("renoise, 10 steps", temporal("renoise", 10)),
    Row("5 steps, spread, dpmpp_2m", {"few_steps": 5, "solver": "dpmpp_2m"}),
    Row("path, 5 steps, 2/0", {**temporal("path", 5), **DEEP_2_0}),
]

# The op takes the library's product where that is faster; on a CPU all layers are rounded.
EIGHT_BITS = [
    Row("fp8 linear", {"fp8_linear": True, "kernels": "on"}),
    Row("fp8 linear with 3/0 linear", {"fp8_linear": True, "kernels": "on", **THREE_LINEAR}),
]

# Rounding for chunks that share calls; half of the speculated ones leave out 8 of 20 steps.
BATCHES = [
    Row("2 chunks a call", {"batch_chunks": 2}),
    Row("4 chunks a call, path, 5 steps", {**temporal("path", 5), "batch_chunks": 4}),
    Row("speculated", {"batch_chunks": 2, "speculate": True}),
]

# Found around the networks: they change where a face is cut, by the detector's own noise.
FACES = [
    Row("tracked faces", {"track_faces": True}),
    Row("near faces, 1 px", {"face_tolerance": 1.0}),
]


ROWS = [
    Row("plain"),
    Row("exact", {}),
    *FEWER_STEPS,
    *PACKAGE,
    *DEEP_CACHE,
    *DEEP_CACHE_AND_FEWER_STEPS,
    *MULTI_SCALE,
    *PACE,
    *EIGHT_BITS,
    *FACES,
]
