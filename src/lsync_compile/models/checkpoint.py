"""Find and load the parts of a checkpoint folder.

Two layouts are known. A *LatentSync* folder holds what LatentSync 1.5 and 1.6 are released as::

    latentsync_unet.pt                   the UNet (or .safetensors)
    whisper/tiny.pt                      for 384 sound features; small.pt for 768
    vae/ or sd-vae-ft-mse/               Stable Diffusion's VAE in diffusers format
    *.yaml or configs/unet/*.yaml        optional: the UNet's configuration and the resolution
    mask.png                             optional

Weights may also lie in ``checkpoints/``, so a clone of LatentSync's repository is such a folder.
A *mini* folder is what lsync-compile trains and bundles: ``mini.json``, ``unet.json``,
``unet.safetensors``, ``vae/``, ``audio.json``, ``audio.safetensors``.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lsync_compile.errors import CheckpointError

from .audio import AudioEncoder
from .config import (
    LATENT_SCALE,
    LATENTSYNC_UNET,
    YamlConfig,
    check_resolution,
    read_unet_config,
    read_yaml,
)
from .mel_encoder import MelAudioEncoder
from .unet import UNet3DConditionModel
from .weights import build, check_layers, configured_by, describe_misfit, read_state_dict
from .whisper import WhisperAudioEncoder

__all__ = [
    "Checkpoint",
    "load_audio_encoder",
    "load_unet",
    "load_vae",
    "read_unet_config",
    "resolve_checkpoint",
]

logger = logging.getLogger(__name__)

MINI = Path(__file__).parents[1] / "assets" / "mini"
LATENTSYNC_RESOLUTION = 512  # of LatentSync 1.6, where nothing says otherwise
VAE_SCALING = 0.18215  # what LatentSync's UNet was trained with
_WHISPER = {384: "tiny", 768: "small"}
_WEIGHT_SUFFIXES = (".pt", ".safetensors")
_VAE_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_VAE_FOLDERS = ("vae", "sd-vae-ft-mse")
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint, all of which exist, and how the UNet is configured.

    ``unet_config["sample_size"]`` is ``resolution // 8``. ``audio_path`` is a file or folder for
    `WhisperAudioEncoder`, or a folder for `MelAudioEncoder` when ``audio_kind`` is ``"mel"``.
    ``vae_scaling`` replaces the scaling factor of the VAE's own configuration where given.
    """

    folder: Path
    unet_file: Path
    unet_config: dict[str, Any]
    vae_folder: Path
    audio_path: Path
    audio_kind: str
    mask_file: Path | None
    resolution: int
    num_frames: int = 16
    vae_scaling: float | None = None


def resolve_checkpoint(name_or_folder: str | Path, *, resolution: int | None = None) -> Checkpoint:
    """Find the files of ``"mini"`` or of a checkpoint folder.

    The weights of LatentSync 1.5 (256 pixels) and 1.6 (512 pixels) have the same names and
    shapes: only a YAML file beside them, or ``resolution``, can tell which they are. With neither
    they are taken for 1.6 and a warning is logged.

    Args:
        name_or_folder: ``"mini"`` or a folder.
        resolution: side of the face in pixels; an error if the folder says otherwise.

    Raises:
        CheckpointError: a file is missing (the message names all places that were looked at), or
            two files, or a file and ``resolution``, contradict each other.
    """
    folder = MINI if str(name_or_folder) == "mini" else Path(name_or_folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise CheckpointError(
            f"checkpoint {folder}: {what}; give 'mini' or a folder with latentsync_unet.pt"
        )
    if resolution is not None:
        check_resolution(resolution, "resolution")
    if (folder / "mini.json").is_file():
        return _resolve_mini(folder, resolution)
    return _resolve_latentsync(folder, resolution)


def load_unet(
    path: str | Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    config_file: Path | None = None,
) -> UNet3DConditionModel:
    """Load the UNet from a ``.pt`` or ``.safetensors`` file, without a second copy in memory.

    Raises:
        CheckpointError: the file cannot be read, or its entries do not fit ``config``: the first
            missing and the first unexpected name with their counts, or the first wrong shape; or
            no UNet can be made of ``config``, which ``config_file`` is named for.
    """
    path = Path(path)
    check_layers(config, config_file or path)
    unet: UNet3DConditionModel = build(
        lambda: UNet3DConditionModel.from_config(config),
        read_state_dict(path),
        dtype=dtype,
        source=path,
        config=config_file,
        hint=_unet_hint,
    )
    return unet


def load_vae(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Load the VAE, its latents scaled as the UNet expects them and not shifted.

    Raises:
        CheckpointError: a file cannot be read or does not fit the VAE's ``config.json``.
    """
    folder = checkpoint.vae_folder
    config_file = folder / "config.json"
    config = _read_json(config_file)
    check_layers(config, config_file)
    config["shift_factor"] = config.get("shift_factor") or 0.0
    if checkpoint.vae_scaling is not None:
        config["scaling_factor"] = checkpoint.vae_scaling
    path = _first_file(folder, _VAE_WEIGHTS, "the VAE's weights")
    state = {_modern_vae_name(name): value for name, value in read_state_dict(path).items()}
    vae = build(
        lambda: AutoencoderKL.from_config(config),
        state,
        dtype=dtype,
        source=path,
        config=config_file,
    )
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    if scale != LATENT_SCALE or vae.config.latent_channels != 4:
        raise CheckpointError(
            f"{folder}: has {vae.config.latent_channels} latent channels at 1/{scale} of the "
            f"resolution; LatentSync needs 4 at 1/{LATENT_SCALE}"
        )
    return vae


def load_audio_encoder(checkpoint: Checkpoint) -> AudioEncoder:
    """Load the encoder of sound, in fp32.

    Raises:
        CheckpointError: a file cannot be read, or the features do not fit the UNet.
    """
    encoder: AudioEncoder
    if checkpoint.audio_kind == "mel":
        encoder = MelAudioEncoder.from_pretrained(checkpoint.audio_path)
    else:
        encoder = WhisperAudioEncoder.from_pretrained(checkpoint.audio_path)
    wanted = checkpoint.unet_config.get("cross_attention_dim")
    if encoder.feature_dim != wanted:
        raise CheckpointError(
            f"{checkpoint.audio_path}: gives {encoder.feature_dim} features, but "
            f"{checkpoint.unet_file.name} attends to {wanted} (cross_attention_dim)"
        )
    return encoder


def _resolve_mini(folder: Path, resolution: int | None) -> Checkpoint:
    mini = folder / "mini.json"
    description = _read_json(mini)
    found = description.get("resolution")
    check_resolution(found, f"{mini}: resolution")
    assert isinstance(found, int)
    config = _read_json(_first_file(folder, ("unet.json",), "the UNet's configuration"))
    if config.get("sample_size") != found // LATENT_SCALE:
        raise CheckpointError(
            f"{mini}: resolution {found} contradicts sample_size {config.get('sample_size')} of "
            f"unet.json, which is made for {LATENT_SCALE} times as many pixels"
        )
    _agree(resolution, found, mini)
    mask = description.get("mask")
    return Checkpoint(
        folder=folder,
        unet_file=_first_file(folder, ("unet.safetensors",), "the UNet's weights"),
        unet_config=config,
        vae_folder=_first_file(folder, ("vae/config.json",), "the VAE").parent,
        audio_path=_first_file(folder, ("audio.json",), "the audio encoder").parent,
        audio_kind="mel",
        mask_file=_first_file(folder, (str(mask),), "the mouth mask") if mask else None,
        resolution=found,
    )


def _resolve_latentsync(folder: Path, resolution: int | None) -> Checkpoint:
    roots = ("", "checkpoints/")
    unet_file = _first_file(
        folder,
        [f"{root}latentsync_unet{suffix}" for root in roots for suffix in _WEIGHT_SUFFIXES],
        "the UNet's weights",
    )
    state = read_state_dict(unet_file)
    found = _choose_yaml(folder, state, unet_file, resolution)
    if found is not None:
        config, resolution, num_frames = found.unet, found.resolution, found.num_frames
    else:
        if resolution is None:
            resolution = LATENTSYNC_RESOLUTION
            logger.warning(
                "%s: no YAML file says for which resolution it was trained; taking %d "
                "(LatentSync 1.6). For LatentSync 1.5 pass resolution=256 or add its YAML file.",
                unet_file,
                resolution,
            )
        config = _config_from_weights(state) | {"sample_size": resolution // LATENT_SCALE}
        num_frames = 16

    features = config["cross_attention_dim"]
    if features not in _WHISPER:
        raise CheckpointError(
            f"{unet_file}: attends to {features} sound features; Whisper gives 384 (tiny) or 768 "
            "(small)"
        )
    size = _WHISPER[features]
    audio = _first_file(
        folder,
        [f"{root}whisper/{name}" for root in roots for name in (f"{size}.pt", "config.json")],
        f"Whisper ({size})",
    )
    vae = _first_file(
        folder,
        [f"{root}{name}/config.json" for root in roots for name in _VAE_FOLDERS],
        "the VAE (stabilityai/sd-vae-ft-mse in diffusers format)",
    )
    return Checkpoint(
        folder=folder,
        unet_file=unet_file,
        unet_config=config,
        vae_folder=vae.parent,
        audio_path=audio.parent if audio.name == "config.json" else audio,
        audio_kind="whisper",
        mask_file=_find_mask(folder, found),
        resolution=resolution,
        num_frames=num_frames,
        vae_scaling=VAE_SCALING,
    )


def _choose_yaml(
    folder: Path, state: dict[str, Tensor], unet_file: Path, resolution: int | None
) -> YamlConfig | None:
    """The YAML file that the weights fit, or none if there is no YAML file for a UNet."""
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("configs/unet/*.yaml"))]
    configs = [config for config in map(read_yaml, paths) if config is not None]
    if not configs:
        return None
    misfits = [_misfit(config, state) for config in configs]
    fitting = [c for c, misfit in zip(configs, misfits, strict=True) if misfit is None]
    if not fitting:
        raise CheckpointError(
            f"{unet_file}: does not fit {configs[0].path}: {misfits[0]}"
            + _unet_hint(misfits[0] or "")
        )
    if resolution is not None and any(c.resolution == resolution for c in fitting):
        fitting = [c for c in fitting if c.resolution == resolution]
    if len({c.resolution for c in fitting}) > 1:
        choices = ", ".join(f"{c.path.name} ({c.resolution})" for c in fitting)
        raise CheckpointError(
            f"{unet_file}: fits several YAML files of different resolution: {choices}; "
            "the weights do not tell, so keep one of them or pass resolution="
        )
    _agree(resolution, fitting[0].resolution, fitting[0].path)
    return fitting[0]


def _misfit(config: YamlConfig, state: dict[str, Tensor]) -> str | None:
    check_layers(config.unet, config.path)
    with configured_by(config.path), torch.device("meta"):
        unet = UNet3DConditionModel.from_config(config.unet)
    return describe_misfit(unet.state_dict(), state)


def _config_from_weights(state: dict[str, Tensor]) -> dict[str, Any]:
    """LatentSync's configuration, with what the shapes can tell taken from them."""
    config = dict(LATENTSYNC_UNET)
    if "conv_in.weight" in state:
        config["in_channels"] = state["conv_in.weight"].shape[1]
    keys = [name for name in state if name.endswith("attn2.to_k.weight")]
    config["add_audio_layer"] = bool(keys)
    if keys:
        config["cross_attention_dim"] = state[keys[0]].shape[1]
    config["use_motion_module"] = any(".motion_modules." in name for name in state)
    return config


def _agree(wanted: int | None, found: int, source: Path) -> None:
    if wanted is not None and wanted != found:
        raise CheckpointError(
            f"resolution={wanted}: the checkpoint is for {found} according to {source}; leave "
            "resolution out or use the other checkpoint"
        )


def _find_mask(folder: Path, config: YamlConfig | None) -> Path | None:
    """The mask of the folder, or none for the bundled one (which has the extent of mask.png)."""
    if (folder / "mask.png").is_file():
        return folder / "mask.png"
    if config is None or config.mask_image_path is None:
        return None
    named = folder / config.mask_image_path
    if named.is_file():
        return named
    if named.name == "mask.png":
        return None
    raise CheckpointError(
        f"{config.path}: data.mask_image_path {config.mask_image_path} is not in {folder}; put "
        "the file there or name it mask.png"
    )


def _first_file(folder: Path, names: list[str] | tuple[str, ...], what: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: {what} not found; looked for {', '.join(names)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


def _modern_vae_name(name: str) -> str:
    """Names of attention weights in VAEs that were saved before diffusers 0.12."""
    for old, new in _VAE_ATTENTION.items():
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def _unet_hint(misfit: str) -> str:
    if "attn2.to_k" in misfit or "attn2.to_v" in misfit:
        return "; cross_attention_dim is 384 for Whisper tiny and 768 for small"
    if "conv_in.weight" in misfit:
        return "; check in_channels"
    if ".motion_modules." in misfit:
        return "; check use_motion_module"
    return ""
