"""The options of a run: which steps are computed, what is reused, what goes on side by side.

Fields of :class:`lsync_compile.options.Options`, which is where they are checked and combined.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lsync_compile.option_checks import about


@dataclass(frozen=True)
class RunOptions:
    """What the runtime does between graphs. Most of it may change without compiling anew."""

    deep_cache: bool = field(
        default=False,
        metadata=about(
            "Approximate: in some steps of a chunk, take the deep features of an earlier step and "
            "compute the outermost layers alone."
        ),
    )
    deep_cache_branch: int = field(
        default=0,
        metadata=about(
            "Skip join at which deep features enter, from the outside: 0 computes least and is "
            "the DeepCache package's branch 0.",
            between=(0, 99),
        ),
    )
    deep_cache_schedule: str = field(
        default="interval",
        metadata=about(
            "Which steps compute deep features: every `deep_cache_interval`-th, or those that "
            "`lsync calibrate` found for this checkpoint.",
            choices=("interval", "calibrated"),
            rebuild=False,
        ),
    )
    deep_cache_interval: int = field(
        default=3,
        metadata=about(
            "Of how many steps one computes deep features; 1 computes all.",
            between=(1, 1000),
            rebuild=False,
        ),
    )
    deep_cache_head: int = field(
        default=1,
        metadata=about(
            "First steps of a chunk that all compute deep features.",
            between=(1, 1000),
            rebuild=False,
        ),
    )
    deep_cache_tail: int = field(
        default=0,
        metadata=about(
            "Last steps of a chunk that all compute deep features.",
            between=(0, 1000),
            rebuild=False,
        ),
    )
    deep_cache_steps: tuple[int, ...] | None = field(
        default=None,
        metadata=about(
            "The steps, from 0, that compute deep features, in place of a schedule; 0 always does.",
            rebuild=False,
        ),
    )
    deep_cache_predictor: str = field(
        default="reuse",
        metadata=about(
            "What stands for deep features that are not computed: the last ones, or the line or "
            "the parabola through the last two or three.",
            choices=("reuse", "linear", "quadratic"),
            rebuild=False,
        ),
    )
    deep_cache_blend: float = field(
        default=0.0,
        metadata=about(
            "Share of the predicted features that is mixed into computed ones before they are "
            "kept.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    deep_cache_similarity: float = field(
        default=0.0,
        metadata=about(
            "Compute a step where the last two computed features are less alike than this "
            "(cosine); 0 does not look, and the host never waits for the device.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    few_steps: int = field(
        default=0,
        metadata=about(
            "Approximate: denoise in so many steps, spread over those that the call asks for; "
            "0 takes all.",
            between=(0, 1000),
            rebuild=False,
        ),
    )
    guided_steps: int = field(
        default=0,
        metadata=about(
            "Approximate: with guidance, compute the half without sound in so many first steps of "
            "a chunk; the others take what the sound changed in the last of them. 0 computes it "
            "in all.",
            between=(0, 1000),
            rebuild=False,
        ),
    )
    adaptive_steps: bool = field(
        default=False,
        metadata=about(
            "Approximate: choose the steps of each chunk by how much its faces changed.",
            rebuild=False,
        ),
    )
    adaptive_min_steps: int = field(
        default=10,
        metadata=about(
            "Steps of a chunk that changed by less than `adaptive_low`.",
            between=(1, 1000),
            rebuild=False,
        ),
    )
    adaptive_max_steps: int = field(
        default=30,
        metadata=about(
            "Steps of a chunk that changed by more than `adaptive_high`.",
            between=(1, 1000),
            rebuild=False,
        ),
    )
    adaptive_low: float = field(
        default=0.01,
        metadata=about(
            "Mean squared difference of faces below which a chunk takes the fewest steps.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    adaptive_middle: float = field(
        default=0.05,
        metadata=about(
            "The same below which it takes three quarters.", between=(0.0, 1.0), rebuild=False
        ),
    )
    adaptive_high: float = field(
        default=0.2,
        metadata=about(
            "The same above which it takes the most steps.", between=(0.0, 1.0), rebuild=False
        ),
    )
    temporal_start: str = field(
        default="off",
        metadata=about(
            "Approximate: denoise a chunk in fewer steps with what the one before tells: `path` "
            "adds what long steps missed there, `renoise` starts from its result in the middle.",
            choices=("off", "path", "renoise"),
            rebuild=False,
        ),
    )
    temporal_strength: float = field(
        default=0.25,
        metadata=about(
            "Part of the steps that such a chunk runs, where `adaptive_steps` does not say.",
            between=(0.01, 1.0),
            rebuild=False,
        ),
    )
    temporal_refresh: int = field(
        default=0,
        metadata=about(
            "Denoise every so-manieth chunk in full; 0: only the first of each scene.",
            between=(0, 100_000),
            rebuild=False,
        ),
    )
    temporal_momentum: float = field(
        default=0.7,
        metadata=about(
            "For `renoise`: weight of the last result in the start; the rest is the clip's face.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    temporal_noise: float = field(
        default=0.01,
        metadata=about(
            "For `renoise`: standard deviation of the fresh part of the start's noise.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    scene_cut: float = field(
        default=0.02,
        metadata=about(
            "Squared difference of neighbouring faces above which a scene is cut; the next chunk "
            "starts from noise.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    solver: str = field(
        default="pipeline",
        metadata=about(
            "Approximate unless `pipeline`: denoise with this solver on the schedule of the "
            "pipeline's scheduler.",
            choices=("pipeline", "ddim", "dpmpp_2m", "unipc"),
            rebuild=False,
        ),
    )
    batch_chunks: int = field(
        default=1,
        metadata=about(
            "Denoise up to so many chunks in the same calls of the UNet, within rounding of one "
            "by one; 1 shares none.",
            between=(1, 64),
            rebuild=False,
        ),
    )
    batch_memory_gib: float = field(
        default=0.0,
        metadata=about(
            "GiB of device memory that `batch_chunks` may fill; 0 is half of what is free when a "
            "run begins.",
            between=(0.0, 10000.0),
            rebuild=False,
        ),
    )
    speculate: bool = field(
        default=False,
        metadata=about(
            "Approximate: start a chunk that looks like the one before in the middle of its steps, "
            "in the calls of that one, and take it back where a check fails; `batch_chunks=2`.",
            rebuild=False,
        ),
    )
    speculate_similarity: float = field(
        default=0.9,
        metadata=about(
            "For `speculate`: how alike its faces must be, 1 minus the root of their mean squared "
            "difference.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    speculate_skip: float = field(
        default=0.5,
        metadata=about(
            "For `speculate`: part of the steps that such a chunk leaves out, but for two.",
            between=(0.1, 0.9),
            rebuild=False,
        ),
    )
    speculate_tolerance: float = field(
        default=0.1,
        metadata=about(
            "For `speculate`: how far two guesses of the start may be apart, in standard "
            "deviations of clean latents.",
            between=(0.0, 10.0),
            rebuild=False,
        ),
    )
    parallel_stages: str = field(
        default="auto",
        metadata=about(
            "Read, find faces, encode, denoise, decode and paste in stages that overlap, each in "
            "a thread of its own, the networks on one stream; same bytes. `auto` is on for a GPU.",
            choices=("auto", "on", "off"),
            rebuild=False,
        ),
    )
    batch_faces: str = field(
        default="auto",
        metadata=about(
            "Cut and paste the faces of a chunk together on the device, within rounding of doing "
            "it frame by frame. `auto` is on for a GPU.",
            choices=("auto", "on", "off"),
            rebuild=False,
        ),
    )
    face_cache: bool = field(
        default=True,
        metadata=about(
            "Search equal frames for a face once, and encode a frame that is shown again once.",
            rebuild=False,
        ),
    )
    face_tolerance: float = field(
        default=0.0,
        metadata=about(
            "Approximate above 0: take a face found before where brows and nose have moved by "
            "fewer pixels than this.",
            between=(0.0, 20.0),
            rebuild=False,
        ),
    )
    track_faces: bool = field(
        default=False,
        metadata=about(
            "Approximate: look for the face where it was in the frame before, and search the "
            "frame at cuts and once a second only.",
            rebuild=False,
        ),
    )
    clip_cache: bool = field(
        default=False,
        metadata=about(
            "Keep faces and encodings of a clip in the user's cache folder, so that the same clip "
            "with another sound needs neither again.",
            rebuild=False,
        ),
    )
    clip_cache_gib: float = field(
        default=2.0,
        metadata=about(
            "GiB that the clips kept may take; the least recently used go first.",
            between=(0.001, 10000.0),
            rebuild=False,
        ),
    )
    guard_every: int = field(
        default=0,
        metadata=about(
            "Also compute every so-manieth chunk exactly, measure how far the approximate one is, "
            "and fall back where that is too far; 0 trusts the options.",
            between=(0, 100_000),
            rebuild=False,
        ),
    )
    guard_floor: float = field(
        default=30.0,
        metadata=about(
            "Least PSNR of the mouth in dB that `guard_every` accepts.",
            between=(0.0, 100.0),
            rebuild=False,
        ),
    )
    trace: Path | None = field(
        default=None,
        metadata=about(
            "File for a timeline of each run: a Chrome trace (`.json`) or a picture (`.png`, "
            "`.svg`).",
            rebuild=False,
        ),
    )
