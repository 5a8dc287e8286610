"""Schedules that were measured for one checkpoint, in the user's cache folder.

``lsync calibrate`` writes them (:mod:`lsync_compile.quality.calibrate`), the option
``deep_cache_schedule="calibrated"`` reads them. A checkpoint is known by its weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsync_compile.errors import MediaError
from lsync_compile.files import locked, replaced
from lsync_compile.runtime.cache_folder import cache_folder

log = logging.getLogger(__name__)

SAMPLES = 16  # values of each weight that tell one checkpoint from another
VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Which steps compute deep features, found on a clip.

    Attributes:
        steps: denoising steps a chunk.
        branch, predictor: as the options ``deep_cache_branch`` and ``deep_cache_predictor``.
        computed: the steps that compute, from 0, in order.
        mouth_psnr: dB against the same run with all steps computed, on the clip.
        floor: dB that were asked for.
        clip: the clip's file name.
        frames: how many of its frames.
    """

    steps: int
    branch: int
    predictor: str
    computed: tuple[int, ...]
    mouth_psnr: float
    floor: float
    clip: str
    frames: int

    @property
    def key(self) -> tuple[int, int, str]:
        """What there is one calibration for."""
        return self.steps, self.branch, self.predictor


def calibration_file(unet: nn.Module) -> Path:
    """Where a UNet's calibrations are, whether or not there are any."""
    return cache_folder() / "calibrations" / f"{fingerprint(unet)}.json"


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Hex digest that tells the weights of modules apart, the same in all number formats.

    Of each weight the name, the shape and a few values as float16: a checkpoint in half precision
    loaded in float32 is the same.
    """
    digest, values = hashlib.sha256(), []
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        values.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].half())
    if values:
        digest.update(torch.cat(values).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def load_calibrations(unet: nn.Module) -> dict[tuple[int, int, str], Calibration]:
    """All calibrations of a UNet by :attr:`Calibration.key`.

    A file of another version has none, and a damaged one neither, which the log says.
    """
    return _read(calibration_file(unet))


def _read(path: Path) -> dict[tuple[int, int, str], Calibration]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return {}
        found = [_checked(each) for each in content["calibrations"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s: its calibrations cannot be read and are not used: %s", path, error)
        return {}
    return {each.key: each for each in found}


def save_calibration(unet: nn.Module, calibration: Calibration) -> Path:
    """File a calibration in place of the one of the same key; returns the file.

    Processes that do so at the same time take turns, so that none loses what another found.

    Raises:
        MediaError: the cache folder cannot be written to.
    """
    path = calibration_file(unet)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            known = {**_read(path), calibration.key: calibration}
            rows = [asdict(known[key]) for key in sorted(known)]
            with replaced(path) as partial:  # at once: another process may be reading
                partial.write_text(json.dumps({"version": VERSION, "calibrations": rows}, indent=1))
    except OSError as error:
        raise MediaError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _checked(values: dict[str, Any]) -> Calibration:
    """One entry of a file.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    found = Calibration(**{**values, "computed": tuple(values["computed"])})
    whole = (found.steps, found.branch, found.frames, *found.computed)
    numbers = (found.mouth_psnr, found.floor)
    if (
        any(type(each) is not int or each < 0 for each in whole)
        or any(type(each) not in (int, float) for each in numbers)
        or not (isinstance(found.predictor, str) and isinstance(found.clip, str))
        or not found.computed
        or max(found.computed) >= found.steps
    ):
        raise ValueError(f"no calibration: {values}")
    return found
