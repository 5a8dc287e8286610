"""diffusers' pipelines with small random weights: what works as before, and what is gained."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lsync_compile.compiled import CompiledPipeline
from lsync_compile.report import GraphRecord

BITS = {"lowering": "eager", "guidance_prefix": False, "compile_vae": False}
PROMPT = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def make(kind: type = StableDiffusionPipeline, channels: int = 4, **more: Any) -> Any:
    """A pipeline of random weights at 16 pixels, the same in each call."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=1
    )
    unet: nn.Module = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    if kind is AnimateDiffPipeline:
        adapter = MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
            use_motion_mid_block=False,
        )
        unet = UNetMotionModel.from_unet2d(unet, adapter)
        for parameter in unet.parameters():  # its last projections are zeros
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        more["motion_adapter"] = adapter
    else:
        more |= {"safety_checker": None, "requires_safety_checker": False}
    pipeline = kind(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        feature_extractor=None,
        **more,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, steps: int = 4, **more: Any) -> Tensor:
    result = pipeline(
        prompt_embeds=PROMPT,
        negative_prompt_embeds=-PROMPT,
        num_inference_steps=steps,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **more,
    )
    frames = getattr(result, "frames", None)
    return result.images if frames is None else frames


def compiled(pipeline: Any, **options: Any) -> CompiledPipeline:
    return torch.compile(pipeline, backend="lsync", options={**BITS, **options})


def unet_graph(fast: CompiledPipeline) -> GraphRecord:
    (graph,) = [graph for graph in fast.lsync.report().graphs if graph.target == "unet"]
    return graph


def matches(graph: GraphRecord) -> dict[str, int]:
    return {record.name: record.matches for record in graph.passes if record.matches}


def test_stable_diffusion_bits_deep_features_and_undo() -> None:
    pipeline = make()
    expected = run(pipeline, 6)
    fast = compiled(pipeline, deep_cache=True, deep_cache_interval=1)
    assert torch.equal(run(fast, 6), expected)
    graph = unet_graph(fast)
    stages = {stage.name: (stage.computed, stage.reused) for stage in graph.stages}
    assert stages == {"timestep": (6, 0), "chunk": (1, 5)}
    fast = compiled(fast, deep_cache=True, deep_cache_interval=3)  # needs no rebuild
    near = run(fast, 6)
    cache = unet_graph(fast).deep_cache
    assert cache is not None
    assert (cache.computed, cache.reused) == (6 + 2, 4)
    assert 0 < (near - expected).norm() < 0.2 * expected.norm()
    # Another schedule's timesteps, some of them twice; and again as before.
    ddim, fast.scheduler = fast.scheduler, PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    run(fast, 5)
    assert (cache := unet_graph(fast).deep_cache) is not None
    assert (cache.computed, cache.reused) == (8 + 2, 4 + 4)
    fast.scheduler = ddim
    assert torch.equal(run(fast, 6), near)
    assert fast.lsync.report().counters["recompiles"] == 0
    assert torch.equal(run(fast.lsync.undo(), 6), expected)


def test_callbacks_may_change_the_loop() -> None:
    """Guidance switched off in the middle: other shapes, nothing vouched for, right results."""

    def switch_off(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        seen.append((step, int(timestep)))
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    more = {
        "callback_on_step_end": switch_off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    seen: list[tuple[int, int]] = []
    expected = run(make(), 4, **more)
    seen_plain, seen = seen, []
    fast = compiled(make(), guidance_prefix=True)
    assert (run(fast, 4, **more) - expected).norm() < 1e-5 * expected.norm()
    assert seen == seen_plain
    assert len(seen) == 4
    whole, half = (graph for graph in fast.lsync.report().graphs)
    assert (whole.calls, half.calls) == (2, 2)
    assert matches(whole)["guidance_prefix"] > 0
    assert "guidance_prefix" not in matches(half)


def test_progress_bars_and_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    fast = compiled(make())
    fast.set_progress_bar_config(disable=False)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        pipe._interrupt = step == 1
        return tensors

    part = run(fast, 4, callback_on_step_end=interrupt)
    assert "2/4" in capsys.readouterr().err
    whole = run(fast, 4)
    assert "4/4" in capsys.readouterr().err
    assert not torch.equal(part, whole)
    assert fast.lsync.report().counters["calls"] == 2 + 4


def keeps_working(
    fast: CompiledPipeline, expected: Tensor, capsys: pytest.CaptureFixture[str], **more: Any
) -> None:
    """Callbacks, progress bars, another number of steps, dtypes there and back: nothing compiled.

    Args:
        fast: compiled, exact; it has run.
        expected: of ``run(fast, **more)``.
    """
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        seen.append(step)
        return tensors

    graphs = fast.lsync.report().counters["graphs"]
    fast.set_progress_bar_config(disable=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(run(fast, callback_on_step_end=callback, **more), expected)
        assert seen == list(range(len(seen)))
        assert f"{len(seen)}/{len(seen)}" in capsys.readouterr().err
        fast.set_progress_bar_config(disable=True)
        assert not torch.equal(run(fast, **{**more, "steps": 3}), expected)
        fast.to(torch.float64).to(torch.float32)  # other tensors with the same values
        assert torch.equal(run(fast, **more), expected)
    assert fast.lsync.report().counters["graphs"] == graphs


def unet_alone(pipeline: Any, expected: Tensor, **more: Any) -> None:
    """``pipeline.unet.compile`` on a plain pipeline gives its bits."""
    assert torch.equal(run(pipeline, **more), expected)
    pipeline.unet.compile(backend="lsync", options={"lowering": "eager"})
    assert torch.equal(run(pipeline, **more), expected)


def test_inpainting_starts_in_the_middle_of_its_schedule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    more = {"image": picture, "mask_image": mask, "strength": 0.75}
    pipeline = make(StableDiffusionInpaintPipeline, channels=9)
    expected = run(pipeline, 8, **more)
    fast = compiled(pipeline, deep_cache=True, deep_cache_interval=1)
    assert torch.equal(run(fast, 8, **more), expected)
    keeps_working(fast, expected, capsys, steps=8, **more)
    before = unet_graph(fast).deep_cache
    assert before is not None
    fast = compiled(fast, deep_cache=True, deep_cache_interval=2)
    assert (run(fast, 8, **more) - expected).norm() < 0.2 * expected.norm()
    cache = unet_graph(fast).deep_cache
    assert cache is not None
    assert (cache.computed, cache.reused) == (before.computed + 3, 3)  # 6 of 8 steps
    unet_alone(fast.lsync.undo(), expected, steps=8, **more)


def test_animatediff(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = make(AnimateDiffPipeline)
    expected = run(pipeline, num_frames=4)
    fast = compiled(pipeline)
    assert torch.equal(run(fast, num_frames=4), expected)
    keeps_working(fast, expected, capsys, num_frames=4)
    everything = {"kernels": "on", "guidance_prefix": True, "fuse_layer_norm": True}
    fast = compiled(fast, **everything, deep_cache=True, deep_cache_interval=2)
    near = run(fast, num_frames=4)
    assert (near - expected).norm() < 0.3 * expected.norm()
    graph = unet_graph(fast)
    found = matches(graph)
    wanted = {"fuse_temporal_attention": 12, "choose_sdpa": 8, "fuse_geglu": 10, "fuse_qkv": 20}
    assert {name: found.get(name) for name in wanted} == wanted
    assert graph.deep_cache is not None
    assert (graph.deep_cache.computed, graph.deep_cache.reused) == (2, 2)
    unet_alone(fast.lsync.undo(), expected, num_frames=4)


def test_dtypes_and_saving(tmp_path: Path) -> None:
    fast = compiled(make())
    expected = run(fast)
    fast.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, tokenizer=None, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded), expected)
    fast.to(torch.bfloat16)
    half = fast(
        prompt_embeds=PROMPT.bfloat16(),
        negative_prompt_embeds=-PROMPT.bfloat16(),
        num_inference_steps=4,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert half.dtype is torch.bfloat16
    fast.to(torch.float32)
    kinds = [graph.kind for graph in fast.lsync.report().graphs]
    assert kinds == ["first", "variant"]


def test_the_unet_alone() -> None:
    pipeline = make()
    expected = run(pipeline)
    pipeline.unet.compile(backend="lsync", options={"lowering": "eager"})
    assert torch.equal(run(pipeline), expected)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_offloading_before_and_after() -> None:
    pipeline = make()
    expected = run(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    fast = compiled(pipeline)
    assert torch.equal(run(fast), expected)
    fast.remove_all_hooks()
    assert torch.equal(run(fast), expected)
    fast.enable_model_cpu_offload(device="cpu")
    assert torch.equal(run(fast), expected)
    assert fast.lsync.report().counters["fallbacks"] == 0


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_lora_comes_and_goes(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    trained = make()
    trained.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    plain, fast = make(), compiled(make())
    before = run(fast)
    for pipeline in (plain, fast):
        pipeline.load_lora_weights(tmp_path, adapter_name="style")
    with_lora = run(fast)
    assert torch.equal(with_lora, run(plain))
    assert not torch.equal(with_lora, before)
    for pipeline in (plain, fast):
        pipeline.set_adapters(["style"], [0.5])
    assert torch.equal(run(fast), run(plain))
    fast.unload_lora_weights()
    assert torch.equal(run(fast), before)
    assert fast.lsync.report().counters["fallbacks"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [StableDiffusionPipeline, AnimateDiffPipeline])
def test_captured_on_a_gpu(kind: type) -> None:
    """Timesteps are on the device, graphs are replayed, and results stay the caller's."""
    more = {"num_frames": 4} if kind is AnimateDiffPipeline else {}
    pipeline = make(kind).to("cuda")
    expected, other = run(pipeline, **more), run(pipeline, 3, **more)
    fast = compiled(pipeline, guidance_prefix=True, compile_vae=True)
    first = run(fast, **more)
    kept = first.clone()
    assert (run(fast, 3, **more) - other).norm() < 1e-2 * other.norm()
    assert torch.equal(first, kept)
    assert (first - expected).norm() < 1e-2 * expected.norm()
    graph = unet_graph(fast)
    assert graph.capture is not None
    assert (graph.capture.state, graph.capture.captures) == ("captured", 1)
    assert graph.capture.replays == 4 + 3
    stages = {stage.name: (stage.computed, stage.reused) for stage in graph.stages}
    assert stages["chunk"] == (2, 5)
    fast = compiled(fast, guidance_prefix=True, deep_cache=True, deep_cache_interval=2)
    near = run(fast, **more)
    assert (near - expected).norm() < 0.3 * expected.norm()
    assert torch.equal(run(fast, **more), near)
    cache = unet_graph(fast).deep_cache
    assert cache is not None
    assert (cache.computed, cache.reused) == (4, 4)
