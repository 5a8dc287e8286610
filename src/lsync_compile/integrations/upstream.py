"""The pipeline of LatentSync's own repository, and those that keep its layout.

Its ``__call__`` is its own loop: it reads the clip, aligns each frame, then encodes, denoises and
decodes chunk by chunk, and pastes the faces back. The networks in it run compiled, the tracker
tells in which chunk and step. What else is known of that loop: the latents of all frames are one
batch, doubled for guidance with the half without sound first, and zeros stand for no sound; of the
sample's channels all but the latents' are conditions of the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lsync_compile.integrations.adapter import Adapter
from lsync_compile.report import Session

_METHODS = ("affine_transform_video", "prepare_mask_latents", "prepare_image_latents")


def fits(pipeline: Any) -> bool:
    """Whether a pipeline is laid out as that of LatentSync's repository."""
    return hasattr(pipeline, "audio_encoder") and all(
        callable(getattr(pipeline, name, None)) for name in _METHODS
    )


def vouch(pipeline: Any, sample: Tensor, sound: Tensor | None) -> frozenset[str]:
    """See the module; a single clip, so that a batch of two is a guided one."""
    expected = set()
    if sample.dim() == 5 and pipeline.vae.config.latent_channels == 4 < sample.shape[1]:
        expected.add("constant_channels")
    if len(sample) == 2:
        expected.add("guidance")
        if sound is not None:
            expected.add("null_audio")
    return frozenset(expected)


def mask(pipeline: Any) -> Tensor | None:
    """(1, R, R), 1 where the picture is kept; the pipeline makes it anew in each run."""
    picture = getattr(getattr(pipeline, "image_processor", None), "mask_image", None)
    return picture[:1].float() if isinstance(picture, Tensor) else None


class _AsDetector:
    """A detector of that repository, ``(frame) -> anything``, under our detectors' method."""

    def __init__(self, detector: Any) -> None:
        self.detect = detector


class _SearchesOnce:
    """Takes the place of the image processor's detector in a run; frames may be given again."""

    def __init__(self, detector: Any) -> None:
        from lsync_compile.runtime.face_cache import CachedFaceDetector  # brings OpenCV along

        self.known = CachedFaceDetector(_AsDetector(detector))
        self._detector = detector

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # with other thresholds the answer may be another
            return self._detector(frame, *args, **kwargs)
        return self.known.detect(frame)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)


@contextmanager
def around(pipeline: Any, session: Session) -> Iterator[None]:
    """Search equal frames for a face once; the smoothing after it sees each frame, as always.

    The image processor is made in each run, after which the frames go through
    ``affine_transform_video``. The method is exchanged on the object, for this run alone.
    """
    if not session.options.face_cache or "affine_transform_video" in vars(pipeline):
        yield
        return
    align = pipeline.affine_transform_video

    def aligned(*args: Any, **kwargs: Any) -> Any:
        processor = getattr(pipeline, "image_processor", None)
        detector = getattr(processor, "face_detector", None)
        if detector is None:
            return align(*args, **kwargs)
        once = _SearchesOnce(detector)
        processor.face_detector = once  # type: ignore[union-attr]
        try:
            return align(*args, **kwargs)
        finally:
            processor.face_detector = detector  # type: ignore[union-attr]
            counts = once.known.counts
            session.count(
                "face cache", frames=counts.frames, exact=counts.exact, searched=counts.searched
            )

    vars(pipeline)["affine_transform_video"] = aligned
    try:
        yield
    finally:
        vars(pipeline).pop("affine_transform_video", None)


UPSTREAM = Adapter(
    "LatentSync repository's pipeline",
    fits,
    vouch=vouch,
    mask=mask,
    around=around,
    carries_out=frozenset({"lip_attention", "crop_decode"}),
)
