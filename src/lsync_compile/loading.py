"""A pipeline that is loaded and compiled once and then runs many clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lsync_compile.devices import DType, choose_device, choose_dtype


def load_compiled(
    checkpoint: str | Path = "mini",
    *,
    preset: str = "balanced",
    lowering: str | None = None,
    device: str | None = None,
    dtype: DType | None = None,
    detector: str = "mtcnn",
    resolution: int | None = None,
) -> Any:
    """Load a checkpoint and compile it.

    Args:
        checkpoint: ``"mini"`` or the folder of a LatentSync 1.5/1.6 checkpoint.
        preset: ``"exact"``, ``"balanced"`` or ``"turbo"``.
        lowering: ``"inductor"`` or ``"eager"``; by the device for None.
        device: the first GPU, else the CPU, for None.
        dtype: half precision on a GPU and float32 on a CPU for None.
        detector: ``"mtcnn"`` or ``"insightface"``.
        resolution: side of the face in pixels, for checkpoints in which nothing says so.

    Returns:
        a compiled :class:`~lsync_compile.LatentSyncPipeline`.

    Raises:
        OptionError, CheckpointError: one line each.
    """
    import lsync_compile

    place = choose_device(device)
    pipeline = load_plain(checkpoint, place, dtype=dtype, detector=detector, resolution=resolution)
    return lsync_compile.compile(
        pipeline, preset=preset, lowering=lowering or usual_lowering(place)
    )


def load_plain(
    checkpoint: str | Path,
    place: Any,
    *,
    dtype: DType | None = None,
    detector: str = "mtcnn",
    resolution: int | None = None,
) -> Any:
    """Load a checkpoint onto a torch device and compile nothing; arguments as above.

    Raises:
        OptionError, CheckpointError: one line each.
    """
    import lsync_compile

    return lsync_compile.LatentSyncPipeline.from_pretrained(
        checkpoint,
        torch_dtype=choose_dtype(dtype, place),
        device=place,
        detector=detector,
        resolution=resolution,
    )


def usual_lowering(device: Any) -> str:
    """What runs a compiled graph on a device where nothing else is asked for."""
    # Inductor's C++ takes minutes on a CPU, more than it saves on one clip.
    return "inductor" if device.type == "cuda" else "eager"
