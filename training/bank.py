"""Latents of talking clips, kept on the device so that a UNet step never waits for a VAE.

A frame's latents are 8 KB, so thousands of clips fit where a few pictures would. The bank is
filled once and then renewed all the time, a few clips every few steps: new people, new motion,
new framing and light of the recordings. Each slot is one clip of fixed length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.codec import encode
from training.sources import CONTEXT, SAMPLES, ClipMaker, Clips

KINDS = ("real", "portrait", "synthetic")


@dataclass
class Batch:
    """B chunks of F frames; latents ``(B, 4, F, h, w)`` fp32.

    sound ``(B, (F + 2 CONTEXT) * 640)`` starts ``CONTEXT`` frames before the chunk.
    """

    target: Tensor
    masked: Tensor
    reference: Tensor
    sound: Tensor


class LatentBank:
    """Slots of encoded clips, a fixed share for each kind of footage.

    Args:
        maker: draws clips.
        vae: frozen VAE that encodes them.
        slots: number of clips of each kind, in the order of ``KINDS``; zero leaves a kind out.
        shares: chance that a chunk is of each kind.
        length: frames of a slot, at least 32 so that a reference can be from elsewhere.
    """

    def __init__(
        self,
        maker: ClipMaker,
        vae: AutoencoderKL,
        *,
        slots: tuple[int, int, int],
        shares: tuple[float, float, float],
        length: int,
        piece: int = 8,
    ) -> None:
        self.maker, self.vae, self.length, self.piece = maker, vae, length, piece
        self.counts = torch.tensor(slots)
        self.starts = torch.cumsum(self.counts, 0) - self.counts
        weights = torch.tensor(shares) * (self.counts > 0)
        self.shares = (weights / weights.sum()).to(maker.device)
        self._next = [0, 0, 0]
        total, side = sum(slots), maker.size // 8

        def empty(*shape: int) -> Tensor:
            return torch.zeros(total, *shape, device=maker.device, dtype=torch.float16)

        self.target = empty(length, 4, side, side)
        self.masked, self.other = torch.zeros_like(self.target), torch.zeros_like(self.target)
        self.has_other = torch.zeros(total, dtype=torch.bool, device=maker.device)
        self.sound = empty((length + 2 * CONTEXT) * SAMPLES)
        self.made = 0

    def fill(self) -> None:
        """Make every slot once."""
        for kind in range(len(KINDS)):
            for _ in range(0, int(self.counts[kind]), self.piece):
                self._renew(kind, self.piece)

    def refresh(self, n: int) -> None:
        """Replace the ``n`` oldest slots of a kind drawn by the shares."""
        kind = int(torch.multinomial(self.shares.cpu(), 1))
        self._renew(kind, n)

    def _renew(self, kind: int, n: int) -> None:
        n = min(n, int(self.counts[kind]))
        clips = self.maker.clips(KINDS[kind], n, self.length)
        at = (torch.arange(n) + self._next[kind]) % self.counts[kind] + self.starts[kind]
        self._next[kind] = int((self._next[kind] + n) % self.counts[kind])
        self._write(at.to(self.target.device), clips)
        self.made += n

    @torch.no_grad()
    def _write(self, at: Tensor, clips: Clips) -> None:
        n = len(at)
        mask = self.maker.mask

        def latents(frames: Tensor) -> Tensor:
            flat = encode(self.vae, frames.flatten(0, 1))
            return flat.view(n, self.length, *flat.shape[1:]).half()

        self.target[at] = latents(clips.frames)
        self.masked[at] = latents(clips.frames * mask)
        self.has_other[at] = clips.other is not None
        if clips.other is not None:
            self.other[at] = latents(clips.other)
        self.sound[at] = clips.sound.half()

    def batch(self, n: int, frames: int) -> Batch:
        """Draw ``n`` chunks of ``frames`` frames with references from another time.

        Where the slot has a second take (the same person and pose, another speech), the
        reference is that take at the same time in half of the cases: this is what the pipeline
        feeds the model, and a mouth that must not be copied. Otherwise the reference is a part
        of the clip that does not overlap the chunk; one in five is a still.
        """
        device = self.target.device
        kind = torch.multinomial(self.shares, n, replacement=True)
        counts, starts = self.counts.to(device)[kind], self.starts.to(device)[kind]
        slot = starts + (torch.rand(n, device=device) * counts).long()
        spare = self.length - frames
        start = (torch.rand(n, device=device) * (spare + 1)).long().clamp(max=spare)
        # At least `gap` frames away, around the clip's end if need be but never across it.
        gap = min(frames, spare // 2)
        away = gap + (torch.rand(n, device=device) * (spare - 2 * gap + 1)).long()
        there = (start + away) % (spare + 1)
        second = self.has_other[slot] & (torch.rand(n, device=device) < 0.5)
        there = torch.where(second, start, there)
        still = torch.rand(n, device=device) < 0.2

        steps = torch.arange(frames, device=device)
        rows = slot[:, None]
        here_at = start[:, None] + steps
        there_at = there[:, None] + torch.where((still & ~second)[:, None], 0, steps)
        own, taken = self.target[rows, there_at], self.other[rows, there_at]
        reference = torch.where(second[:, None, None, None, None], taken, own)
        samples = torch.arange((frames + 2 * CONTEXT) * SAMPLES, device=device)
        sound = self.sound[rows, start[:, None] * SAMPLES + samples]

        def video(x: Tensor) -> Tensor:
            return x.transpose(1, 2).float()

        return Batch(
            video(self.target[rows, here_at]),
            video(self.masked[rows, here_at]),
            video(reference),
            sound.float(),
        )

    def describe(self) -> str:
        parts = [f"{int(c)} {name}" for c, name in zip(self.counts, KINDS, strict=True)]
        return f"bank of {', '.join(parts)} clips of {self.length} frames"
