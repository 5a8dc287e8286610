"""Paints the parts of a synthetic head that do not move: skin, nose, brows, hair, background.

Everything here happens once for each identity. The painted layers are textures that
`training.synthetic` moves with the head and the jaw; eyes and mouth are drawn on top, frame by
frame.

Coordinates are pixels of the aligned 256x256 face square, x to the right and y down. The square
shows an area of 210:280 squeezed to 1:1, so a round iris is a third wider than it is tall. The
textures reach `PAD` pixels past each side, which gives the head room to move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 256
PAD = 32
FULL = SIZE + 2 * PAD
CENTRE = SIZE / 2

Values = Mapping[str, Tensor]


def lerp(base: Tensor, top: Tensor, alpha: Tensor) -> Tensor:
    """`top` laid over `base` (n, 3, ...) with coverage `alpha` (n, ...)."""
    return base + (top - base) * alpha[:, None]


def edge(distance: Tensor, softness: float | Tensor = 1.0) -> Tensor:
    """Soft step from 0 (far below zero) to 1, about four `softness` pixels wide."""
    return torch.sigmoid(distance / softness)


def bump(x: Tensor, y: Tensor, width: float | Tensor, height: float | Tensor) -> Tensor:
    """A Gaussian hill of height 1 around the origin, with the given standard deviations."""
    return torch.exp(-0.5 * ((x / width) ** 2 + (y / height) ** 2))


def ramp(value: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Cubic step from 0 at `low` to 1 at `high`."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def plane(values: Values, name: str) -> Tensor:
    """A number for each identity, (n,), shaped to broadcast over a picture: (n, 1, 1)."""
    return values[name][:, None, None]


def colour(values: Values, name: str) -> Tensor:
    """A colour for each identity, (n, 3), shaped to broadcast over a picture: (n, 3, 1, 1)."""
    return values[name][:, :, None, None]


def noise(n: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Smooth random texture (n, FULL, FULL), mean 0, with `rows` x `columns` independent cells."""
    cells = torch.randn(n, 1, rows, columns, generator=generator, device=generator.device)
    return F.interpolate(cells, (FULL, FULL), mode="bicubic", align_corners=False)[:, 0]


def grid(device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of every texture pixel, each (1, FULL, FULL)."""
    line = torch.arange(FULL, device=device, dtype=torch.float32) - PAD + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x[None], y[None]


def outline(v: Values, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (roughly, in pixels) into the face: cheeks straight, jaw rounded."""
    top = plane(v, "mouth_y") - 55
    down = ((y - top) / (plane(v, "chin_y") - top)).clamp(0, 1.3)
    width = plane(v, "face_w") * (1 - 0.10 * down)
    reach = (1 - down.clamp(max=1) ** plane(v, "jaw_power")).clamp(min=0) ** (
        1 / plane(v, "jaw_power")
    )
    side = width * (0.03 + 0.97 * reach) - (x - CENTRE).abs()
    bottom = plane(v, "chin_y") - y
    return torch.minimum(side, bottom)


def relief(v: Values, x: Tensor, y: Tensor) -> Tensor:
    """Height of the face towards the camera in pixels; its slope decides the shading."""
    u = x - CENTRE
    mirrored = u.abs()
    nose_y, mouth_y, eye_y = plane(v, "nose_y"), plane(v, "mouth_y"), plane(v, "eye_y")
    head = (u / (1.12 * plane(v, "face_w"))) ** 2 + ((y - 120) / 165) ** 2
    z = 125 * (1 - head).clamp(min=0.02).sqrt()
    bridge = ramp(y, eye_y - 18, nose_y) * (1 - ramp(y, nose_y - 1, nose_y + 17))
    nose_w = plane(v, "nose_w")
    spread = nose_w * (0.55 + 0.35 * ramp(y, eye_y, nose_y))
    z = z + plane(v, "nose_z") * bridge * torch.exp(-0.5 * (u / spread) ** 2)
    z = z + 8 * bump(mirrored - 1.2 * nose_w, y - nose_y - 1, 0.55 * nose_w, 7.5)
    z = z - plane(v, "socket") * bump(mirrored - plane(v, "eye_x") + 8, y - eye_y + 2, 24, 12)
    z = z + 5 * bump(mirrored - plane(v, "eye_x"), y - plane(v, "brow_y"), 34, 8)
    z = z + plane(v, "cheek") * bump(mirrored - 74, y - nose_y + 6, 30, 22)
    z = z + 9 * bump(u, y - mouth_y, 46, 24)
    z = z - 5 * bump(u, y - mouth_y - plane(v, "lip_low") - 12, 30, 7)
    z = z + plane(v, "chin_z") * bump(u, y - plane(v, "chin_y") + 22, 26, 13)
    z = z - 2.5 * bump(u, y - (nose_y + mouth_y) / 2 - 3, 5, 12)
    # The fold from the wing of the nose to beside the corner of the mouth.
    along = ((y - nose_y) / (mouth_y + 8 - nose_y)).clamp(-0.3, 1.2)
    fold = mirrored - (1.5 * nose_w + along * (plane(v, "mouth_w") + 10 - 1.5 * nose_w))
    fade = ramp(along, -0.2, 0.2) * (1 - ramp(along, 0.8, 1.15))
    return z - plane(v, "fold") * fade * torch.exp(-0.5 * (fold / 6) ** 2)


def shade(v: Values, height: Tensor) -> tuple[Tensor, Tensor]:
    """Diffuse and specular light, each (n, FULL, FULL), for a height map of the same shape."""
    slope_y, slope_x = torch.gradient(height, dim=(1, 2))
    length = (1 + slope_x**2 + slope_y**2).sqrt()
    light = F.normalize(v["light"], dim=1)
    lx, ly, lz = (light[:, i, None, None] for i in range(3))
    lambert = ((lz - lx * slope_x - ly * slope_y) / length).clamp(min=0)
    half = F.normalize(light + light.new_tensor([0, 0, 1]), dim=1)
    hx, hy, hz = (half[:, i, None, None] for i in range(3))
    glint = ((hz - hx * slope_x - hy * slope_y) / length).clamp(min=0) ** 24
    ambient = plane(v, "ambient")
    return ambient + (1 - ambient) * lambert, glint * plane(v, "shine")


def face_layer(v: Values, generator: torch.Generator) -> Tensor:
    """Skin with nose, brows, beard and side hair: (n, 4, FULL, FULL), colour in [0, 1] and alpha.

    There is bare skin where the eyes and the lips will be drawn.
    """
    n = len(v["seed"])
    x, y = grid(generator.device)
    u, mirrored = x - CENTRE, (x - CENTRE).abs()
    nose_y, mouth_y, eye_y = plane(v, "nose_y"), plane(v, "mouth_y"), plane(v, "eye_y")
    fine, middle, coarse = (noise(n, s, s, generator) for s in (240, 60, 9))

    skin = colour(v, "skin") * (1 + 0.05 * coarse + 0.022 * middle + 0.02 * fine)[:, None]
    flush = plane(v, "flush") * (
        bump(mirrored - 76, y - nose_y - 8, 28, 20) + 0.7 * bump(u, y - nose_y, 18, 9)
    )
    skin = skin * (1 - flush[:, None] * skin.new_tensor([0.05, 0.28, 0.24])[:, None, None])
    tired = plane(v, "tired") * bump(mirrored - plane(v, "eye_x") + 6, y - eye_y - 12, 20, 5)
    makeup = plane(v, "makeup") * bump(mirrored - plane(v, "eye_x"), y - eye_y + 9, 26, 5)
    skin = lerp(skin, skin * 0.72, (tired + makeup).clamp(0, 1))
    for spot in range(2):
        x_spot = CENTRE + plane(v, f"mole_x{spot}")
        mole = plane(v, f"mole{spot}") * bump(x - x_spot, y - plane(v, f"mole_y{spot}"), 2.2, 1.7)
        skin = lerp(skin, skin * 0.4, mole)

    hair = colour(v, "hair") * (1 + 0.25 * fine + 0.15 * middle)[:, None].clamp(0.3, 1.8)
    jaw = ramp(y - 0.30 * mirrored, nose_y - 12, nose_y + 26)
    around_mouth = bump(u, y - mouth_y, plane(v, "mouth_w") * 0.95, 13)
    beard = plane(v, "beard") * jaw * (1 - 0.9 * around_mouth)
    strip = (nose_y + 14 + mouth_y - plane(v, "lip_up")) / 2
    moustache = plane(v, "moustache") * bump(u, y - strip - 0.004 * u**2, 36, 7)
    growth = (torch.maximum(beard, moustache) * (0.80 + 0.35 * fine + 0.15 * coarse)).clamp(0, 0.95)
    skin = lerp(skin, hair, growth)

    arch = plane(v, "brow_y") - 4 + plane(v, "brow_arch") * (mirrored - plane(v, "eye_x") - 8) ** 2
    reach = (mirrored - plane(v, "eye_x")) / plane(v, "brow_w")
    thick = plane(v, "brow_h") * (1 - 0.35 * reach - 0.5 * reach**4).clamp(min=0.1)
    brow = edge(thick - (y - arch).abs(), 1.6) * edge((1 - reach.abs()) * 30, 2.5)
    brow = (brow * plane(v, "brow_alpha") * (0.85 + 0.3 * fine)).clamp(0, 1)
    skin = lerp(skin, hair * 0.8, brow)

    nostril_x, nose_w = 0.78 * plane(v, "nose_w"), plane(v, "nose_w")
    nostril = bump(mirrored - nostril_x, y - nose_y - 8, 0.33 * nose_w, 2.6) * 1.15
    crease = (
        0.5
        * torch.exp(
            -0.5
            * (
                (((mirrored - 1.25 * nose_w) / (0.8 * nose_w)) ** 2 + ((y - nose_y) / 9) ** 2 - 1)
                / 0.28
            )
            ** 2
        )
        * ramp(mirrored, nose_w, 1.7 * nose_w)
    )
    skin = lerp(
        skin, skin * skin.new_tensor([0.36, 0.24, 0.22])[:, None, None], nostril.clamp(0, 1)
    )
    skin = lerp(skin, skin * 0.72, crease.clamp(0, 1))

    diffuse, glint = shade(v, relief(v, x, y))
    inside = outline(v, x, y)
    rim = 0.72 + 0.28 * ramp(inside, 0, 26)
    tint = colour(v, "light_tint")
    skin = skin * (diffuse * rim)[:, None] * tint + (glint * (1 - growth))[:, None] * tint

    # Hair at the sides and the fringe: a wavy border, strands that run down.
    strands = noise(n, 10, 150, generator)
    waves = 6 * coarse + 3 * torch.sin(y / 21 + 4 * coarse)
    side = mirrored - plane(v, "hair_side") - 0.25 * (CENTRE - y).clamp(min=0) * 0.3 + waves
    side = side - 400 * ramp(y, plane(v, "hair_end"), plane(v, "hair_end") + 20)
    fringe = plane(v, "fringe_y") + 0.0016 * (u * plane(v, "fringe_side") + 40) ** 2 - y + waves
    lock = torch.maximum(edge(side, 2.0), edge(fringe, 2.0)) * plane(v, "has_hair")
    strand_colour = colour(v, "hair") * (1 + 0.22 * strands + 0.1 * fine)[:, None].clamp(0.4, 1.9)
    strand_colour = strand_colour * (0.75 + 0.35 * ramp(side, 0, 40))[:, None] * tint
    shadow = (edge(torch.maximum(side, fringe) + 9, 4.0) * plane(v, "has_hair") * 0.35).clamp(0, 1)
    skin = lerp(lerp(skin, skin * 0.5, shadow), strand_colour, lock)
    alpha = torch.maximum(edge(inside, 0.8), lock)
    return torch.cat([skin.clamp(0, 1), alpha[:, None]], dim=1)


def behind_layer(v: Values, generator: torch.Generator) -> Tensor:
    """Background, clothes, neck and long hair: (n, 3, FULL, FULL), colour in [0, 1]."""
    n = len(v["seed"])
    x, y = grid(generator.device)
    u, mirrored = x - CENTRE, (x - CENTRE).abs()
    turn = plane(v, "scene_turn")
    across = (0.5 + (u * turn.cos() + (y - CENTRE) * turn.sin()) / 400).clamp(0, 1)
    scene = colour(v, "scene_a") + (colour(v, "scene_b") - colour(v, "scene_a")) * across[:, None]
    blobs = plane(v, "scene_blobs") * noise(n, 7, 7, generator)
    grain = 0.03 * noise(n, 120, 120, generator)
    stripes = plane(v, "scene_bars") * edge(torch.sin((u + 40 * turn) / 24) * 12, 1.0)
    scene = scene * (1 + blobs + grain + stripes)[:, None]

    strands = noise(n, 8, 140, generator)
    hair = colour(v, "hair") * (0.65 + 0.25 * strands)[:, None]
    scene = lerp(scene, hair, edge(plane(v, "hair_back") - mirrored + 0.1 * y, 4.0))
    neck_w = plane(v, "neck_w") + 0.0025 * (y - 200).clamp(min=0) ** 2
    chin = plane(v, "chin_y") - 6 - 0.0035 * u**2
    dark = 0.42 + 0.38 * ramp(y - chin, 0, 55) - 0.2 * (mirrored / neck_w).clamp(max=1) ** 2
    tint = colour(v, "light_tint")
    scene = lerp(scene, colour(v, "skin") * dark[:, None] * tint, edge(neck_w - mirrored, 1.5))
    collar = y - plane(v, "collar_y") + 0.25 * mirrored * plane(v, "collar_v")
    cloth = colour(v, "cloth") * (1 + 0.12 * noise(n, 40, 40, generator))[:, None]
    scene = lerp(scene, cloth, edge(collar, 1.2))
    return scene.clamp(0, 1)


def over_layer(v: Values, generator: torch.Generator) -> Tensor:
    """Glasses in front of the eyes: (n, 4, FULL, FULL), colour in [0, 1] and alpha."""
    x, y = grid(generator.device)
    mirrored = (x - CENTRE).abs()
    dx, dy = mirrored - plane(v, "eye_x"), y - plane(v, "eye_y") - 3
    power = plane(v, "lens_power")
    radius = (
        (dx / plane(v, "lens_w")).abs() ** power + (dy / plane(v, "lens_h")).abs() ** power
    ) ** (1 / power)
    size = plane(v, "lens_h")
    thick = plane(v, "rim")
    frame = edge(thick - ((radius - 1) * size).abs(), 0.7)
    bridge = edge(thick - (dy + 4).abs(), 0.7) * edge(
        plane(v, "eye_x") - plane(v, "lens_w") - mirrored, 0.7
    )
    arm = edge(thick - (dy + 5).abs(), 0.7) * edge(
        mirrored - plane(v, "eye_x") - plane(v, "lens_w"), 0.7
    )
    line = torch.maximum(frame, torch.maximum(bridge, arm))
    lens = (
        0.10 * edge((1 - radius) * size, 1.0) * (0.4 + ramp(dx + dy, 6, 12) - ramp(dx + dy, 16, 22))
    )
    alpha = (line + lens * (1 - line)) * plane(v, "glasses")
    glass = torch.ones_like(line)[:, None].expand(-1, 3, -1, -1)
    return torch.cat(
        [lerp(glass, colour(v, "rim_colour").expand_as(glass), line), alpha[:, None]], 1
    )


def tilt(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles in degrees."""
    radians = angle * (math.pi / 180)
    return radians.cos(), radians.sin()
