"""Read LatentSync's YAML files: the UNet's configuration and what it was trained on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lsync_compile.errors import CheckpointError

from .unet import UNet3DConditionModel

LATENT_SCALE = 8  # pixels to a latent, along each side
_MOST_PIXELS = 8192  # along a side of the face; a larger number is no resolution

LATENTSYNC_UNET: dict[str, Any] = {
    "in_channels": 13,
    "out_channels": 4,
    "cross_attention_dim": 384,
    "add_audio_layer": True,
    "use_motion_module": True,
    "motion_module_type": "Vanilla",
    "motion_module_kwargs": {
        "num_attention_heads": 8,
        "num_transformer_block": 1,
        "attention_block_types": ["Temporal_Self", "Temporal_Self"],
        "temporal_position_encoding": True,
        "temporal_position_encoding_max_len": 24,
        "temporal_attention_dim_div": 1,
        "zero_initialize": True,
    },
}
"""LatentSync 1.5 and 1.6, where it differs from the defaults of `UNet3DConditionModel`."""

# Switches of the original that no release uses. Off they mean nothing, on they are not supported.
_UNUSED: dict[str, Any] = {
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "use_inflated_groupnorm": False,
}
_KNOWN = frozenset(inspect.signature(UNet3DConditionModel.__init__).parameters) - {"self"}
_FLOATS = ("norm_eps", "mid_block_scale_factor")


@dataclass(frozen=True)
class YamlConfig:
    """What one of LatentSync's YAML files says.

    ``unet`` is ready for `UNet3DConditionModel`; ``resolution`` is the side of the face in pixels,
    ``mask_image_path`` as written in the file.
    """

    path: Path
    unet: dict[str, Any]
    resolution: int
    num_frames: int
    mask_image_path: str | None


def read_yaml(path: Path) -> YamlConfig | None:
    """Read a YAML file with the sections ``model`` and ``data``; none if it has no ``model``.

    LatentSync's files say ``sample_size: 64`` whatever the resolution, so ``sample_size`` is set
    from ``data.resolution`` here.

    Raises:
        CheckpointError: the file cannot be parsed, has an unknown or unsupported key, or no
            usable resolution.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be read as YAML ({reason})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return None
    data = content.get("data")
    data = data if isinstance(data, dict) else {}
    resolution = data.get("resolution")
    if resolution is None:
        sample_size = content["model"].get("sample_size")
        if not isinstance(sample_size, int):
            raise CheckpointError(f"{path}: neither data.resolution nor model.sample_size is set")
        resolution = sample_size * LATENT_SCALE
    check_resolution(resolution, f"{path}: data.resolution")
    mask = data.get("mask_image_path")
    return YamlConfig(
        path=path,
        unet=_unet_config(content["model"], path) | {"sample_size": resolution // LATENT_SCALE},
        resolution=resolution,
        num_frames=_positive(data.get("num_frames", 16), f"{path}: data.num_frames"),
        mask_image_path=None if mask is None else str(mask),
    )


def read_unet_config(yaml_path: str | Path) -> dict[str, Any]:
    """The UNet's configuration in one of LatentSync's YAML files (its section ``model``).

    ``sample_size`` is that of ``data.resolution``.

    Raises:
        CheckpointError: as `read_yaml`, or the file has no such section.
    """
    config = read_yaml(Path(yaml_path))
    if config is None:
        raise CheckpointError(f"{yaml_path}: has no section 'model'")
    return config.unet


def check_resolution(resolution: Any, name: str) -> None:
    """Raise CheckpointError unless ``resolution`` is a positive multiple of 8, 8192 at most."""
    whole = isinstance(resolution, int) and not isinstance(resolution, bool)
    if not whole or resolution % LATENT_SCALE or not 0 < resolution <= _MOST_PIXELS:
        raise CheckpointError(
            f"{name}: {resolution!r} is not a positive multiple of {LATENT_SCALE} "
            f"up to {_MOST_PIXELS}"
        )


def _positive(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{name}: {value!r} is not a positive whole number")
    return value


def _unet_config(model: dict[str, Any], path: Path) -> dict[str, Any]:
    config = {}
    for key, value in model.items():
        if key in _KNOWN:
            # YAML 1.1 takes `1e-5` for a string.
            config[key] = float(value) if key in _FLOATS else value
        elif key not in _UNUSED:
            raise CheckpointError(f"{path}: model.{key} is unknown")
        elif value != _UNUSED[key]:
            raise CheckpointError(f"{path}: model.{key}: {value!r} is not supported")
    return config
