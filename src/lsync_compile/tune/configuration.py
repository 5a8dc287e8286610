"""Files of options: what ``lsync tune`` writes, and ``lsync sync --config`` and ``bench`` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lsync_compile.errors import OptionError
from lsync_compile.files import write_whole
from lsync_compile.options import resolve_options


def read_configuration(path: Path) -> dict[str, Any]:
    """Options from a file ``{"options": {...}}``; what else is in it is for people.

    Raises:
        OptionError: the file cannot be read, is no such object, or names unknown options.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: is no JSON: {error}") from error
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise OptionError(f'{path}: expected {{"options": {{...}}}} as `lsync tune` writes it')
    try:
        resolve_options(options=options)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
    return options


def write_configuration(path: Path, options: Mapping[str, Any], **about: Any) -> None:
    """Write options and what is known of them; an existing file is replaced by a whole one only.

    Raises:
        MediaError: the folder is missing or cannot be written to.
    """
    text = json.dumps({"options": dict(options), **about}, indent=2, allow_nan=False) + "\n"
    write_whole(path, text)


@dataclass(frozen=True)
class Conditions:
    """What options were measured with, and what decides whether that holds for a run.

    Attributes:
        checkpoint: hash of the UNet's weights.
        device: its name.
        dtype: of the UNet.
        lowering: what ran the graphs.
        steps: denoising steps of a call; options count in shares of them.
        num_frames: a chunk.
        resolution: side of the face in pixels.
        torch: its version.
        lsync_compile: the version of this package.
    """

    checkpoint: str
    device: str
    dtype: str
    lowering: str
    steps: int
    num_frames: int
    resolution: int
    torch: str
    lsync_compile: str


# What is not there any more where it differs.
_SPEED = ("device", "lowering", "torch", "lsync_compile", "num_frames", "steps", "resolution")
_QUALITY = ("checkpoint", "dtype", "num_frames", "steps", "resolution")


def conditions_of(pipeline: Any, *, lowering: str, steps: int, num_frames: int) -> Conditions:
    """Those of a run of a pipeline."""
    from lsync_compile.quality.compare import describe_machine
    from lsync_compile.runtime.calibration import fingerprint

    machine = describe_machine(pipeline)
    return Conditions(
        checkpoint=fingerprint(pipeline.unet),
        lowering=lowering,
        steps=steps,
        num_frames=num_frames,
        resolution=pipeline.resolution,
        **{name: machine[name] for name in ("device", "dtype", "torch", "lsync_compile")},
    )


def read_conditions(path: Path) -> dict[str, Any]:
    """The conditions in a file of options; empty where nothing is said of them."""
    found = json.loads(path.read_text(encoding="utf-8")).get("conditions")
    return found if isinstance(found, dict) else {}


def misfits(measured: Mapping[str, Any], here: Conditions) -> list[str]:
    """A line for each condition that differs, with what it means; none where all is as it was.

    Args:
        measured: from :func:`read_conditions`.
        here: of the run.
    """
    lines = []
    for name, value in asdict(here).items():
        if name not in measured or measured[name] == value:
            continue
        lost = [word for word, names in (("quality", _QUALITY), ("speed", _SPEED)) if name in names]
        was, is_now = ("another", "this one") if name == "checkpoint" else (measured[name], value)
        lines.append(
            f"{name.replace('_', ' ')}: measured with {was}, run with {is_now}; "
            f"{' and '.join(lost)} may differ"
        )
    return lines
