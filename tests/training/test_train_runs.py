"""Short runs: the VAE learns a batch, the UNet learns to listen, the whole path works."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lsync_compile.models.mel_encoder import MelAudioEncoder
from lsync_compile.models.scheduler import default_scheduler
from training import smoke
from training.bank import Batch
from training.codec import Autoencode, new_vae
from training.denoise import hear, sample, signal_levels, training_terms
from training.loop import Trainer, learning_rate
from training.losses import mouth_map, reconstruction
from training.sources import CONTEXT, SAMPLES
from training.train_unet import UNET_CONFIG, new_pair


@pytest.mark.slow
def test_vae_learns_a_batch() -> None:
    torch.manual_seed(0)
    pixels = F.interpolate(torch.rand(4, 3, 6, 6), (32, 32), mode="bicubic").clamp(0, 1) * 2 - 1
    model = Autoencode(new_vae((16, 16, 32, 32), groups=4))
    trainer = Trainer(model, dtype=torch.float32, ema=0.9)
    weight = 1 + 2 * mouth_map(32)
    first = last = 0.0
    for step in range(150):
        output, mean, spread = model(pixels, torch.randn(4, 4, 4, 4))
        terms = reconstruction(output, pixels, mean, spread, weight)
        terms["loss"].backward()
        trainer.step(learning_rate(3e-3, step / 150))
        last = float(terms["l1"].detach())
        first = first or last
    assert last < 0.25 * first


SIDE = 8


class Toy:
    """Latents whose lower middle goes up and down with the loudness of the sound, and only with
    that: the masked face and the reference say nothing about it."""

    def __init__(self) -> None:
        self.pattern = torch.zeros(4, SIDE, SIDE)
        self.pattern[:, 4:7, 2:6] = torch.tensor([1.5, -1.0, 0.8, 1.2])[:, None, None]
        self.mask = torch.ones(1, SIDE, SIDE)
        self.mask[:, 3:7, 1:7] = 0

    def draw(self, n: int, frames: int = 8) -> tuple[Batch, torch.Tensor]:
        total = frames + 2 * CONTEXT
        knots = torch.rand(n, 1, total // 3 + 2)
        opening = (F.interpolate(knots, total * 4, mode="linear")[:, 0] - 0.3).clamp(min=0) / 0.7
        loud = F.interpolate(opening[:, None], total * SAMPLES, mode="linear")[:, 0]
        seen = opening.view(n, total, 4).mean(-1)[:, CONTEXT : CONTEXT + frames]
        base = F.interpolate(torch.randn(n, 4, 3, 3), (SIDE, SIDE), mode="bilinear")[:, :, None]

        def face(amount: torch.Tensor) -> torch.Tensor:
            return base + (amount[:, None, :, None, None] - 0.3) * self.pattern[:, None]

        batch = Batch(
            face(seen),
            (base * self.mask).expand(-1, -1, frames, -1, -1),
            face(torch.rand(n, 1).expand(-1, frames)),
            0.1 * loud * torch.randn(n, total * SAMPLES),
        )
        return batch, seen

    def read(self, latents: torch.Tensor, like: Batch, seen: torch.Tensor) -> torch.Tensor:
        """Opening that latents show, ``(n, F)``."""
        base = like.target - (seen[:, None, :, None, None] - 0.3) * self.pattern[:, None]
        moved = ((latents - base) * self.pattern[:, None]).sum((1, 3, 4))
        return moved / self.pattern.square().sum() + 0.3


@pytest.mark.slow
def test_unet_learns_to_listen() -> None:
    torch.manual_seed(0)
    config = json.loads(UNET_CONFIG.read_text()) | {
        "sample_size": SIDE,
        "block_out_channels": [24, 48],
        "attention_head_dim": [1, 1],
        "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
        "motion_module_resolutions": [1, 2],
    }
    pair = new_pair(config, {"bands": 40, "width": 48, "layers": 2, "feature_dim": 384})
    ears = MelAudioEncoder(bands=40, width=48, layers=2)
    trainer = Trainer(pair, dtype=torch.float32, ema=0.98)
    toy, levels = Toy(), signal_levels(default_scheduler(), torch.device("cpu"))
    region = 1 + 2 * (1 - toy.mask)[None, :, None]
    steps = 220
    for step in range(steps):
        batch, _ = toy.draw(8)
        terms = training_terms(
            pair.unet, hear(pair.audio, ears.mel(batch.sound), 8), batch, levels, toy.mask, region,
            drop_sound=0.1, dtype=torch.float32,
        )  # fmt: skip
        terms["loss"].backward()
        trainer.step(learning_rate(2e-3, step / steps))

    trainer.publish(trainer.average)
    batch, seen = toy.draw(12)
    noise = torch.randn(1, 4, 1, SIDE, SIDE)

    def agreement(unet: nn.Module, sound: torch.Tensor) -> float:
        with torch.no_grad():
            windows = hear(pair.audio, ears.mel(sound), 8)
        drawn = sample(
            unet, default_scheduler(), batch.masked, batch.reference, windows, toy.mask, noise,
            steps=10,
        )  # fmt: skip
        pairs = torch.stack([toy.read(drawn, batch, seen).flatten(), seen.flatten()])
        return float(torch.corrcoef(pairs)[0, 1])

    right = agreement(pair.unet, batch.sound)
    wrong = agreement(pair.unet, batch.sound.roll(1, 0))
    assert right > 0.4
    assert right > wrong + 0.3


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() == 1, reason="takes too long on one core")
def test_whole_path(tmp_path: Path) -> None:
    smoke.main(["--out", str(tmp_path), "--vae-steps", "4", "--unet-steps", "4"])
    curve = json.loads((tmp_path / "model" / "train_unet.json").read_text())
    assert curve["steps"] == 4
    assert curve["complete"]
    report = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert set(report["recordings"]) == {"drawn0", "drawn1"}
    for recording in report["recordings"].values():
        # An untrained model draws noise; the VAE row and the pasted mouth are real figures.
        assert recording["mouth"]["copy"]["psnr"] > recording["mouth"]["ours"]["psnr"]
    assert (tmp_path / "mini" / "unet.safetensors").stat().st_size > 1e5
    assert "held out" in (tmp_path / "mini" / "README.md").read_text()
    assert (tmp_path / "docs" / "curves.png").exists()
