"""Checkpoint folders: both layouts, what is missing and what contradicts itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from whisper_files import random_weights, write_openai

from lsync_compile.errors import CheckpointError
from lsync_compile.models.checkpoint import (
    load_audio_encoder,
    load_unet,
    load_vae,
    read_unet_config,
    resolve_checkpoint,
)
from lsync_compile.models.mel_encoder import MelAudioEncoder
from lsync_compile.models.unet import UNet3DConditionModel
from lsync_compile.models.whisper import WhisperAudioEncoder

MODEL: dict[str, Any] = {
    "sample_size": 64,  # as in LatentSync's files, whatever the resolution
    "in_channels": 13,
    "out_channels": 4,
    "block_out_channels": [16, 16],
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    "mid_block_type": "UNetMidBlock3DCrossAttn",
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 384,
    "add_audio_layer": True,
    "use_motion_module": True,
    "motion_module_type": "Vanilla",
    "motion_module_kwargs": {"num_attention_heads": 2, "num_transformer_block": 1},
}
YAML_TEXT = "  norm_eps: 1e-5\n  upcast_attention: false\n"


def write_yaml(path: Path, *, resolution: int = 256, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "resolution": resolution,
        "num_frames": 16,
        "mask_image_path": "latentsync/utils/mask.png",
    }
    text = yaml.safe_dump({"data": data}) + yaml.safe_dump({"model": MODEL | changes})
    path.write_text(text + YAML_TEXT)
    return path


def make_unet(**changes: Any) -> UNet3DConditionModel:
    torch.manual_seed(0)
    return UNet3DConditionModel.from_config(MODEL | changes)


def write_vae(folder: Path, *, blocks: int = 4) -> None:
    vae = AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.5,
    )
    vae.save_pretrained(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts that take long to make."""
    folder = tmp_path_factory.mktemp("parts")
    write_openai(folder / "whisper" / "tiny.pt", random_weights(20, width=384))
    write_vae(folder / "vae")
    return folder


@pytest.fixture
def latentsync(tmp_path: Path, parts: Path) -> Callable[..., Path]:
    """A function that makes a LatentSync folder, leaving out what is asked."""

    def make(
        *, without: tuple[str, ...] = (), vae: str = "vae", inside: str = "", **changes: Any
    ) -> Path:
        folder = tmp_path / "checkpoint"
        weights = folder / inside
        weights.mkdir(parents=True)
        state = {f"module.{n}": v for n, v in make_unet(**changes).state_dict().items()}
        torch.save({"global_step": 1, "state_dict": state}, weights / "latentsync_unet.pt")
        (weights / "whisper").symlink_to(parts / "whisper")
        (weights / vae).symlink_to(parts / "vae")
        write_yaml(folder / "stage2.yaml", **changes)
        for name in without:
            (folder / name).unlink()
        return folder

    return make


@pytest.fixture
def mini(tmp_path: Path, parts: Path) -> Path:
    folder = tmp_path / "mini"
    folder.mkdir()
    unet = make_unet(sample_size=32)
    save_file({n: v.half() for n, v in unet.state_dict().items()}, folder / "unet.safetensors")
    (folder / "unet.json").write_text(json.dumps(dict(unet.config)))
    (folder / "vae").symlink_to(parts / "vae")
    MelAudioEncoder(width=16).save_pretrained(folder)
    (folder / "mini.json").write_text(json.dumps({"version": 1, "resolution": 256, "mask": None}))
    return folder


def test_a_latentsync_folder_is_found_and_loaded(latentsync: Callable[..., Path]) -> None:
    folder = latentsync()
    checkpoint = resolve_checkpoint(folder)
    assert checkpoint.unet_file == folder / "latentsync_unet.pt"
    assert checkpoint.resolution == 256
    assert checkpoint.unet_config["sample_size"] == 32
    assert checkpoint.mask_file is None

    unet = load_unet(checkpoint.unet_file, checkpoint.unet_config, dtype=torch.float16)
    expected = make_unet().state_dict()
    assert all(torch.equal(v, expected[n].half()) for n, v in unet.state_dict().items())
    assert not unet.training

    vae = load_vae(checkpoint)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.18215, 0.0)
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean.shape == (1, 4, 2, 2)
    assert isinstance(load_audio_encoder(checkpoint), WhisperAudioEncoder)


def test_a_clone_of_the_original_repository_is_found(latentsync: Callable[..., Path]) -> None:
    folder = latentsync(inside="checkpoints", vae="sd-vae-ft-mse", without=("stage2.yaml",))
    configs = folder / "configs" / "unet"
    write_yaml(configs / "stage1.yaml", resolution=512, use_motion_module=False)  # does not fit
    write_yaml(configs / "stage2.yaml", resolution=256)
    (configs / "syncnet.yaml").write_text("data: {resolution: 64}\n")  # another model
    mask = folder / "latentsync" / "utils" / "mask.png"
    mask.parent.mkdir(parents=True)
    mask.write_bytes(b"")
    checkpoint = resolve_checkpoint(folder)
    assert checkpoint.resolution == 256
    assert checkpoint.vae_folder == folder / "checkpoints" / "sd-vae-ft-mse"
    assert checkpoint.mask_file == mask


def test_mini_is_found_and_loaded(mini: Path) -> None:
    checkpoint = resolve_checkpoint(mini)
    assert (checkpoint.resolution, checkpoint.audio_kind) == (256, "mel")
    assert load_unet(checkpoint.unet_file, checkpoint.unet_config).dtype == torch.float32
    assert load_vae(checkpoint).config.scaling_factor == 0.5, "mini's VAE has its own"
    assert isinstance(load_audio_encoder(checkpoint), MelAudioEncoder)


def test_loading_draws_no_random_numbers(mini: Path) -> None:
    before = torch.get_rng_state()
    checkpoint = resolve_checkpoint(mini)
    load_unet(checkpoint.unet_file, checkpoint.unet_config)
    load_vae(checkpoint)
    load_audio_encoder(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("missing", "looked_for"),
    [
        ("latentsync_unet.pt", "latentsync_unet.pt, latentsync_unet.safetensors, checkpoints/"),
        ("whisper", "Whisper (tiny) not found; looked for whisper/tiny.pt, whisper/config.json"),
        ("vae", "looked for vae/config.json, sd-vae-ft-mse/config.json"),
    ],
)
def test_missing_files_are_named(
    latentsync: Callable[..., Path], missing: str, looked_for: str
) -> None:
    folder = latentsync(without=(missing,))
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(folder)
    assert looked_for in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["unet.json", "unet.safetensors", "vae", "audio.json", "audio.safetensors"]
)
def test_missing_files_of_mini_are_named(mini: Path, name: str) -> None:
    (mini / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_audio_encoder(resolve_checkpoint(mini))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder; give 'mini' or a folder"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"file\.pt: is a file; give 'mini' or a folder"):
        resolve_checkpoint(tmp_path / "file.pt")


def test_first_missing_and_unexpected_entries_are_named(latentsync: Callable[..., Path]) -> None:
    folder = latentsync()
    state = make_unet().state_dict()
    state["conv_extra.weight"] = torch.zeros(1)
    for name in ("mid_block.resnets.0.conv1.weight", "conv_out.bias"):
        del state[name]
    torch.save({"state_dict": state}, folder / "latentsync_unet.pt")
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(folder)
    assert "2 missing (first: mid_block.resnets.0.conv1.weight)" in str(caught.value)
    assert "1 unexpected (first: conv_extra.weight)" in str(caught.value)
    assert "stage2.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cross_attention_dim": 768},
            r"attn2\.to_k\.weight is \(16, 384\).*\(16, 768\).*cross_attention_dim is 384",
        ),
        ({"in_channels": 9}, r"conv_in\.weight is \(16, 13, 3, 3\).*\(16, 9, 3, 3\).*in_channels"),
        ({"use_motion_module": False}, r"unexpected \(first: .*motion_modules.*use_motion_module"),
    ],
)
def test_wrong_configurations_are_named(
    latentsync: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    folder = latentsync()
    write_yaml(folder / "stage2.yaml", **change)
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(folder)
    with pytest.raises(CheckpointError, match=message):
        load_unet(folder / "latentsync_unet.pt", read_unet_config(folder / "stage2.yaml"))


def test_resolution_must_agree_with_the_yaml_file(latentsync: Callable[..., Path]) -> None:
    folder = latentsync()
    assert resolve_checkpoint(folder, resolution=256).resolution == 256
    with pytest.raises(CheckpointError, match=r"resolution=512: .* for 256 according to .*stage2"):
        resolve_checkpoint(folder, resolution=512)
    with pytest.raises(CheckpointError, match="resolution: 100 is not a positive multiple of 8"):
        resolve_checkpoint(folder, resolution=100)


def test_two_resolutions_need_a_decision(latentsync: Callable[..., Path]) -> None:
    folder = latentsync()
    write_yaml(folder / "stage2_512.yaml", resolution=512)
    with pytest.raises(CheckpointError, match=r"stage2\.yaml \(256\), stage2_512\.yaml \(512\)"):
        resolve_checkpoint(folder)
    assert resolve_checkpoint(folder, resolution=512).unet_config["sample_size"] == 64
    with pytest.raises(CheckpointError, match="several YAML files"):
        resolve_checkpoint(folder, resolution=384)


def test_without_yaml_it_is_taken_for_latentsync_1_6(
    tmp_path: Path, parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only shapes are looked at, so a stand-in for the 5 GB file is enough."""
    names = {
        "conv_in.weight": (320, 13, 3, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 384),
        "down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": (320,),
    }
    torch.save({n: torch.zeros(s) for n, s in names.items()}, tmp_path / "latentsync_unet.pt")
    (tmp_path / "whisper").symlink_to(parts / "whisper")
    (tmp_path / "vae").symlink_to(parts / "vae")
    with caplog.at_level(logging.WARNING):
        checkpoint = resolve_checkpoint(tmp_path)
    assert checkpoint.resolution == 512
    assert "resolution=256" in caplog.text
    with torch.device("meta"):
        unet = UNet3DConditionModel.from_config(checkpoint.unet_config)
    assert len(unet.state_dict()) == 1246
    assert sum(p.numel() for p in unet.state_dict().values()) == pytest.approx(1267.9e6, rel=1e-4)

    caplog.clear()
    assert resolve_checkpoint(tmp_path, resolution=256).unet_config["sample_size"] == 32
    assert caplog.text == ""
    with pytest.raises(CheckpointError, match="missing"):
        load_unet(checkpoint.unet_file, checkpoint.unet_config)


def test_mini_of_another_resolution_is_an_error(mini: Path) -> None:
    with pytest.raises(CheckpointError, match=r"resolution=512: .* for 256 according to .*mini"):
        resolve_checkpoint(mini, resolution=512)
    (mini / "mini.json").write_text(json.dumps({"resolution": 512}))
    with pytest.raises(CheckpointError, match="resolution 512 contradicts sample_size 32"):
        resolve_checkpoint(mini)
    (mini / "mini.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"mini\.json: cannot be read as JSON"):
        resolve_checkpoint(mini)


def test_sound_features_must_fit_the_unet(mini: Path) -> None:
    MelAudioEncoder(width=16, feature_dim=64).save_pretrained(mini)
    with pytest.raises(CheckpointError, match="gives 64 features, but unet"):
        load_audio_encoder(resolve_checkpoint(mini))


def test_vae_must_have_four_levels(mini: Path, tmp_path: Path) -> None:
    (mini / "vae").unlink()
    write_vae(mini / "vae", blocks=3)
    with pytest.raises(CheckpointError, match="4 latent channels at 1/4 of the resolution"):
        load_vae(resolve_checkpoint(mini))


def test_vaes_saved_by_old_diffusers_and_damaged_ones(mini: Path, parts: Path) -> None:
    expected = load_vae(resolve_checkpoint(mini))
    (mini / "vae").unlink()
    (mini / "vae").mkdir()
    (mini / "vae" / "config.json").write_bytes((parts / "vae" / "config.json").read_bytes())
    state = load_file(parts / "vae" / "diffusion_pytorch_model.safetensors")
    old = {
        n.replace("to_q", "query")
        .replace("to_k", "key")
        .replace("to_v", "value")
        .replace("to_out.0", "proj_attn"): v
        for n, v in state.items()
    }
    assert old.keys() != state.keys()
    weights = mini / "vae" / "diffusion_pytorch_model.bin"
    torch.save(old, weights)
    found = load_vae(resolve_checkpoint(mini)).state_dict()
    assert all(torch.equal(found[n], v) for n, v in expected.state_dict().items())

    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.bin: cannot be read"):
        load_vae(resolve_checkpoint(mini))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"the VAE's weights not found; looked for diffusion"):
        load_vae(resolve_checkpoint(mini))


def test_masks(latentsync: Callable[..., Path]) -> None:
    folder = latentsync()
    path = folder / "stage2.yaml"
    path.write_text(path.read_text().replace("mask.png", "mask3.png"))
    with pytest.raises(CheckpointError, match=r"mask3\.png is not in"):
        resolve_checkpoint(folder)
    (folder / "mask.png").write_bytes(b"")
    assert resolve_checkpoint(folder).mask_file == folder / "mask.png"


def test_yaml_numbers_and_unused_switches(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "a.yaml", resolution=512)
    config = read_unet_config(path)
    assert config["norm_eps"] == 1e-5, "YAML takes 1e-5 for a string"
    assert config["sample_size"] == 64
    assert "upcast_attention" not in config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "cannot be read as YAML"),
        ("data: {}", "has no section 'model'"),
        ("model: {in_chanels: 13}\ndata: {resolution: 256}", "model.in_chanels is unknown"),
        (
            "model: {use_inflated_groupnorm: true}\ndata: {resolution: 256}",
            "model.use_inflated_groupnorm: True is not supported",
        ),
        ("model: {in_channels: 13}", "neither data.resolution nor model.sample_size"),
        ("model: {}\ndata: {resolution: 300}", "data.resolution: 300 is not"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_unet_config(tmp_path / "a.yaml")
