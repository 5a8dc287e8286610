"""Makes a photographed face talk, by moving lips, jaw, lids and head of a single portrait.

The face is cut along the lines that a few hand-placed marks describe (lips, chin, eyelids). For
each frame the strips between these lines are stretched to their new places; what opens between
the lips is painted behind the portrait's own teeth. It takes a portrait that shows the upper
teeth. No network is involved, so the motion is known exactly and nothing has to be downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Eye:
    """Curves of one eye, as (x, y) points from left to right."""

    upper: tuple[tuple[float, float], ...]
    lower: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Marks:
    """Where things are in a portrait, in its pixels.

    Attributes:
        mouth: points (x, upper edge of the upper lip, its lower edge, upper edge of the lower
            lip, its lower edge), from corner to corner.
        nose_y: lower end of the nose.
        chin_y: lower end of the chin.
        neck_y: where the neck stops following the jaw.
        head: centre x, centre y and the two radii of the head.
        crop: x, y, width and height of the part to show.
    """

    mouth: tuple[tuple[float, float, float, float, float], ...]
    nose_y: float
    chin_y: float
    neck_y: float
    eyes: tuple[Eye, Eye]
    head: tuple[float, float, float, float]
    crop: tuple[float, float, float, float]


# The portrait of Eileen Collins (NASA, public domain) that scikit-image ships as astronaut.png.
ASTRONAUT = Marks(
    mouth=(
        (202.7, 139.5, 139.6, 139.7, 140.0),
        (206.0, 139.0, 140.4, 142.6, 145.0),
        (210.0, 139.3, 141.9, 146.1, 149.8),
        (215.0, 139.5, 143.2, 148.8, 152.8),
        (220.0, 140.0, 144.2, 149.9, 154.2),
        (224.0, 141.0, 144.6, 150.1, 154.6),
        (230.0, 140.2, 144.0, 149.3, 153.6),
        (235.0, 140.0, 142.6, 147.0, 151.0),
        (240.0, 139.9, 141.2, 144.0, 147.0),
        (245.0, 140.2, 140.4, 140.6, 141.0),
    ),
    nose_y=134.0,
    chin_y=177.0,
    neck_y=192.0,
    eyes=(
        Eye(
            ((191.5, 100.5), (195, 99.0), (200, 97.8), (205, 97.6), (209, 99.2), (214.5, 103.0)),
            (
                (191.5, 101.0),
                (195, 102.6),
                (200, 104.2),
                (205, 104.6),
                (209, 104.3),
                (214.5, 103.6),
            ),
        ),
        Eye(
            (
                (236.0, 104.8),
                (240, 102.2),
                (245, 100.4),
                (250, 100.0),
                (255, 101.0),
                (259.5, 103.6),
            ),
            (
                (236.0, 105.4),
                (240, 105.8),
                (245, 106.4),
                (250, 106.2),
                (255, 105.2),
                (259.5, 104.0),
            ),
        ),
    ),
    head=(225.0, 105.0, 62.0, 88.0),
    crop=(121.0, 14.0, 208.0, 260.0),
)


def curve(points: Sequence[tuple[float, float]], x: Floats) -> Floats:
    """Height of a smooth line through points with rising x, level beyond its ends."""
    xs, ys = np.array(points, np.float32).T
    fine = np.arange(xs[0] - 4, xs[-1] + 4, 0.25)
    bent = np.convolve(np.pad(np.interp(fine, xs, ys), 8, mode="edge"), _HANN, mode="valid")
    return np.asarray(np.interp(x, fine, bent), np.float32)


_HANN = np.hanning(19)[1:-1] / np.hanning(19)[1:-1].sum()


def curtain(y: Floats, source: Sequence[Floats], target: Sequence[Floats]) -> Floats:
    """Moves horizontal lines of a picture and stretches what lies between them.

    Args:
        y: (h, w) rows.
        source: lines of the original picture, top to bottom, each (h, w) or a number for all.
        target: where each of them shall appear; the first and the last must not move.

    Returns:
        (h, w) rows of the original picture to show at `y`.
    """
    rows = y
    for top, bottom, new_top, new_bottom in zip(
        source[:-1], source[1:], target[:-1], target[1:], strict=True
    ):
        part = (y - new_top) / np.maximum(new_bottom - new_top, 1e-3)
        inside = (y >= new_top) & (y < new_bottom)
        rows = np.where(inside, top + part * (bottom - top), rows)
    return np.asarray(rows, np.float32)


def soft_step(distance: Floats, softness: float) -> Floats:
    """0 far below zero, 1 far above."""
    return np.asarray(0.5 + 0.5 * np.tanh(distance / softness), np.float32)


def drift(frames: int, seconds: float, rng: np.random.Generator) -> Floats:
    """A smooth random track (frames,) of about unit size that changes over `seconds`."""
    knots = rng.normal(size=int(frames / (25 * seconds)) + 4)
    place = np.linspace(1, len(knots) - 2, frames)
    index = np.arange(len(knots))
    weights = np.exp(-0.5 * ((place[:, None] - index) / 0.6) ** 2)
    return np.asarray((weights @ knots) / np.sqrt((weights**2).sum(1)), np.float32)


@dataclass
class Pose:
    """What the head does in one frame: shifts in pixels of the portrait, roll in radians."""

    x: float = 0.0
    y: float = 0.0
    roll: float = 0.0
    zoom: float = 1.0
    yaw: float = 0.0
    blink: float = 0.0


class Puppet:
    """A portrait that can be shown with any opening and width of the mouth.

    Args:
        portrait: (H, W, 3) uint8 RGB.
        marks: its marks.
        size: (width, height) of the frames.
    """

    def __init__(self, portrait: Image, marks: Marks, size: tuple[int, int]) -> None:
        self.marks = marks
        self._portrait = portrait.astype(np.float32)
        left, top, width, height = marks.crop
        x = left + (np.arange(size[0], dtype=np.float32) + 0.5) * (width / size[0])
        y = top + (np.arange(size[1], dtype=np.float32) + 0.5) * (height / size[1])
        self._x, self._y = (a.astype(np.float32) for a in np.meshgrid(x, y))
        self._left, self._right = marks.mouth[0][0], marks.mouth[-1][0]

    def show(self, opening: float, width: float, pose: Pose) -> Image:
        """One frame; `opening` in [0, 1], `width` in [-1, 1]."""
        x, y = self._head(pose)
        middle = (self._left + self._right) / 2
        half = (self._right - self._left) / 2
        rest_y = self.marks.mouth[len(self.marks.mouth) // 2][2]
        # Upwards this fades fast: what LatentSync keeps must not tell how the mouth is drawn.
        reach = np.where(y < rest_y, 0.33 * half, half)
        near = np.exp(-0.5 * (((x - middle) / (1.5 * half)) ** 2 + ((y - rest_y) / reach) ** 2))
        stretch = 0.94 + 0.13 * width - 0.08 * opening
        picture = self._mouth(x + (x - middle) * (1 / stretch - 1) * near, y, opening, width)
        for eye in self.marks.eyes:
            picture = self._shut(picture, eye, x, y, pose.blink)
        blurred = cv2.GaussianBlur(picture, (0, 0), 1.6)
        sharp = np.clip(picture + 0.5 * (picture - blurred), 0, 255)
        return np.asarray(sharp.round(), np.uint8)

    def _head(self, pose: Pose) -> tuple[Floats, Floats]:
        """Where each pixel of the frame lies in the portrait, for head motion alone."""
        centre_x, centre_y, radius_x, radius_y = self.marks.head
        u, v = self._x - centre_x, self._y - centre_y
        far = np.sqrt((u / radius_x) ** 2 + (v / radius_y) ** 2)
        # Head and hair move as one; the background and the shoulders stay.
        weight = 1 - np.clip((far - 0.95) / 0.8, 0, 1)
        weight = weight * weight * (3 - 2 * weight)
        # The neck is the pivot of a roll.
        low = v - radius_y
        move_x = pose.x - pose.roll * low + (pose.zoom - 1) * u
        move_y = pose.y + pose.roll * u + (pose.zoom - 1) * v
        nose = np.exp(-0.5 * ((u / (0.45 * radius_x)) ** 2 + ((v - 20) / (0.4 * radius_y)) ** 2))
        x = self._x - weight * (move_x + pose.yaw * nose)
        y = self._y - weight * move_y
        return x.astype(np.float32), y.astype(np.float32)

    def _shut(self, picture: Floats, eye: Eye, x: Floats, y: Floats, blink: float) -> Floats:
        """Lowers the upper lid of an eye by the share `blink` of its height."""
        if blink <= 0:
            return picture
        upper, lower = curve(eye.upper, x), curve(eye.lower, x)
        across = (x - eye.upper[0][0]) / (eye.upper[-1][0] - eye.upper[0][0])
        inside = np.clip(np.minimum(across, 1 - across) * 20 + 0.5, 0, 1)
        brow = upper - 5.5
        lid = upper + blink * inside * (lower - upper)
        skin = self._look(x, brow + (y - brow) * 5.5 / (lid - brow))
        shown = inside * soft_step(y - brow, 0.3) * soft_step(lid - y, 0.4)
        return np.asarray(picture + (skin - picture) * shown[..., None], np.float32)

    def _mouth(self, x: Floats, y: Floats, opening: float, width: float) -> Floats:
        """The face with its mouth drawn, (h, w, 3) in 0 to 255."""
        marks = self.marks
        middle, half = (self._left + self._right) / 2, (self._right - self._left) / 2
        lines = [curve([(m[0], m[i]) for m in marks.mouth], x) for i in range(1, 5)]
        top, upper, lower, bottom = lines
        away = (x - middle) / half
        t = np.clip(away, -1, 1)
        arch = np.sqrt(1 - t**2) * (0.6 + 0.4 * (1 - t**2))
        gap = (lower - upper).max() * arch
        shut = max(0.0, 1 - opening / 0.35)
        pressed = 0.30 * (1 - opening)
        # The portrait smiles; speech needs corners that hang a little lower.
        calm = 2.0 * np.exp(-(((np.abs(away) - 1) / 0.45) ** 2)) - 0.9 * np.exp(
            -((away / 0.6) ** 2)
        )
        new_upper = upper + calm + gap * (0.42 * shut - 0.16 * opening)
        wide = 0.06 * (1 - shut) + 2.3 * opening
        new_lower = new_upper + gap * wide + 0.25 * arch
        plump = 1 - 0.16 * width - 0.10 * opening
        # Lips that rest on one another bulge a little.
        new_top = new_upper - (upper - top) * (plump + 0.3 * pressed)
        new_bottom = new_lower + (bottom - lower) * plump
        lowered = new_lower - lower - calm
        jaw = lowered[np.abs(away) < 0.2].mean() if (np.abs(away) < 0.2).any() else 0.0
        chin_shift = 0.85 * jaw * np.exp(-0.5 * ((x - middle) / (1.35 * half)) ** 2)

        def flat(value: float) -> Floats:
            return np.full_like(y, value)

        chin = flat(marks.chin_y)
        source = [flat(marks.nose_y), top, upper, lower, bottom, chin, flat(marks.neck_y + 8)]
        target = [
            source[0], new_top, new_upper, new_lower, new_bottom, chin + chin_shift, source[-1],
        ]  # fmt: skip
        skin = self._look(x, curtain(y, source, target))
        teeth_end = lower - 0.9
        teeth = self._look(x, np.clip(y, upper + 0.7, np.maximum(teeth_end - 0.4, upper + 0.7)))
        deep = np.clip((y - new_upper) / np.maximum(new_lower - new_upper, 2.5), 0, 1)[..., None]
        hollow = np.array([52, 20, 18], np.float32) * (1 - deep) + deep * np.array([118, 58, 54])
        hollow = hollow * (1 - 0.45 * t**2)[..., None]
        tooth = soft_step(teeth_end - y, 0.5) * soft_step((0.86 - np.abs(t)) * half, 1.5)
        # Between lips that almost touch there is a dark line and no teeth.
        tooth = tooth * np.clip((new_lower - new_upper - 0.6) / 1.5, 0, 1)
        # The upper lip throws a shadow on the teeth.
        teeth = teeth * (0.72 + 0.28 * np.clip((y - new_upper) / 2.5, 0, 1))[..., None]
        inside = hollow + (teeth - hollow) * tooth[..., None]
        hole = soft_step(y - new_upper, 0.45) * soft_step(new_lower - y, 0.45)
        hole = hole * (np.abs(away) < 1)
        return np.asarray(skin + (inside - skin) * hole[..., None], np.float32)

    def _look(self, x: Floats, y: Floats) -> Floats:
        """The portrait at fractional pixels, (h, w, 3)."""
        columns, rows = (a.astype(np.float32) - 0.5 for a in (x, y))
        looked = cv2.remap(
            self._portrait, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        return np.asarray(looked, np.float32)


def animate_portrait(
    portrait: Image,
    opening: Floats,
    width: Floats,
    *,
    marks: Marks = ASTRONAUT,
    size: tuple[int, int] = (384, 480),
    seed: int = 0,
) -> list[Image]:
    """Frames of a portrait whose mouth follows the given tracks.

    Args:
        portrait: (H, W, 3) uint8 RGB.
        opening: (f,) in [0, 1] at 25 frames a second.
        width: (f,) in [-1, 1].
        marks: marks of the portrait.
        size: (width, height) of the frames.
        seed: decides sway, nods and blinks.

    Returns:
        f frames (height, width, 3) uint8 RGB.
    """
    frames = len(opening)
    rng = np.random.default_rng(seed)
    x, y, roll, zoom, yaw = (drift(frames, 0.7, rng) for _ in range(5))
    nod = np.convolve(np.pad(opening, 6, mode="edge"), np.full(13, 1 / 13), mode="valid")
    blink = np.zeros(frames)
    start = float(rng.uniform(5, 30))
    while start < frames:
        blink = np.maximum(blink, np.clip(1.6 - np.abs(np.arange(frames) - start) / 1.9, 0, 1))
        start += float(rng.uniform(40, 110))
    puppet = Puppet(portrait, marks, size)
    return [
        puppet.show(
            float(opening[i]),
            float(width[i]),
            Pose(
                x=1.5 * float(x[i]),
                y=0.8 * float(y[i]) + 1.6 * float(nod[i]),
                roll=0.014 * float(roll[i]),
                zoom=1 + 0.008 * float(zoom[i]),
                yaw=1.3 * float(yaw[i]),
                blink=float(blink[i]),
            ),
        )
        for i in range(frames)
    ]
