"""Frames of two clips above each other in one picture: the clip and what was made of it.

python examples/contact_sheet.py in.mp4 out.mp4 sheet.jpg --columns 8 --crop 60 90 320 350
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from lsync_compile.media.video import count_frames, read_frames


def row(path: Path, positions: list[int], crop: tuple[int, ...] | None, width: int) -> np.ndarray:
    """The frames at ``positions`` side by side, (height, width * n, 3) uint8 RGB."""
    pictures = []
    for index, frame in enumerate(read_frames(path)):
        if index in positions:
            left, top, right, bottom = crop or (0, 0, frame.shape[1], frame.shape[0])
            part = frame[top:bottom, left:right]
            height = round(width * part.shape[0] / part.shape[1])
            pictures.append(cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA))
    return np.concatenate(pictures, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--width", type=int, default=170, help="of one frame in pixels")
    parser.add_argument(
        "--crop", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), default=None
    )
    arguments = parser.parse_args()
    shortest = min(count_frames(arguments.before), count_frames(arguments.after))
    positions = np.linspace(0, shortest - 1, arguments.columns).round().astype(int).tolist()
    crop = None if arguments.crop is None else tuple(arguments.crop)
    rows = [
        row(path, positions, crop, arguments.width) for path in (arguments.before, arguments.after)
    ]
    picture = np.concatenate(rows, axis=0)
    cv2.imwrite(str(arguments.sheet), picture[..., ::-1])


if __name__ == "__main__":
    main()
