"""Contact sheets: rows of faces with a label each, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_LABEL = 118  # pixels for the label at the left of a row
_BAR = 26  # pixels for the bars under the rows


def contact_sheet(
    path: Path,
    rows: Mapping[str, Tensor],
    *,
    side: int = 128,
    bars: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``rows`` (label -> ``(n, 3, H, W)`` in [-1, 1]) and, below them, a strip of bars.

    bars: label -> ``(n,)`` in [0, 1], one height for each column (loudness, mouth opening).
    """
    count = max(len(faces) for faces in rows.values())
    bars = bars or {}
    sheet = Image.new(
        "RGB", (_LABEL + count * side, len(rows) * side + len(bars) * _BAR), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for row, (label, faces) in enumerate(rows.items()):
        draw.text((6, row * side + side // 2 - 6), label, fill=(0, 0, 0))
        small = torch.nn.functional.interpolate(faces.float().cpu(), (side, side), mode="area")
        pixels = ((small.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for column, picture in enumerate(pixels):
            place = (_LABEL + column * side, row * side)
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), place)
    for row, (label, heights) in enumerate(bars.items()):
        bottom = len(rows) * side + (row + 1) * _BAR - 2
        draw.text((6, bottom - _BAR // 2 - 6), label, fill=(0, 0, 0))
        for column, height in enumerate(heights.clamp(0, 1).tolist()):
            left = _LABEL + column * side
            top = bottom - round(height * (_BAR - 4))
            draw.rectangle((left + 8, top, left + side - 8, bottom), fill=(60, 90, 160))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
