"""Finding, for one checkpoint, the fewest steps that must compute deep features.

One run computes all steps and keeps a sample of their features. For each choice of steps, the
features that the others would be given are predicted from the sample and compared with what they
really were; the choice with the least error is found for every number of steps by dynamic
programming. Then pipelines run with these schedules until the fewest steps are known whose mouth
PSNR is above the floor. The error of features only proposes, the picture decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import lsync_compile
from lsync_compile.errors import OptionError
from lsync_compile.lowering.deep_cache import PREDICTORS
from lsync_compile.quality.compare import Clip
from lsync_compile.quality.runs import Progress, Setting, collect
from lsync_compile.quality.scores import compare_runs
from lsync_compile.runtime.calibration import Calibration
from lsync_compile.runtime.context import StepContext
from lsync_compile.runtime.deep_cache import extrapolate, observing

ELEMENTS = 2**17  # of each step's features that are kept
Choice = tuple[int, ...]


@dataclass
class FeatureSample:
    """Some elements of the deep features of every step of one chunk.

    Attributes:
        features: by step, float32 on the CPU.
        positions: by step, the timestep.
    """

    features: dict[int, Tensor] = field(default_factory=dict)
    positions: dict[int, float] = field(default_factory=dict)

    def __call__(self, context: StepContext, features: Tensor) -> None:
        """Keep a step of the run's first chunk, see :func:`observing`."""
        if context.chunk == 0:
            flat = features.flatten()
            stride = max(1, flat.numel() // ELEMENTS)
            self.features[context.step] = flat[::stride].float().cpu()
            position = context.step if context.timestep is None else context.timestep
            self.positions[context.step] = float(position)

    def error(self, known: Choice, step: int) -> float:
        """Relative error of a step's features as predicted from those of the steps ``known``."""
        places = [self.positions[each] for each in known]
        features = [self.features[each] for each in known]
        predicted = extrapolate(places, features, self.positions[step])
        real = self.features[step]
        return float((predicted - real).norm() / real.norm())


def best_choices(
    steps: int, order: int, error: Callable[[Choice, int], float]
) -> dict[int, Choice]:
    """For each number of computed steps, those with the least error in all the others.

    Args:
        steps: of a chunk.
        order: of the prediction: it looks at the last ``order + 1`` computed steps.
        error: of a step that is predicted from the steps given, in order.

    Returns:
        Number of computed steps to the steps, which begin with 0.
    """
    error = functools.cache(error)

    def until(known: Choice, stop: int) -> float:
        return sum(error(known, step) for step in range(known[-1] + 1, stop))

    # By the last computed steps: the least error before them, and all steps chosen so far.
    states: dict[Choice, tuple[float, Choice]] = {(0,): (0.0, (0,))}
    choices: dict[int, Choice] = {}
    while states:
        _, choices[len(choices) + 1] = min(
            (total + until(known, steps), chosen) for known, (total, chosen) in states.items()
        )
        following: dict[Choice, tuple[float, Choice]] = {}
        for known, (total, chosen) in states.items():
            for step in range(known[-1] + 1, steps):
                state = (*known, step)[-order - 1 :]
                found = (total + until(known, step), (*chosen, step))
                following[state] = min(following.get(state, found), found)
        states = following
    return choices


def calibrate(
    pipeline: Any,
    clip: Clip,
    *,
    steps: int = 20,
    floor: float = 40.0,
    branch: int = 0,
    predictor: str = "linear",
    max_frames: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Calibration:
    """Find the fewest computed steps whose mouth PSNR on a clip is at least the floor.

    Args:
        pipeline: plain; it is left as it was.
        clip: what to run.
        steps: denoising steps a chunk.
        floor: dB against the same run with all steps computed.
        branch, predictor: as the options.
        max_frames: of the clip.
        options: further ones to compile with, such as the lowering.
        progress: for the name of a run, what to call with the steps done and their total.

    Raises:
        OptionError: the UNet cannot be cut, or not even all steps but one reach the floor.
        LsyncError: whatever the pipeline raises.
    """
    common = {
        "preset": "exact",
        "compile_vae": False,
        **(options or {}),
        "deep_cache": True,
        "deep_cache_branch": branch,
        "deep_cache_predictor": predictor,
    }

    def run(name: str, computed: Choice, beside: Any = None) -> tuple[Any, Any]:
        fast = lsync_compile.compile(pipeline, **common, deep_cache_steps=computed)
        made = collect(
            fast,
            clip.video,
            clip.audio,
            Setting(name, steps=steps),
            max_frames=max_frames,
            beside=beside,
            progress=progress(name) if progress else None,
        )
        return fast, made

    try:
        sample = FeatureSample()
        with observing(sample):
            fast, reference = run("all steps", tuple(range(steps)))
        caches = [graph.deep_cache for graph in fast.lsync.report().graphs if graph.deep_cache]
        refused = [cache.reason for cache in caches if cache.reason]
        if refused or not sample.features:
            reason = refused[0] if refused else "no features were seen"
            raise OptionError(f"deep features cannot be reused: {reason}")
        choices = best_choices(steps, PREDICTORS[predictor], sample.error)

        def quality(computed: Choice) -> float:
            _, made = run(f"{len(computed)} of {steps} steps", computed, reference)
            return float(compare_runs(made, reference)["mouth"].psnr.value)

        count, psnr = _fewest(steps, floor, lambda number: quality(choices[number]))
    finally:
        lsync_compile.compile(pipeline, **common).lsync.undo()
    return Calibration(
        steps=steps,
        branch=branch,
        predictor=predictor,
        computed=choices[count],
        mouth_psnr=round(psnr, 2),
        floor=floor,
        clip=clip.video.name,
        frames=len(reference),
    )


def _fewest(steps: int, floor: float, quality: Callable[[int], float]) -> tuple[int, float]:
    """The smallest number of computed steps above the floor, by bisection, and its quality.

    Raises:
        OptionError: all numbers below ``steps`` are under the floor.
    """
    low, high, found = 1, steps - 1, None
    while low <= high:
        middle = (low + high) // 2
        psnr = quality(middle)
        if psnr >= floor:
            found, high = (middle, psnr), middle - 1
        else:
            low = middle + 1
    if found is None:
        raise OptionError(
            f"no schedule reaches {floor:g} dB: lower the floor, or leave deep_cache off"
        )
    return found
