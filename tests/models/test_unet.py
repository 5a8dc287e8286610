"""The UNet against the original's names and outputs, against diffusers' 2-D UNet, and compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from lsync_compile.errors import OptionError
from lsync_compile.models.unet import UNet3DConditionModel

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 13,
    "out_channels": 4,
    "block_out_channels": [16, 24, 32, 32],
    "layers_per_block": 1,
    "attention_head_dim": [1, 2, 2, 4],
    "norm_num_groups": 8,
    "cross_attention_dim": 20,
    "add_audio_layer": True,
    "use_motion_module": True,
    "motion_module_type": "Vanilla",
    "motion_module_kwargs": {
        "num_attention_heads": 2,
        "num_transformer_block": 1,
        "temporal_position_encoding": True,
        "temporal_position_encoding_max_len": 24,
        "zero_initialize": False,
    },
}


def make(**changes: Any) -> UNet3DConditionModel:
    """A small UNet of random weights, none of them zero."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel.from_config(SMALL | changes).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return unet


def inputs(
    frames: int = 3, size: tuple[int, int] = (8, 8), batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 13, frames, *size, generator=generator)
    audio = torch.randn(batch * frames, 6, 20, generator=generator)
    return sample, torch.tensor(401), audio


@pytest.fixture(scope="module")
def unet() -> UNet3DConditionModel:
    return make()


def load_upstream(shared: Path) -> UNet3DConditionModel:
    folder = shared / "data" / "upstream"
    unet = UNet3DConditionModel.from_config(
        json.loads((folder / "unet_tiny_config.json").read_text())
    )
    unet.load_state_dict(load_file(folder / "unet_tiny_weights.safetensors"))
    return unet.eval()


def test_full_size_has_the_names_and_shapes_of_the_original(shared: Path) -> None:
    described = json.loads((shared / "data" / "upstream" / "unet_1_6_keys.json").read_text())
    with torch.device("meta"):
        unet = UNet3DConditionModel.from_config(described["config"])
    shapes = {name: list(value.shape) for name, value in unet.state_dict().items()}
    assert len(shapes) == 1246
    assert shapes == described["state_dict"]


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_outputs_are_those_of_the_original(shared: Path, case: str) -> None:
    unet = load_upstream(shared)
    data = load_file(shared / "data" / "upstream" / "unet_tiny_io.safetensors")
    sample, timestep, audio, expected = (
        data[f"{case}.{name}"] for name in ("sample", "timestep", "encoder_hidden_states", "output")
    )
    with torch.no_grad():
        output = unet(sample, timestep, audio).sample
    assert (output - expected).abs().max() < 1e-4


def test_one_frame_without_motion_is_the_2d_unet_of_stable_diffusion() -> None:
    unet = make(use_motion_module=False)
    flat = UNet2DConditionModel(
        sample_size=8,
        in_channels=13,
        out_channels=4,
        block_out_channels=(16, 24, 32, 32),
        layers_per_block=1,
        attention_head_dim=(1, 2, 2, 4),
        norm_num_groups=8,
        cross_attention_dim=20,
    ).eval()
    flat.load_state_dict(unet.state_dict())
    sample, timestep, audio = inputs(frames=1, size=(16, 12))
    with torch.no_grad():
        expected = flat(sample[:, :, 0], timestep, audio).sample
        output = unet(sample, timestep, audio).sample[:, :, 0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("motion", [False, True])
@pytest.mark.parametrize("audio_layers", [False, True])
@pytest.mark.parametrize("audio_dim", [384, 768])
def test_switches_decide_which_weights_there_are(
    motion: bool, audio_layers: bool, audio_dim: int
) -> None:
    unet = make(
        use_motion_module=motion, add_audio_layer=audio_layers, cross_attention_dim=audio_dim
    )
    names = unet.state_dict()
    assert any("motion_modules" in name for name in names) == motion
    keys = [name for name in names if name.endswith("attn2.to_k.weight")]
    assert len(keys) == (10 if audio_layers else 0)  # 3 down, 1 middle, 3 x 2 up
    assert all(names[key].shape[1] == audio_dim for key in keys)
    sample, timestep, _ = inputs()
    with torch.no_grad():
        output = unet(sample, timestep, torch.randn(6, 5, audio_dim)).sample
    assert output.shape == (2, 4, 3, 8, 8)
    assert output.isfinite().all()


def test_motion_only_where_it_is_asked_for() -> None:
    unet = make(motion_module_resolutions=[2, 8], motion_module_mid_block=True)
    counts = [len(block.motion_modules) for block in unet.down_blocks]
    assert counts == [0, 1, 0, 1]
    assert [len(block.motion_modules) for block in unet.up_blocks] == [2, 0, 2, 0]
    assert len(unet.mid_block.motion_modules) == 1
    decoder_only = make(motion_module_decoder_only=True)
    assert [len(block.motion_modules) for block in decoder_only.down_blocks] == [0, 0, 0, 0]
    assert [len(block.motion_modules) for block in decoder_only.up_blocks] == [2, 2, 2, 2]


def test_sound_reaches_its_own_frame_first(unet: UNet3DConditionModel) -> None:
    sample, timestep, audio = inputs()
    louder = audio.clone()
    louder[1] += 1.0  # frame 1 of the first video
    with torch.no_grad():
        change = (
            unet(sample, timestep, louder).sample - unet(sample, timestep, audio).sample
        ).abs()
    per_frame = change.amax(dim=(1, 3, 4))
    assert per_frame[1].max() == 0, "the other video is untouched"
    assert per_frame[0].argmax() == 1
    assert per_frame[0].min() > 0, "motion modules and norms carry it to the other frames"


def test_no_sound_skips_the_attention_to_it(unet: UNet3DConditionModel) -> None:
    sample, timestep, audio = inputs()
    silent = make(add_audio_layer=False)
    silent.load_state_dict(
        {
            n: v
            for n, v in unet.state_dict().items()
            if (".attn2." not in n and ".norm2." not in n) or ".resnets." in n
        }
    )
    with torch.no_grad():
        output = unet(sample, timestep).sample
        assert torch.equal(output, silent(sample, timestep).sample)
        assert not torch.allclose(output, unet(sample, timestep, audio).sample)


def test_equivalent_arguments(unet: UNet3DConditionModel) -> None:
    sample, timestep, audio = inputs()
    with torch.no_grad():
        expected = unet(sample, timestep, audio).sample
        assert torch.equal(unet(sample, 401, audio).sample, expected)
        assert torch.equal(unet(sample, timestep.expand(2), audio).sample, expected)
        assert torch.equal(unet(sample, timestep, audio.view(2, 3, 6, 20)).sample, expected)
        assert torch.equal(unet(sample, timestep, audio, return_dict=False)[0], expected)


def test_each_video_of_a_batch_can_have_its_own_timestep(unet: UNet3DConditionModel) -> None:
    sample, _, audio = inputs()
    with torch.no_grad():
        both = unet(sample, torch.tensor([900, 20]), audio).sample
        second = unet(sample[1:], torch.tensor(20), audio[3:]).sample
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (20, 12), (9, 13), (1, 3)])
def test_any_size_comes_back(unet: UNet3DConditionModel, size: tuple[int, int]) -> None:
    sample, timestep, audio = inputs(size=size)
    with torch.no_grad():
        output = unet(sample, timestep, audio).sample
    assert output.shape == (2, 4, 3, *size)
    assert output.isfinite().all()


def test_centering_and_scale_options(unet: UNet3DConditionModel) -> None:
    sample, timestep, audio = inputs()
    centred = make(center_input_sample=True)
    with torch.no_grad():
        output = centred((sample + 1) / 2, timestep, audio).sample
        torch.testing.assert_close(output, unet(sample, timestep, audio).sample, atol=1e-4, rtol=0)
        scaled = make(mid_block_scale_factor=2.0)(sample, timestep, audio).sample
    assert not torch.allclose(scaled, output, atol=1e-3)


def test_one_graph_for_all_timesteps() -> None:
    unet = make(  # every kind of block; fewer of them than usual, for tracing takes long
        block_out_channels=[16, 24],
        attention_head_dim=2,
        down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
        up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"],
        motion_module_mid_block=True,
    )
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(unet, backend=backend, fullgraph=True)
    sample, _, audio = inputs()
    with torch.no_grad():
        for timestep in (981, 501, 1):
            output = compiled(sample, torch.tensor(timestep), audio).sample
            assert torch.equal(output, unet(sample, torch.tensor(timestep), audio).sample)
    assert len(graphs) == 1


def test_training_reaches_every_weight() -> None:
    unet = make().train()
    sample, timestep, audio = inputs()
    unet(sample, timestep, audio).sample.square().mean().backward()
    without = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_untrained_output_is_zero_and_motion_is_the_identity() -> None:
    torch.manual_seed(0)
    config = SMALL | {
        "motion_module_kwargs": SMALL["motion_module_kwargs"] | {"zero_initialize": True}
    }
    unet = UNet3DConditionModel.from_config(config).eval()
    video = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        assert not unet(*inputs()).sample.any()
        assert torch.equal(unet.down_blocks[0].motion_modules[0](video), video)


def test_save_and_load(unet: UNet3DConditionModel, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path)
    again = UNet3DConditionModel.from_pretrained(tmp_path)
    saved, read = unet.state_dict(), again.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[name], read[name]) for name in saved)
    # A mapped file's tensors begin anywhere, and some CPUs' libraries add in another order there.
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs()).sample, unet(*inputs()).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, a: (s[:, :, 0], t, a), r"sample: expected \(batch, channels, frames"),
        (lambda s, t, a: (s[:, :4], t, a), "sample: 4 channels, but the UNet takes 13"),
        (lambda s, t, a: (s.repeat(1, 1, 9, 1, 1), t, a), "27 frames.*24 positions"),
        (lambda s, t, a: (s, t, a[0]), "encoder_hidden_states: expected"),
        (lambda s, t, a: (s, t, a[:, :, :5]), "5 features, but the UNet attends to 20"),
        (lambda s, t, a: (s, t, a[:5]), "5 windows of sound for 2 x 3 frames"),
    ],
)
def test_wrong_inputs_are_named(unet: UNet3DConditionModel, change: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        unet(*change(*inputs()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "mish"}, "act_fn: 'mish'"),
        ({"mid_block_type": "Other"}, "mid_block_type"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"motion_module_type": "Other"}, "motion_module_type"),
        ({"attention_head_dim": [1, 2]}, "attention_head_dim: 2 values for the 4 stages"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "DownBlock2D"),
        (
            {"motion_module_kwargs": {"attention_block_types": ["Temporal_Cross"]}},
            "Temporal_Cross",
        ),
    ],
)
def test_unsupported_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**changes)
