"""Where a face lies: the transform from frame to face square, and boxes around it. No pixels.

The two brow centres and the nose fix the transform; see :mod:`lsync_compile.media.align`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float32]

_POINTS = np.array([[17.0, 20.0], [58.0, 20.0], [37.5, 40.0]])
_WIDTH, _HEIGHT = 75, 100
FILL = 127.0  # grey level of what lies outside the frame
# What the transform's residual of the previous frame weighs against the present one.
_SMOOTHING = 0.2
# The bounding box of the pasted face is widened by this so that the mask is zero all around it,
# and its columns start and end at multiples of _LANES: vectorised filters round their last columns
# differently, so that otherwise a pixel's last bit would depend on the box.
_MARGIN = 2
_LANES = 32

Box = tuple[int, int, int, int]


def _ratio(resolution: int) -> float:
    return resolution / 256 * 2.8


def face_template(resolution: int) -> npt.NDArray[np.float64]:
    """Where left brow, right brow and nose lie in the face square: (3, 2), x and y in pixels."""
    return _POINTS * _ratio(resolution)


def face_size(resolution: int) -> tuple[int, int]:
    """Width and height of the face square before it is resized to the model's resolution."""
    ratio = _ratio(resolution)
    return int(_WIDTH * ratio), int(_HEIGHT * ratio)


class FaceAligner:
    """Landmarks to frame-to-face transforms, smoothed from each frame to the next.

    One instance serves one pass over one clip; call `reset` at a cut or before another clip.
    """

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self._template = face_template(resolution)
        self._bias: npt.NDArray[np.float64] | None = None

    def reset(self) -> None:
        """Forget the previous frame."""
        self._bias = None

    def matrix(self, landmarks: npt.ArrayLike) -> Matrix:
        """Transform from frame to face-square pixels, (2, 3) float32.

        Args:
            landmarks: (3, 2) left brow, right brow and nose in frame pixels. The original rounds
                them to whole pixels first; this is left to the detector.

        Raises:
            ValueError: the points coincide, so that no scale can be had from them.
        """
        matrix, bias = _similarity(np.asarray(landmarks, dtype=np.float64), self._template)
        if self._bias is not None:
            bias = _SMOOTHING * self._bias + (1 - _SMOOTHING) * bias
        self._bias = bias
        matrix[:, 2] += bias
        return matrix.astype(np.float32)


def _similarity(
    points: npt.NDArray[np.float64], template: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rotation and uniform scale that bring `points` onto `template`, and the nose's residual.

    Procrustes analysis; the scale is the ratio of the standard deviations. The residual is in
    units of the standard deviation and unrotated, as the original has it.
    """
    centre, target = points.mean(axis=0), template.mean(axis=0)
    spread, target_spread = (points - centre).std(ddof=1), (template - target).std(ddof=1)
    if not spread > 0:
        raise ValueError("the three landmarks coincide: no face transform can be had from them")
    source = (points - centre) / spread
    goal = (template - target) / target_spread
    u, _, vt = np.linalg.svd(source.T @ goal)
    if np.linalg.det(vt.T @ u.T) < 0:
        vt[-1] *= -1
    linear = target_spread / spread * (vt.T @ u.T)
    matrix = np.column_stack([linear, target - linear @ centre])
    return matrix, goal[2] - source[2]


def invert(matrix: Matrix) -> npt.NDArray[np.float64]:
    """The transform from face square to frame, (2, 3)."""
    full = np.vstack([np.asarray(matrix, dtype=np.float64), [0.0, 0.0, 1.0]])
    return np.linalg.inv(full)[:2]


def bounds(to_image: npt.NDArray[np.float64], size: tuple[int, int], image: tuple[int, int]) -> Box:
    """Box (x0, y0, x1, y1) of an image that a rectangle of `size` covers, with a margin."""
    w, h = size
    corners = np.array([[-1, -1, 1], [w, -1, 1], [-1, h, 1], [w, h, 1]], dtype=np.float64)
    points = corners @ to_image.T
    low = np.floor(points.min(axis=0)).astype(int) - _MARGIN
    high = np.ceil(points.max(axis=0)).astype(int) + _MARGIN + 1
    return (
        max(0, int(low[0]) // _LANES * _LANES),
        max(0, int(low[1])),
        min(image[0], -(-int(high[0]) // _LANES) * _LANES),
        min(image[1], int(high[1])),
    )
