"""Synthetic talking faces with known mouth motion, for training the small model.

Each identity is a drawn head (`training.paint`) whose layers follow the head and whose skin
stretches with the jaw; eyes, lips, teeth and tongue are drawn for each frame. The pictures are
aligned face squares: brows and nose sit where LatentSync's three-point template puts them, so
that they mix with crops of real clips.

    faces = FaceSampler(seed=0, device="cuda")
    people = faces.identity(8)
    motion = faces.motion(opening, width)           # (8, f) tracks from `training.speech`
    frames = faces.render(people, motion)           # (8, f, 3, 256, 256) uint8
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.features import Motion, Mouth, draw_eyes, head_coordinates, sample
from training.paint import SIZE, behind_layer, face_layer, lerp, over_layer

# name: (low, high), drawn uniformly for each identity.
RANGES: dict[str, tuple[float, float]] = {
    "face_w": (106, 138), "chin_y": (216, 246), "jaw_power": (1.8, 2.6),
    "brow_gap": (14, 23), "brow_w": (28, 40), "brow_h": (2.5, 6.5), "brow_arch": (0.0, 0.008),
    "brow_alpha": (0.45, 0.98),
    "eye_y": (62, 78), "eye_x": (54, 68), "eye_w": (21, 28), "eye_h": (6.5, 10.5),
    "eye_tilt": (-3, 3),
    "iris": (7.5, 9.5), "lid_line": (0.4, 0.95), "crease": (0.05, 0.5),
    "nose_y": (103, 117), "nose_w": (13, 21), "nose_z": (11, 24), "socket": (4, 12),
    "cheek": (2, 9), "chin_z": (3, 11), "fold": (0, 2.4), "flush": (0.0, 0.7), "tired": (0.0, 0.4),
    "mouth_y": (152, 170), "mouth_w": (42, 58), "lip_up": (6, 13), "lip_low": (8, 17),
    "bow": (0.0, 0.35), "corner": (-4, 5), "lip_gloss": (0.0, 0.3), "hmax": (28, 46),
    "width_gain": (0.10, 0.24), "teeth_h": (8, 14), "teeth_white": (0.70, 0.92),
    "teeth_width": (9, 13), "teeth_y": (-3.0, 3.0), "gaps": (0.05, 0.3), "tongue": (0.3, 1.0),
    "ambient": (0.25, 0.6), "shine": (0.0, 0.22), "gain": (0.75, 1.25), "gamma": (0.8, 1.3),
    "sensor": (0.002, 0.018), "blur": (0.0, 1.0),
    "scene_turn": (0, 6.28), "scene_blobs": (0.0, 0.15),
    "neck_w": (84, 112), "collar_y": (236, 300), "collar_v": (-0.1, 0.6),
    "hair_side": (112, 150), "hair_end": (40, 330), "fringe_y": (-40, 26),
    "fringe_side": (-1.5, 1.5),
    "hair_back": (-80, 150), "lens_w": (29, 40), "lens_h": (22, 32), "lens_power": (2, 4),
    "rim": (0.8, 2.8),
    "mole_x0": (-90, 90), "mole_y0": (20, 220), "mole_x1": (-90, 90), "mole_y1": (20, 220),
}  # fmt: skip

# name: (chance, low, high): zero for most people, in the range for the rest.
SOMETIMES: dict[str, tuple[float, float, float]] = {
    "beard": (0.35, 0.15, 0.9), "moustache": (0.35, 0.2, 0.9), "glasses": (0.2, 1.0, 1.0),
    "has_hair": (0.9, 1.0, 1.0), "makeup": (0.35, 0.2, 0.7), "lipstick": (0.35, 0.3, 1.0),
    "scene_bars": (0.2, 0.03, 0.15), "mole0": (0.5, 0.4, 0.9), "mole1": (0.3, 0.4, 0.9),
}  # fmt: skip

# Skin from pale to dark, hair from black to fair and grey.
SKINS = [
    (0.95, 0.78, 0.69),
    (0.88, 0.67, 0.54),
    (0.76, 0.54, 0.40),
    (0.55, 0.36, 0.25),
    (0.33, 0.20, 0.14),
]
HAIRS = [
    (0.05, 0.04, 0.04),
    (0.16, 0.09, 0.06),
    (0.32, 0.19, 0.10),
    (0.55, 0.38, 0.20),
    (0.45, 0.16, 0.07),
    (0.55, 0.54, 0.53),
]
IRISES = [
    (0.18, 0.10, 0.05),
    (0.30, 0.19, 0.09),
    (0.25, 0.33, 0.20),
    (0.30, 0.42, 0.55),
    (0.40, 0.42, 0.44),
]


@dataclass
class Identity:
    """n people: their numbers, and the layers painted from them.

    Attributes:
        values: name -> (n,), or (n, 3) for colours in [0, 1].
        behind: (n, 3, FULL, FULL) background, neck and hair; half precision on a GPU.
        face: (n, 4, FULL, FULL) skin and front hair, with alpha.
        over: (n, 4, FULL, FULL) glasses, with alpha.
    """

    values: dict[str, Tensor]
    behind: Tensor
    face: Tensor
    over: Tensor

    def __len__(self) -> int:
        return len(self.face)


class FaceSampler:
    """Draws people, their idle motion, and pictures of them.

    The numbers are drawn on the CPU, so the same seed gives the same people on every device;
    fine texture and camera noise come from the device's own generator.
    """

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self._generator)

    def _mix(self, table: list[tuple[float, float, float]], n: int, spread: float) -> Tensor:
        """n colours between neighbours of a table; brightness varied by `spread`, hue by less."""
        position = self._uniform(n, high=len(table) - 1.001)
        low, part = position.long(), (position % 1)[:, None]
        colours = torch.tensor(table)
        mixed = colours[low] * (1 - part) + colours[low + 1] * part
        mixed = mixed * self._uniform(n, 1, low=1 - spread, high=1 + spread)
        hue = self._uniform(n, 3, low=-0.4 * spread, high=0.4 * spread)
        return (mixed * (1 + hue)).clamp(0.01, 1)

    def identity(self, n: int) -> Identity:
        """n new people, with their layers painted."""
        v = {k: self._uniform(n, low=low, high=high) for k, (low, high) in RANGES.items()}
        for name, (chance, low, high) in SOMETIMES.items():
            v[name] = (self._uniform(n) < chance) * self._uniform(n, low=low, high=high)
        v["brow_y"] = v["eye_y"] - v.pop("brow_gap")
        v["skin"] = self._mix(SKINS, n, 0.08)
        v["hair"] = self._mix(HAIRS, n, 0.2)
        v["iris_colour"] = self._mix(IRISES, n, 0.1)
        natural = v["skin"] * self._mix([(1.0, 0.62, 0.58), (0.88, 0.66, 0.66)], n, 0.06)
        painted = self._mix([(0.75, 0.10, 0.15), (0.80, 0.32, 0.36), (0.45, 0.10, 0.18)], n, 0.1)
        v["lip"] = natural + (painted - natural) * 0.75 * v["lipstick"][:, None]
        for name in ("scene_a", "scene_b", "cloth"):
            v[name] = self._uniform(n, 3, low=-0.15, high=0.15) + self._uniform(
                n, 1, low=0.1, high=0.9
            )
            v[name] = v[name].clamp(0.02, 0.98)
        v["rim_colour"] = self._uniform(n, 3, low=0.02, high=0.3)
        v["light"] = torch.stack(
            [
                self._uniform(n, low=-0.8, high=0.8),
                self._uniform(n, low=-0.9, high=0.1),
                torch.ones(n),
            ],
            1,
        )
        warmth = self._uniform(n, 1, low=-0.07, high=0.07)
        v["light_tint"] = self._uniform(n, 3, low=0.97, high=1.03) + warmth * torch.tensor(
            [1.0, 0.0, -1.0]
        )
        v["seed"] = torch.randint(2**31, (n,), generator=self._generator)
        seed = int(v["seed"].sum())
        v = {name: value.to(self.device) for name, value in v.items()}
        generator = torch.Generator(self.device).manual_seed(seed)
        return Identity(
            v, behind_layer(v, generator), face_layer(v, generator), over_layer(v, generator)
        )

    def _drift(self, n: int, frames: int, channels: int, seconds: float) -> Tensor:
        """Smooth random tracks (n, frames, channels) of unit size that change over `seconds`."""
        knots = max(4, int(frames / (25 * seconds)) + 4)
        track = torch.randn(n, channels, knots, 1, generator=self._generator)
        track = F.interpolate(track, (frames, 1), mode="bicubic", align_corners=True)
        return track[..., 0].transpose(1, 2)

    def motion(self, opening: Tensor, width: Tensor) -> Motion:
        """Adds head motion, gaze and blinks to mouth tracks.

        Args:
            opening: (n, f) in [0, 1].
            width: (n, f) in [-1, 1].
        """
        n, frames = opening.shape
        size = torch.tensor([1.6, 1.2, 1.0, 0.012, 4.0, 2.0])
        calm = self._uniform(n, 1, 1, low=0.2, high=1.2)
        pose = self._drift(n, frames, 6, 0.6) * size * calm
        # Where the aligned face rests differs between people and takes.
        pose = pose + torch.randn(n, 1, 6, generator=self._generator) * size * 1.2
        # An alignment that follows landmarks of its own for each frame trembles a little.
        pose[..., :2] += 0.25 * torch.randn(n, frames, 2, generator=self._generator)
        pose[..., 3] = 1 + pose[..., 3].clamp(-0.05, 0.05)
        pose[..., 4:] = pose[..., 4:].clamp(-11, 11)
        blink = torch.zeros(n, frames)
        time = torch.arange(frames)
        for _ in range(1 + frames // 75):
            start = self._uniform(n, 1, low=-20, high=frames + 40)
            blink = torch.maximum(blink, (1.5 - (time - start).abs() / 2.2).clamp(0, 1))
        steps = self._drift(n, frames, 2, 0.4).round() * 2.5
        moved = [opening, width, blink, steps.clamp(-5, 5), pose]
        return Motion(*(track.to(self.device, torch.float32) for track in moved))

    @torch.no_grad()
    def render(self, people: Identity, motion: Motion) -> Tensor:
        """Pictures (n, f, 3, 256, 256) uint8. The same input gives the same picture."""
        # (n, 1, 1, 1) numbers broadcast over (n, f, 256, 256) pictures.
        v = {k: t[:, None, None, None] for k, t in people.values.items() if t.ndim == 1}
        paint = {k: t[:, :, None, None, None] for k, t in people.values.items() if t.ndim == 2}
        x, y, still_x, still_y = head_coordinates(motion, v)
        mouth = Mouth.of(motion, v)

        skin_y = mouth.skin_row(x, y)
        picture = sample(people.behind, still_x, still_y)
        skin = sample(people.face, x, skin_y)
        picture = lerp(picture, skin[:, :3], skin[:, 3])
        draw_eyes(picture, x, y, motion, v, paint)
        mouth.draw(picture, x, y, v, paint)
        if bool(people.values["glasses"].any()):
            rows = slice(0, 144)
            glass = sample(people.over, x[:, :, rows], y[:, :, rows])
            picture[:, :, :, rows] = lerp(picture[:, :, :, rows], glass[:, :3], glass[:, 3])
        return self._camera(picture, people).transpose(1, 2).contiguous()

    def _camera(self, picture: Tensor, people: Identity) -> Tensor:
        """Exposure, softness and sensor noise; (n, 3, f, 256, 256) in [0, 1] to uint8."""
        n, _, frames = picture.shape[:3]
        v = {
            k: people.values[k][:, None, None, None, None]
            for k in ("gain", "gamma", "sensor", "blur")
        }
        flat = picture.reshape(n * 3 * frames, 1, SIZE, SIZE)
        soft = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(picture)
        picture = picture + (soft - picture) * v["blur"]
        picture = (picture * v["gain"]).clamp(1e-4, 1) ** v["gamma"]
        generator = torch.Generator(self.device).manual_seed(
            int(people.values["seed"].sum()) + frames
        )
        grain = torch.randn(picture.shape, generator=generator, device=self.device)
        return ((picture + grain * v["sensor"]).clamp(0, 1) * 255).round().to(torch.uint8)
