"""Checkpoints that went wrong: named in one line, no code in them run, no garbage loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzing import few
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import make_unet, write_vae, write_yaml
from whisper_files import random_weights, write_openai

from lsync_compile.errors import CheckpointError
from lsync_compile.models.checkpoint import (
    load_audio_encoder,
    load_unet,
    load_vae,
    resolve_checkpoint,
)
from lsync_compile.models.mel_encoder import MelAudioEncoder
from lsync_compile.models.weights import read_archive


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each layout, ``mini`` and ``latentsync``."""
    folder = tmp_path_factory.mktemp("whole")
    mini, other = folder / "mini", folder / "latentsync"
    for each in (mini, other):
        each.mkdir()
        write_vae(each / "vae")
    unet = make_unet(sample_size=32)
    save_file({n: v.half() for n, v in unet.state_dict().items()}, mini / "unet.safetensors")
    (mini / "unet.json").write_text(json.dumps(dict(unet.config)))
    MelAudioEncoder(width=16).save_pretrained(mini)
    (mini / "mini.json").write_text(json.dumps({"version": 1, "resolution": 256, "mask": None}))
    torch.save({"state_dict": make_unet().state_dict()}, other / "latentsync_unet.pt")
    write_openai(other / "whisper" / "tiny.pt", random_weights(20, width=384))
    write_yaml(other / "stage2.yaml")
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that gives a copy of one of the two, to damage."""

    def copy(layout: str) -> Path:
        return Path(shutil.copytree(whole / layout, tmp_path / layout, dirs_exist_ok=True))

    return copy


def load(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    checkpoint = resolve_checkpoint(folder)
    load_vae(checkpoint)
    load_audio_encoder(checkpoint)
    load_unet(checkpoint.unet_file, checkpoint.unet_config, dtype=dtype)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class MakesFolder:
    """What runs when it is unpickled: makes a folder, which the test then finds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int, bool]]:
        return os.makedirs, (str(self.path), 0o777, True)


@pytest.mark.parametrize(
    "name", ["latentsync_unet.pt", "whisper/tiny.pt", "vae/diffusion_pytorch_model.bin"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    copied: Callable[[str], Path], tmp_path: Path, name: str, zipped: bool
) -> None:
    folder, proof = copied("latentsync"), tmp_path / "proof"
    if name.startswith("vae"):
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    evil = {"state_dict": {"conv_in.weight": MakesFolder(proof)}, "dims": MakesFolder(proof)}
    torch.save(evil, folder / name, _use_new_zipfile_serialization=zipped)
    assert Path(name).name in refused(folder)
    assert not proof.exists()
    torch.load(folder / name, weights_only=False)  # the file is as bad as it is meant to be
    assert proof.exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(copied: Callable[[str], Path], bad: float) -> None:
    folder = copied("mini")
    state = load_file(folder / "unet.safetensors")
    state["conv_out.bias"][1] = bad
    save_file(state, folder / "unet.safetensors")
    assert "unet.safetensors: conv_out.bias holds values that are infinite" in refused(folder)


def test_weights_too_large_for_half_precision_are_named(copied: Callable[[str], Path]) -> None:
    folder = copied("latentsync")
    state = torch.load(folder / "latentsync_unet.pt")
    state["state_dict"]["conv_out.bias"][0] = 1e6
    torch.save(state, folder / "latentsync_unet.pt")
    load(folder)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias .* as torch\.float16"):
        load(folder, torch.float16)


def test_weights_of_whole_numbers_are_named(copied: Callable[[str], Path]) -> None:
    folder = copied("mini")
    state = load_file(folder / "unet.safetensors")
    save_file({n: v.to(torch.int8) for n, v in state.items()}, folder / "unet.safetensors")
    assert "int8 and no floating-point numbers" in refused(folder)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("vae/config.json", {"block_out_channels": False}, "vae/config.json: no network"),
        ("vae/config.json", {"act_fn": None}, "vae/config.json: no network"),
        ("vae/config.json", {"norm_num_groups": 3}, "divisible"),
        ("vae/config.json", {"layers_per_block": 10**9}, "layers_per_block=1000000000 is more"),
        ("unet.json", {"in_channels": [1]}, "no network can be made"),
        ("unet.json", {"cross_attention_dim": None}, "attends to None"),
        ("unet.json", {"block_out_channels": [10**18, 16]}, "no network can be made"),
        ("audio.json", {"width": -5}, "audio.json: no network"),
        ("audio.json", {"width": 10**6}, r"(1000000, 80, 3)"),  # and 10 TB are not allocated
        ("audio.json", {"bands": 10**12}, "mel bands; 1 to 400"),
        ("audio.json", {"layers": 10**12}, "layers=1000000000000 is more than 64"),
        ("mini.json", {"resolution": 10**18}, "not a positive multiple of 8 up to 8192"),
        ("mini.json", {"resolution": True}, "not a positive multiple"),
    ],
)
def test_configurations_that_make_no_sense_are_named(
    copied: Callable[[str], Path], name: str, change: dict[str, Any], said: str
) -> None:
    folder = copied("mini")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | change))
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("data", {"num_frames": "mini"}, "data.num_frames: 'mini'"),
        ("data", {"mask_image_path": [1, 2]}, "is not in"),
        ("model", {"norm_num_groups": "x"}, "stage2.yaml: no network"),
        ("model", {"layers_per_block": 10**9}, "stage2.yaml: layers_per_block"),
        ("model", {"mid_block_type": False}, "(mid_block_type: False is not supported"),
    ],
)
def test_yaml_that_makes_no_sense_is_named(
    copied: Callable[[str], Path], section: str, change: dict[str, Any], said: str
) -> None:
    folder = copied("latentsync")
    content = yaml.safe_load((folder / "stage2.yaml").read_text())
    content[section] |= change
    (folder / "stage2.yaml").write_text(yaml.safe_dump(content))
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ({"n_audio_state": "x"}, "d_model 'x' is not a positive whole number"),
        ({"n_audio_ctx": 0}, "max_source_positions 0 is not"),
        ({"n_audio_layer": 10**9}, "encoder_layers=1000000000 is more than 64"),
        ({"n_audio_head": 5}, "no network can be made"),
        ({"n_mels": 10**9}, "num_mel_bins 1000000000 is over 400"),
    ],
)
def test_whispers_sizes_that_make_no_sense_are_named(
    copied: Callable[[str], Path], dims: dict[str, Any], said: str
) -> None:
    folder = copied("latentsync")
    archive = torch.load(folder / "whisper" / "tiny.pt")
    archive["dims"] |= dims
    torch.save(archive, folder / "whisper" / "tiny.pt")
    assert said in refused(folder)


def test_names_that_are_no_text_are_named(tmp_path: Path, copied: Callable[[str], Path]) -> None:
    folder = copied("latentsync")
    torch.save({0: torch.zeros(2)}, folder / "latentsync_unet.pt")
    assert "entry 0 is a Tensor" in refused(folder)
    assert read_archive(folder / "latentsync_unet.pt").keys() == {0}


values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 10**9, 10**18, 2.5, "", "x", "1e-5"]),
    st.just([]),
    st.just({"a": [1]}),
    st.just([[1]]),
)


@few(20)
@given(data=st.data())
def test_any_damage_loads_or_is_one_line(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A value of a configuration exchanged, or bytes of any file, or its end lost."""
    layout = data.draw(st.sampled_from(["mini", "latentsync"]))
    folder = Path(shutil.copytree(whole / layout, tmp_path_factory.mktemp("copy") / layout))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    if path.suffix in (".json", ".yaml") and data.draw(st.integers(0, 9)):
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        part = (
            content[data.draw(st.sampled_from(sorted(content)))] if "model" in content else content
        )
        part = part if isinstance(part, dict) else content
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(values)
        path.write_text(json.dumps(content))  # which YAML is too
    else:
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content))) :]
        for _ in range(data.draw(st.integers(0, 5))):
            reach = data.draw(st.sampled_from([200, 4000, len(content)]))
            if content:
                place = data.draw(st.integers(0, min(reach, len(content)) - 1))
                content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
    said = ""
    try:
        load(folder)
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
