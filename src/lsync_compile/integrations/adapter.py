"""What is known of a pipeline that is not ours, and what of the runtime reaches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lsync_compile.options import Options
from lsync_compile.report import Session
from lsync_compile.runtime.step_tracker import StepTracker

_OWN_LOOP = "the pipeline's own loop decides how each chunk is denoised"
_OWN_FRAMES = "the pipeline's own code reads, cuts and pastes frames"
_NO_MASK = "the pipeline has no mask that says what is generated"

# What only LatentSyncPipeline's own loop carries out, by option, and why or what instead.
OWN_LOOP_ONLY: Mapping[str, str] = {
    "few_steps": f"{_OWN_LOOP}; ask for fewer num_inference_steps in the call",
    "solver": f"{_OWN_LOOP}; set the pipeline's scheduler",
    "guided_steps": _OWN_LOOP,
    "adaptive_steps": _OWN_LOOP,
    "temporal_start": _OWN_LOOP,
    "batch_chunks": _OWN_LOOP,
    "guard_every": _OWN_LOOP,
    "parallel_stages": _OWN_FRAMES,
    "batch_faces": _OWN_FRAMES,
    "face_tolerance": _OWN_FRAMES,
    "track_faces": _OWN_FRAMES,
    "clip_cache": _OWN_FRAMES,
    "trace": _OWN_FRAMES,
    "crop_encode": "the pipeline's own loop encodes masked and plain faces apart",
    "lip_attention": _NO_MASK,
    "crop_decode": _NO_MASK,
}


def _nothing_vouched(pipeline: Any, sample: Tensor, sound: Tensor | None) -> frozenset[str]:
    return frozenset()


def _no_mask(pipeline: Any) -> Tensor | None:
    return None


def _nothing_around(pipeline: Any, session: Session) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Adapter:
    """How lsync's runtime reaches a kind of pipeline whose loop is its own.

    Attributes:
        name: what the report calls the kind.
        fits: whether a pipeline is of this kind.
        vouch: what of a UNet call's inputs follows from the kind's loop, see ``VOUCHES``;
            arguments are the pipeline, ``sample`` and ``encoder_hidden_states``.
        mask: of a pipeline in a run, (1, R, R), 1 where the picture is kept; None for none.
        around: set around a run: ``(pipeline, session) -> context``.
        carries_out: options of :data:`OWN_LOOP_ONLY` that do work here.
    """

    name: str
    fits: Callable[[Any], bool]
    vouch: Callable[[Any, Tensor, Tensor | None], frozenset[str]] = _nothing_vouched
    mask: Callable[[Any], Tensor | None] = _no_mask
    around: Callable[[Any, Session], AbstractContextManager[None]] = _nothing_around
    carries_out: frozenset[str] = frozenset()

    def tracker(self, pipeline: Any, session: Session) -> StepTracker:
        """What follows one run of the pipeline."""
        return StepTracker(
            lambda: pipeline.scheduler,
            session,
            vouch=lambda sample, sound: self.vouch(pipeline, sample, sound),
            mask=lambda: self.mask(pipeline),
        )

    def without_effect(self, options: Options) -> list[str]:
        """One line for each option that was asked for and does nothing here."""
        defaults = Options(preset=options.preset)
        return [
            f"option {name} does nothing on a {self.name}: {reason}"
            for name, reason in OWN_LOOP_ONLY.items()
            if name not in self.carries_out
            and getattr(options, name) not in (getattr(defaults, name), "off")
        ]
