"""Fixtures that several rooms share: a tiny random pipeline and clips made on the spot."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from lsync_compile import compile_cache
from lsync_compile.media.faces import Face
from lsync_compile.models.config import LATENTSYNC_UNET
from lsync_compile.models.mel_encoder import MelAudioEncoder
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.unet import UNet3DConditionModel

SHARED = Path(__file__).resolve().parents[2] / "shared"

TINY_UNET = {
    **LATENTSYNC_UNET,
    "sample_size": 8,
    "block_out_channels": (16, 16, 16, 16),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "motion_module_kwargs": {**LATENTSYNC_UNET["motion_module_kwargs"], "num_attention_heads": 2},
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and reference outputs; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("the shared reference data is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _no_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another, or an earlier run, has compiled."""
    monkeypatch.setattr(compile_cache, "folder", lambda: None)


class MiddleFace:
    """A detector that finds a face in the middle of every frame but the black ones."""

    def __init__(self) -> None:
        self.calls = 0

    def detect(self, frame: np.ndarray) -> Face | None:
        self.calls += 1
        if frame.max() < 32:
            return None
        height, width = frame.shape[:2]
        unit = min(height, width) / 8
        centre = np.array([width / 2, height / 2])
        landmarks = centre + unit * np.array([[-1.0, -1.2], [1.0, -1.2], [0.0, 0.2]])
        points = centre + unit * np.array(
            [[-0.9, -0.6], [0.9, -0.6], [0.0, 0.3], [-0.6, 1.0], [0.6, 1.0]]
        )
        box = np.concatenate([centre - 2 * unit, centre + 2 * unit])
        return Face(box=box, points=points, landmarks=landmarks, score=0.99)


@pytest.fixture
def middle_face() -> MiddleFace:
    """A stand-in detector that counts its calls."""
    return MiddleFace()


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill every matrix with noise of unit gain: zero-initialised layers would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values * parameter[0].numel() ** -0.5)


@pytest.fixture
def tiny_pipeline() -> LatentSyncPipeline:
    """A LatentSync pipeline of random weights at 64 px that runs in a second on a CPU."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel.from_config(TINY_UNET)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
        shift_factor=0.0,
    )
    randomise(unet)
    randomise(vae, seed=1)
    pipeline = LatentSyncPipeline(
        vae.eval(),
        MelAudioEncoder().eval(),
        unet.eval(),
        default_scheduler(),
        detector=MiddleFace(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def make_clip(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a short H.264 clip of a moving pattern, with a tone as sound."""

    def make(
        frames: int = 12,
        *,
        name: str = "clip.mp4",
        size: tuple[int, int] = (160, 128),
        fps: int = 25,
        black: tuple[int, ...] = (),
        sound: bool = True,
    ) -> Path:
        path = tmp_path / name
        width, height = size
        rows, columns = np.mgrid[0:height, 0:width]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            voice = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
            for index in range(frames):
                pattern = np.stack(
                    [(rows + 4 * index) % 256, (columns * 2) % 256, (rows + columns) % 256], axis=-1
                )
                picture = np.zeros_like(pattern) if index in black else np.maximum(pattern, 40)
                frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if voice is not None:
                samples = tone(frames / fps)
                block = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
                block.sample_rate = 16_000
                container.mux(voice.encode(block))
                container.mux(voice.encode())
        return path

    return make


@pytest.fixture
def make_speech(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a 16 kHz mono WAV of a tone that comes and goes."""

    def make(seconds: float, *, name: str = "speech.wav") -> Path:
        path = tmp_path / name
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes((tone(seconds) * 32_000).astype("<i2").tobytes())
        return path

    return make


def tone(seconds: float) -> np.ndarray:
    """A 220 Hz tone at 16 kHz whose loudness swells three times a second, float32 (n,)."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    swell = 0.5 - 0.5 * np.cos(2 * np.pi * 3 * time)
    return (0.5 * swell * np.sin(2 * np.pi * 220 * time)).astype(np.float32)
