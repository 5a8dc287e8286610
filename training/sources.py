"""Clips of talking faces for training: recordings with variations, and drawn people.

A clip is a run of aligned faces with its sound, which reaches `CONTEXT` frames past both ends
so that the sound encoder sees what surrounds every frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from training.augment import borrow_voice, jitter_colour, jitter_geometry, jitter_sound
from training.speech import SpeechSampler
from training.synthetic import FaceSampler

SAMPLES = 640  # samples of sound a frame: 16 kHz at 25 frames/s
# Share of the clips whose surroundings say something else than the mouth does.
SURROUNDED = 0.7
CONTEXT = 16  # frames of sound before and after a chunk; the sound encoder sees 9 of them


@dataclass
class Recording:
    """One take of one person.

    name: for reports; kind: "real" or "portrait".
    frames: ``(N, 3, S, S)`` uint8 aligned faces, 25 a second.
    sound: ``(N * 640,)`` fp32 at 16 kHz.
    train: number of frames from the start that may be trained on.
    second: another take with the same motion of the head and other words, where there is one.
    """

    name: str
    kind: str
    frames: Tensor
    sound: Tensor
    train: int
    second: Recording | None = field(default=None, repr=False)


@dataclass
class Clips:
    """n clips of L frames: pixels ``(n, L, 3, S, S)`` in [-1, 1], a second take with the same
    pose and another speech where there is one, sound ``(n, (L + 2 CONTEXT) * 640)``."""

    frames: Tensor
    other: Tensor | None
    sound: Tensor


@dataclass
class Footage:
    """Everything that training draws from, on one device.

    mask: ``(1, S, S)``, 1 is kept, 0 is generated. speech: sounds that drive drawn people.
    """

    recordings: list[Recording]
    speech: Sequence[Tensor]
    mask: Tensor
    size: int

    @property
    def device(self) -> torch.device:
        return self.mask.device

    def of(self, kind: str) -> list[Recording]:
        return [r for r in self.recordings if r.kind == kind]

    def held_out_faces(self, n: int) -> Tensor:
        """``(n, 3, S, S)`` uint8 faces, evenly from the held-out ends of the real recordings."""
        kept = torch.cat([r.frames[r.train :] for r in self.of("real")])
        return kept[torch.linspace(0, len(kept) - 1, n, device=kept.device).long()]

    def describe(self) -> dict[str, object]:
        return {
            "recordings": [
                {"name": r.name, "kind": r.kind, "frames": len(r.frames), "trained on": r.train}
                for r in self.recordings
            ],
            "speech for drawn people, seconds": round(sum(len(s) for s in self.speech) / 16000),
        }


class ClipMaker:
    """Draws clips of each kind: "real", "portrait" and "synthetic"."""

    def __init__(self, footage: Footage, *, seed: int) -> None:
        self.footage = footage
        self.size, self.device, self.mask = footage.size, footage.device, footage.mask
        self._faces = FaceSampler(seed=seed, device=footage.device)
        self._speech = SpeechSampler(footage.speech, seed=seed, device=footage.device)
        self._soft = soften(footage.mask)

    def clips(self, kind: str, n: int, length: int) -> Clips:
        if kind == "synthetic":
            return self.drawn(n, length)
        takes = [r for r in self.footage.of(kind) if r.train >= length]
        if not takes:
            raise ValueError(f"no {kind} recording has {length} frames to train on")
        weights = torch.tensor([float(r.train) for r in takes])
        picked = torch.multinomial(weights, n, replacement=True).tolist()
        parts = [self.recorded(takes[i], length) for i in picked]
        others = [p.other for p in parts if p.other is not None]
        return Clips(
            torch.cat([p.frames for p in parts]),
            torch.cat(others) if len(others) == n else None,
            torch.cat([p.sound for p in parts]),
        )

    @torch.no_grad()
    def recorded(self, take: Recording, length: int) -> Clips:
        """A varied part of a recording.

        Real takes are played at another speed. In most, what surrounds the mouth is from another
        time: whoever knows the frame by its eyes, or sees the chin drop below the mask, would
        otherwise know the mouth without listening. In two of five, other words are spoken, as
        loud as the true ones: whoever knows the words by heart would know the mouth without
        having learned what opens one.
        """
        real = take.kind == "real"
        tempo = float(torch.empty(1).uniform_(0.8, 1.2)) if real else 1.0
        tempo = min(tempo, (take.train - 1) / length)
        start = int(torch.randint(take.train - math.ceil(length * tempo) + 1, (1,)))
        frames, sound = at_tempo(take, start, length, tempo)
        if real and float(torch.rand(1)) < SURROUNDED:
            frames = self._exchange_surroundings(take, frames)
        if real and float(torch.rand(1)) < 0.4:
            other = self._speech.batch(1, length, margin=CONTEXT).sound
            sound = borrow_voice(sound[None], other)[0]
        if take.second is not None:
            frames = torch.cat(
                [frames, take.second.frames[start : start + length].float() / 127.5 - 1]
            )
        varied = jitter_colour(jitter_geometry(frames[None]))
        sound = jitter_sound(sound[None])
        if take.second is None:
            return Clips(varied, None, sound)
        other = varied[:, length:]
        return Clips(self._surround(varied[:, :length], other), other, sound)

    def _surround(self, clips: Tensor, other: Tensor) -> Tensor:
        """Mouths of ``clips (n, L, 3, S, S)`` in frames of the same motion with another speech.

        This is what a model meets: cheeks and chin outside the mask still say the old words. In
        a clip of one piece they say the new ones, and a model that reads them need not listen.
        """
        chosen = torch.rand(len(clips), 1, 1, 1, 1, device=clips.device) < SURROUNDED
        return torch.where(chosen, clips + (other - clips) * self._soft, clips)

    def _exchange_surroundings(self, take: Recording, frames: Tensor) -> Tensor:
        """Put the lower faces of ``frames (L, 3, S, S)`` into the part that fits them best."""
        length = len(frames)
        starts = torch.randint(take.train - length + 1, (8,)).tolist()
        seam = (self._soft * (1 - self._soft))[None]
        parts = [take.frames[s : s + length].float() / 127.5 - 1 for s in starts]
        gaps = torch.stack([((p - frames).abs() * seam).mean() for p in parts])
        # The best fit may be the clip itself; the third best is another time, and near enough.
        chosen = parts[int(gaps.argsort()[2])]
        return frames + (chosen - frames) * self._soft

    @torch.no_grad()
    def drawn(self, n: int, length: int) -> Clips:
        """New people who say something, and the same motion of the head with another speech."""
        said = self._speech.batch(n, length, margin=CONTEXT)
        unheard = self._speech.batch(n, length)
        people = self._faces.identity(n)
        motion = self._faces.motion(said.opening, said.width)
        frames = self._faces.render(people, motion)
        motion.opening, motion.width = unheard.opening, unheard.width
        both = torch.cat([frames, self._faces.render(people, motion)], dim=1)
        pixels = jitter_colour(self.resize(both), strength=0.5)
        pixels = jitter_geometry(pixels, strength=0.5)
        heard, other = pixels[:, :length], pixels[:, length:]
        return Clips(self._surround(heard, other), other, jitter_sound(said.sound))

    def resize(self, clips: Tensor) -> Tensor:
        """uint8 ``(n, L, 3, 256, 256)`` -> fp32 in [-1, 1] at the training size."""
        pixels = clips.float() / 127.5 - 1
        if pixels.shape[-1] == self.size:
            return pixels
        small = F.interpolate(pixels.flatten(0, 1), (self.size, self.size), mode="area")
        return small.view(*pixels.shape[:3], self.size, self.size)


def at_tempo(take: Recording, start: int, length: int, tempo: float) -> tuple[Tensor, Tensor]:
    """``length`` frames from ``start``, and their sound, of a take played ``tempo`` times as fast.

    Returns:
        frames ``(length, 3, S, S)`` in [-1, 1], each the nearest in time, and the sound
        ``((length + 2 CONTEXT) * 640,)``, in another pitch then, as a record's; silence where
        the part that may be trained on has ended.
    """
    device = take.frames.device
    # A frame stands for its middle: that of the first one stays where it is.
    when = start + 0.5 + torch.arange(length, device=device) * tempo
    frames = take.frames[when.long().clamp(max=take.train - 1)].float() / 127.5 - 1
    if tempo == 1:
        return frames, part_of_sound(take.sound[: take.train * SAMPLES], start, length)
    wanted = torch.arange((length + 2 * CONTEXT) * SAMPLES, device=device)
    place = (start + 0.5) * SAMPLES + (wanted - (CONTEXT + 0.5) * SAMPLES) * tempo
    last = take.train * SAMPLES - 1
    low = place.floor().long()
    sound = take.sound
    mixed = torch.lerp(sound[low.clamp(0, last)], sound[(low + 1).clamp(0, last)], place - low)
    return frames, mixed * ((place >= 0) & (place <= last))


def part_of_sound(sound: Tensor, start: int, length: int) -> Tensor:
    """Samples of ``length`` frames from ``start`` with `CONTEXT` around; silence past the ends."""
    first, last = (start - CONTEXT) * SAMPLES, (start + length + CONTEXT) * SAMPLES
    inside = sound[max(first, 0) : min(last, len(sound))]
    return F.pad(inside, (max(-first, 0), max(last - len(sound), 0)))


def soften(mask: Tensor) -> Tensor:
    """The mask with an edge of about a 16th of the side; ``(1, S, S)``."""
    reach = max(1, mask.shape[-1] // 32)
    padded = F.pad(mask[None], (reach,) * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * reach + 1, stride=1)[0]


class FacePool:
    """Single faces for the VAE: of recordings, portraits and a changing set of drawn people."""

    PER_CLIP = 6

    def __init__(
        self,
        footage: Footage,
        clips: int,
        *,
        seed: int,
        shares: tuple[float, float, float] = (0.45, 0.15, 0.4),
        piece: int = 8,
    ) -> None:
        self.maker = ClipMaker(footage, seed=seed)
        self.footage, self.piece = footage, piece
        self.recorded = [
            torch.cat([r.frames[: r.train] for r in footage.of(kind)])
            if footage.of(kind)
            else torch.empty(0, device=footage.device)
            for kind in ("real", "portrait")
        ]
        weights = torch.tensor(shares) * torch.tensor(
            [float(len(f) > 0) for f in self.recorded] + [float(clips > 0)]
        )
        self.shares = (weights / weights.sum()).tolist()
        self.drawn = torch.cat([self._draw() for _ in range(-(-clips // piece))])
        self._next = 0

    @torch.no_grad()
    def _draw(self) -> Tensor:
        pixels = self.maker.drawn(self.piece, self.PER_CLIP).frames.flatten(0, 1)
        return ((pixels + 1) * 127.5).round().to(torch.uint8)

    def refresh(self, clips: int) -> None:
        """Replace the oldest drawn people."""
        for _ in range(-(-clips // self.piece)):
            faces = self._draw()
            at = (torch.arange(len(faces)) + self._next) % len(self.drawn)
            self.drawn[at.to(self.drawn.device)] = faces
            self._next = (self._next + len(faces)) % len(self.drawn)

    def batch(self, n: int) -> Tensor:
        """``(n, 3, S, S)`` uint8, the kinds in fixed shares."""
        real, portrait = (round(n * share) for share in self.shares[:2])
        counts = (real, portrait, n - real - portrait)
        return torch.cat(
            [
                faces[torch.randint(len(faces), (count,), device=faces.device)]
                for faces, count in zip((*self.recorded, self.drawn), counts, strict=True)
                if count
            ]
        )

    def describe(self) -> str:
        sizes = [len(f) for f in (*self.recorded, self.drawn)]
        return f"faces to draw from: {sizes[0]} real, {sizes[1]} portrait, {sizes[2]} synthetic"
