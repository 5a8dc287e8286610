"""LatentSync's own code, where a checkout of its repository is at hand.

``LSYNC_UPSTREAM=/path/to/LatentSync python -m pytest tests/integrations/test_upstream_code.py -rs``

Its networks, its pipeline and its loop are run as they are. What it brings for files and faces is
exchanged for small stand-ins, so that neither a GPU nor its libraries for those are needed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import diffusers
import numpy as np
import pytest
import torch
import transformers
from captures import UNET_CONFIG, make_unet, unet_inputs
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from upstream_standin import DeepCacheSDHelper, Images

from lsync_compile.compiled import CompiledPipeline
from lsync_compile.errors import OptionError
from lsync_compile.integrations import adapter_for
from lsync_compile.integrations.upstream import UPSTREAM
from lsync_compile.report import GraphRecord

# What its modules import and none of these tests need.
_UNUSED = (
    *("imageio", "torchvision", "torchvision.transforms", "torchvision.io", "decord", "kornia"),
    *("insightface", "insightface.app", "soundfile", "librosa", "librosa.filters", "tiktoken"),
    *("ffmpeg", "mediapipe", "python_speech_features", "whisper", "more_itertools", "numba"),
)
_LOADED = diffusers.__version__, transformers.__version__, AutoencoderKL, DDIMScheduler
BITS = {"lowering": "eager", "guidance_prefix": False, "null_audio": False, "compile_vae": False}


@pytest.fixture(scope="module")
def upstream() -> Any:
    """The checkout's package; its imports that are missing here are empty modules meanwhile."""
    folder = os.environ.get("LSYNC_UPSTREAM")
    before = dict(sys.modules)
    if folder:
        sys.path.insert(0, folder)
    elif importlib.util.find_spec("latentsync") is None:
        pytest.skip("no checkout of LatentSync's repository: set LSYNC_UPSTREAM to its folder")
    roots = {name.partition(".")[0] for name in _UNUSED}
    missing = {root for root in roots if importlib.util.find_spec(root) is None}
    for name in (name for name in _UNUSED if name.partition(".")[0] in missing):
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__getattr__ = lambda attribute: MagicMock()  # type: ignore[method-assign]
        sys.modules[name] = module
    try:
        yield SimpleNamespace(
            unet=importlib.import_module("latentsync.models.unet"),
            pipeline=importlib.import_module("latentsync.pipelines.lipsync_pipeline"),
        )
    except ImportError as error:
        pytest.skip(f"LatentSync's repository does not import here: {error}")
    finally:
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in {"latentsync", *missing}:
                del sys.modules[name]
        if folder:
            sys.path.remove(folder)


@pytest.fixture(scope="module")
def its_unet(upstream: Any) -> nn.Module:
    """Its UNet with the weights of ours: the files are the same."""
    ours = make_unet(levels=2, layers=1)
    theirs = upstream.unet.UNet3DConditionModel.from_config({**UNET_CONFIG, **_levels(ours)})
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval().requires_grad_(False)


def _levels(unet: Any) -> dict[str, Any]:
    keys = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types")
    return {key: unet.config[key] for key in keys}


def guided() -> dict[str, Tensor]:
    inputs = unet_inputs()
    inputs["sample"][1] = inputs["sample"][0]
    inputs["encoder_hidden_states"][: len(inputs["encoder_hidden_states"]) // 2] = 0
    return inputs


def test_its_unet_keeps_its_bits(its_unet: nn.Module) -> None:
    inputs = unet_inputs()
    with torch.no_grad():
        expected = its_unet(**inputs).sample
        its_unet.compile(backend="lsync", options={"lowering": "eager"})
        found = its_unet(**inputs).sample
    its_unet._compiled_call_impl = None
    assert torch.equal(found, expected)


def make_pipeline(upstream: Any, its_unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its pipeline: its loop, its networks; files, faces and the GPU are stand-ins'."""
    module = upstream.pipeline
    frames = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
    frames[1] = frames[0]
    written: list[np.ndarray] = []

    def images(resolution: int, device: str, mask_image: Tensor) -> Images:
        made = Images(resolution, mask_image)
        made.restorer = SimpleNamespace(restore_img=lambda frame, face, matrix: face.numpy())
        return made

    for name, stand_in in {
        "ImageProcessor": images,
        "load_fixed_mask": lambda side, path: half_mask(side),
        "check_ffmpeg_installed": lambda: None,
        "read_audio": lambda path: torch.zeros(16_000),
        "read_video": lambda path, use_decord: frames,
        "write_video": lambda path, made, fps: written.append(made),
        "sf": SimpleNamespace(write=lambda *args: None),
        "subprocess": SimpleNamespace(run=lambda *args, **kwargs: None),
        "torchvision": MagicMock(),
        "transforms": MagicMock(),
    }.items():
        monkeypatch.setattr(module, name, stand_in)
    module.torchvision.transforms.functional.resize = lambda face, **kwargs: face
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
        shift_factor=0.0,
    )
    sounds = list(torch.randn(4, 50, 384, generator=torch.Generator().manual_seed(3)))
    hearing = SimpleNamespace(
        audio2feat=lambda path: None, feature2chunks=lambda feature_array, fps: sounds
    )
    # Registering modules asks for the library of each; the loop asks for attributes alone.
    pipeline = module.LipsyncPipeline.__new__(module.LipsyncPipeline)
    parts = {"vae": vae.eval(), "audio_encoder": hearing, "unet": its_unet}
    vars(pipeline).update(
        parts, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), vae_scale_factor=8
    )
    pipeline._internal_dict = diffusers.configuration_utils.FrozenDict(
        dict.fromkeys((*parts, "scheduler"), (None, None))
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.written = written
    return pipeline


def half_mask(side: int) -> Tensor:
    mask = torch.ones(3, side, side)
    mask[:, side // 2 :] = 0
    return mask


def run(pipeline: Any, tmp: Any) -> np.ndarray:
    pipeline(
        video_path="in.mp4",
        audio_path="in.wav",
        video_out_path="out.mp4",
        num_frames=2,
        num_inference_steps=3,
        weight_dtype=torch.float32,
        height=128,
        width=128,
        temp_dir=str(tmp / "temp"),
        generator=torch.Generator().manual_seed(0),
    )
    return pipeline.written.pop()


def unet_graph(fast: CompiledPipeline) -> GraphRecord:
    (graph,) = [graph for graph in fast.lsync.report().graphs if graph.target == "unet"]
    return graph


def test_two_lines_make_its_pipeline_fast(
    upstream: Any, its_unet: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    pipeline = make_pipeline(upstream, its_unet, monkeypatch)
    assert adapter_for(pipeline) is UPSTREAM
    expected = run(pipeline, tmp_path)
    fast = torch.compile(pipeline, backend="lsync", options=BITS)
    assert np.array_equal(run(fast, tmp_path), expected)
    graph = unet_graph(fast)
    stages = {stage.name: (stage.computed, stage.reused) for stage in graph.stages}
    assert stages == {"timestep": (3, 3), "chunk": (2, 4)}
    report = fast.lsync.report()
    assert report.features["face cache"] == {"frames": 4, "exact": 1, "searched": 3}

    options = {"lowering": "eager", "kernels": "on", "compile_vae": False, "deep_cache": True}
    more = {"split_conv_in": True, "fuse_upsample_conv": True, "fuse_layer_norm": True}
    fast = torch.compile(fast, backend="lsync", options={**options, **more})
    found = run(fast, tmp_path)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    graph = unet_graph(fast)
    matched = {record.name: record.matches for record in graph.passes if record.matches}
    wanted = {
        "null_audio": 4,
        "split_conv_in": 1,
        "fuse_temporal_attention": 12,
        "choose_sdpa": 8,
        "fuse_geglu": 10,
        "fuse_qkv": 20,
        "fuse_upsample_conv": 1,
    }
    assert {name: matched.get(name) for name in wanted} == wanted
    assert matched["guidance_prefix"] > 30
    assert graph.deep_cache is not None
    assert (graph.deep_cache.computed, graph.deep_cache.reused) == (2, 4)
    assert np.array_equal(run(fast.lsync.undo(), tmp_path), expected)


def test_its_flag_for_deepcache_is_refused(
    upstream: Any, its_unet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_pipeline(upstream, its_unet, monkeypatch)
    DeepCacheSDHelper(pipe=pipeline).enable()
    with pytest.raises(OptionError, match=r"DeepCacheSDHelper.*helper.disable\(\)"):
        torch.compile(pipeline, backend="lsync")
    del its_unet.forward
