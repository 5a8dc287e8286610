"""Draws the moving parts of a synthetic face: eyes with lids and gaze, lips, teeth and tongue.

Pictures are (n, 3, f, 256, 256) float tensors in [0, 1]; `x` and `y` give the place of each
pixel on the resting head, (n, f, 256, 256), in pixels of the aligned face square. Numbers of an
identity arrive as (n, 1, 1, 1), its colours as (n, 3, 1, 1, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.paint import CENTRE, FULL, PAD, SIZE, bump, edge, lerp, ramp, tilt

# Rows that the eyes and the mouth can reach, whatever the identity and the motion.
EYE_ROWS = slice(30, 120)
MOUTH_ROWS = slice(112, 256)


@dataclass
class Motion:
    """What n faces do in f frames; every tensor is (n, f) unless said otherwise.

    Attributes:
        opening: 0 closed to 1 widest.
        width: -1 rounded to 1 spread.
        blink: 0 eyes open to 1 shut.
        gaze: (n, f, 2) iris offset in pixels.
        pose: (n, f, 6) shift x, shift y (pixels), roll (degrees), scale, yaw and pitch (pixels by
            which the middle of the face moves against its rim).
    """

    opening: Tensor
    width: Tensor
    blink: Tensor
    gaze: Tensor
    pose: Tensor


def head_coordinates(motion: Motion, v: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each pixel lies on the resting head (x, y) and in the scene behind it.

    Four tensors (n, f, 256, 256) in texture pixels.
    """
    line = torch.arange(SIZE, device=motion.opening.device, dtype=torch.float32) + 0.5
    row, column = line[:, None] - CENTRE, line[None, :] - CENTRE
    shift_x, shift_y, roll, scale, yaw, pitch = (p[..., None, None] for p in motion.pose.unbind(-1))
    cos, sin = tilt(roll)
    x = ((column - shift_x) * cos + (row - shift_y) * sin) / scale + CENTRE
    y = ((row - shift_y) * cos - (column - shift_x) * sin) / scale + CENTRE
    # Turning the head moves what is near the camera (the nose) further than what is not.
    near = bump(x - CENTRE, y - v["nose_y"] - 12, 62, 66)
    still_x = x + 0.8 * yaw + 0 * y
    still_y = y + 0.8 * pitch
    return x - yaw * near, y - pitch * near, still_x, still_y


def sample(texture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Texture (n, c, FULL, FULL) looked up at (n, f, h, w) pixels: (n, c, f, h, w)."""
    n, frames, height, width = x.shape
    where = torch.stack([x + PAD, y + PAD], dim=-1) * (2 / FULL) - 1
    flat = F.grid_sample(
        texture,
        where.view(n, frames * height, width, 2),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return flat.view(n, -1, frames, height, width)


@dataclass
class Mouth:
    """The lines of the mouth in each frame, all (n, f, 1, 1), in pixels of the resting head."""

    row: Tensor
    half: Tensor
    drop: Tensor
    lip_up: Tensor
    lip_low: Tensor
    smile: Tensor

    @classmethod
    def of(cls, motion: Motion, v: dict[str, Tensor]) -> Mouth:
        opening = motion.opening[..., None, None].clamp(0, 1)
        width = motion.width[..., None, None].clamp(-1, 1)
        half = v["mouth_w"] * (1 + v["width_gain"] * width - 0.06 * opening)
        drop = v["hmax"] * opening * (1 - 0.12 * width.clamp(min=0))
        plump = 1 - 0.18 * width - 0.12 * opening
        return cls(
            v["mouth_y"],
            half,
            drop,
            v["lip_up"] * plump,
            v["lip_low"] * plump,
            v["corner"] + 3.5 * width,
        )

    def skin_row(self, x: Tensor, y: Tensor) -> Tensor:
        """Row of the resting skin that shows at each pixel when the jaw has dropped."""
        return y - self._lowered(x, y)

    def _lowered(self, x: Tensor, y: Tensor) -> Tensor:
        across = torch.exp(-0.5 * ((x - CENTRE) / (1.9 * self.half)) ** 2)
        return 0.72 * self.drop * across * ramp(y, self.row - 6, self.row + 26 + 0.8 * self.drop)

    def draw(
        self, picture: Tensor, x: Tensor, y: Tensor, v: dict[str, Tensor], paint: dict[str, Tensor]
    ) -> None:
        """Draws lips, teeth and tongue onto the picture (n, 3, f, 256, 256), in place."""
        rows = MOUTH_ROWS
        u, y = x[:, :, rows] - CENTRE, y[:, :, rows]
        t = (u / self.half).clamp(-1.25, 1.25)
        bow_t = (1 - t * t).clamp(min=0)
        arch = bow_t.sqrt() * (0.35 + 0.65 * bow_t)
        line = self.row + self.smile * (0.55 - t * t)
        inner_up = line - 0.20 * self.drop * arch
        inner_low = line + 0.80 * self.drop * (0.5 * arch + 0.5 * bow_t.sqrt())
        dip = v["bow"] * (
            torch.exp(-0.5 * (t / 0.13) ** 2)
            - 0.6 * torch.exp(-0.5 * ((t.abs() - 0.26) / 0.16) ** 2)
        )
        upper = inner_up - self.lip_up * (bow_t**0.75) * (1 - dip)
        lower = inner_low + self.lip_low * (bow_t**0.6)

        base = picture[:, :, :, rows]
        within = edge((1 - t.abs()) * self.half, 1.2)
        lips = edge(y - upper, 1.1) * edge(lower - y, 1.1) * within
        below = bump(u, y - lower - 5, 0.55 * self.half, 4)
        corner = bump(u.abs() - self.half - 1, y - line, 5, 4)
        base = base * (1 - 0.16 * below - 0.22 * corner)[:, None]

        skin_light = (base.mean(1, keepdim=True) / paint["skin"].mean(1, keepdim=True)).clamp(
            0.2, 1.3
        )
        rise = ((y - inner_low) / (lower - inner_low).clamp(min=1)).clamp(0, 1)
        fall = ((inner_up - y) / (inner_up - upper).clamp(min=1)).clamp(0, 1)
        is_low = edge(y - 0.5 * (inner_up + inner_low), 1.0)
        tone = (0.74 + 0.20 * fall) * (1 - is_low) + (1.06 - 0.32 * rise * rise) * is_low
        wrinkle = 1 + 0.05 * torch.sin(u * 1.1 + 6 * t * t) * torch.sin(u * 0.47 + 1.3)
        gloss = v["lip_gloss"] * is_low * bump(u - 5, y - inner_low - 0.4 * self.lip_low, 17, 2.6)
        lip = paint["lip"] * (tone * wrinkle)[:, None] * (0.35 + 0.65 * skin_light) + gloss[:, None]
        base = lerp(base, lip, 0.92 * lips)

        inside = self._inside(u, y, t, line, inner_up, inner_low, v)
        gap = (edge(y - inner_up + 0.7, 0.8) * edge(inner_low - y + 0.7, 0.8)) * within
        picture[:, :, :, rows] = lerp(base, inside, gap)

    def _inside(
        self,
        u: Tensor,
        y: Tensor,
        t: Tensor,
        line: Tensor,
        up: Tensor,
        low: Tensor,
        v: dict[str, Tensor],
    ) -> Tensor:
        """Dark mouth with tongue and both rows of teeth: (n, 3, f, h, w) in [0, 1]."""
        deep = (y - up) / (low - up).clamp(min=4)
        colour = u.new_tensor([0.16, 0.045, 0.045])[:, None, None, None]
        inside = colour * (0.6 + 0.8 * deep.clamp(0, 1))[:, None]
        tongue = bump(u, y - low - 1, 0.62 * self.half, 0.34 * self.drop + 2) * v["tongue"]
        flesh = u.new_tensor([0.66, 0.30, 0.29])[:, None, None, None] * (0.7 + 0.3 * deep)[:, None]
        inside = lerp(inside, flesh, (tongue * ramp(self.drop, 8, 22)).clamp(0, 1))

        curve = 6 * t * t
        tooth = v["teeth_width"] * (1 - 0.35 * t * t).clamp(min=0.3)
        seam = torch.exp(-0.5 * ((torch.remainder(u / tooth, 1) - 0.5).abs() - 0.5) ** 2 / 0.004)
        white = v["teeth_white"] * (1 - 0.42 * t * t - v["gaps"] * seam)
        ivory = u.new_tensor([1.0, 0.95, 0.86])[:, None, None, None]
        # The upper teeth belong to the skull: they do not move; the lower ones go with the jaw.
        bottom = line + v["teeth_y"] + v["teeth_h"] * 0.35 - curve
        row = edge(bottom - y, 0.9) * edge((0.9 - t.abs()) * self.half, 2.0)
        inside = lerp(inside, ivory * (white * (0.62 + 0.38 * ramp(y - up, 0, 7)))[:, None], row)
        top = line + 0.80 * self.drop - 4 - 0.25 * v["teeth_h"] + 1.2 * curve
        row = edge(y - top, 0.9) * edge((0.72 - t.abs()) * self.half, 2.0) * (1 - row)
        return lerp(inside, ivory * (0.72 * white)[:, None], 0.85 * row)


def draw_eyes(
    picture: Tensor,
    x: Tensor,
    y: Tensor,
    motion: Motion,
    v: dict[str, Tensor],
    paint: dict[str, Tensor],
) -> None:
    """Draws both eyes with lids and gaze onto the picture (n, 3, f, 256, 256), in place."""
    y = y[:, :, EYE_ROWS]
    blink = motion.blink[..., None, None]
    gaze_x, gaze_y = (g[..., None, None] for g in motion.gaze.unbind(-1))
    for side, columns in ((-1, slice(8, 124)), (1, slice(132, 248))):
        u = x[:, :, EYE_ROWS, columns] - CENTRE - side * v["eye_x"]
        down = y[..., columns] - v["eye_y"]
        base = picture[:, :, :, EYE_ROWS, columns]
        t = (u / v["eye_w"]).clamp(-1.3, 1.3)
        round_t = (1 - t * t).clamp(min=0)
        slant = -side * v["eye_tilt"] * t
        open_lid = slant - v["eye_h"] * round_t**0.7
        low = slant + 0.55 * v["eye_h"] * round_t
        lid = open_lid + (low - open_lid) * blink
        within = edge((1 - t.abs()) * v["eye_w"], 1.0)
        light = base.mean(1, keepdim=True) / paint["skin"].mean(1, keepdim=True)

        ball = edge(down - lid, 0.7) * edge(low - down, 0.7) * within
        white = (0.84 - 0.25 * t * t) * (0.62 + 0.38 * ramp(down - lid, 0, 7))
        eye = white[:, None] * u.new_tensor([1.0, 0.95, 0.92])[:, None, None, None]
        du, dv = u - gaze_x, down - 0.3 * gaze_y + 0.12 * v["eye_h"]
        radius = ((du / 1.3) ** 2 + dv**2).sqrt()
        ring = paint["iris_colour"] * (0.75 + 0.5 * ramp(dv, -6, 8))[:, None]
        ring = ring * (1 - 0.6 * ramp(radius, v["iris"] - 2.5, v["iris"]))[:, None]
        eye = lerp(eye, ring, edge(v["iris"] - radius, 0.6))
        eye = eye * (1 - 0.95 * edge(0.42 * v["iris"] - radius, 0.6))[:, None]
        eye = eye + 0.8 * bump(du + 3.5, dv + 3, 1.7, 1.4)[:, None]
        base = lerp(base, eye * (0.3 + 0.7 * light.clamp(0.3, 1.2)), ball)

        lash = torch.exp(-0.5 * ((down - lid) / 1.3) ** 2) * within * v["lid_line"]
        under = torch.exp(-0.5 * ((down - low) / 1.0) ** 2) * within * 0.35
        fold = (
            torch.exp(-0.5 * ((down - open_lid + 5.5) / 1.4) ** 2)
            * within
            * v["crease"]
            * (1 - blink)
        )
        dark = 1 - (lash + under + fold).clamp(max=1) * 0.85
        picture[:, :, :, EYE_ROWS, columns] = base * dark[:, None]
