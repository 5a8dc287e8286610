"""Face detection with InsightFace, as the original LatentSync does it.

Needs the extra ``lsync-compile[insightface]`` and InsightFace's ``buffalo_l`` models, which that
package downloads on first use and whose licence allows non-commercial research only.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from lsync_compile.errors import OptionError
from lsync_compile.media.faces import Face, Frame, Points, usable

# Indices into InsightFace's 106 landmarks.
_LEFT_BROW = [43, 48, 49, 50, 51]
_RIGHT_BROW = [101, 102, 103, 104, 105]
_NOSE = [74, 77, 83, 86]
_DETECTION_SIZE = 512


class InsightFaceDetector:
    """Largest face of a frame with InsightFace's detector and 106 landmarks. For one thread.

    Args:
        min_score: confidence in [0, 1] that a face must reach.
        device: ``"cpu"`` or ``"cuda"``, the latter with onnxruntime-gpu.
        root: folder that holds InsightFace's ``models`` folder; None for its own default.

    Raises:
        OptionError: the package is not installed or `device` is unknown.
    """

    def __init__(
        self, *, min_score: float = 0.5, device: str = "cpu", root: str | Path | None = None
    ) -> None:
        providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
        if device not in providers:
            raise OptionError(f"device {device!r} for InsightFace: use 'cpu' or 'cuda'")
        try:
            package: Any = importlib.import_module("insightface.app")
        except ImportError as error:
            raise OptionError(
                "face detector 'insightface' is not installed: "
                "pip install 'lsync-compile[insightface]', or use the detector 'mtcnn'"
            ) from error
        where = {} if root is None else {"root": str(root)}
        self._app = package.FaceAnalysis(
            allowed_modules=["detection", "landmark_2d_106"],
            providers=[providers[device]],
            **where,
        )
        self._app.prepare(
            ctx_id=0 if device == "cuda" else -1, det_size=(_DETECTION_SIZE, _DETECTION_SIZE)
        )
        self._min_score = min_score

    def detect(self, frame: Frame) -> Face | None:
        """The largest usable face of an RGB frame (H, W, 3) uint8, or None."""
        # RGB, though the package expects BGR: so does LatentSync, and its checkpoints were trained
        # on the crops that this gives.
        found = self._app.get(np.ascontiguousarray(frame))
        faces = [
            Face(
                np.asarray(face.bbox, dtype=np.float64),
                np.asarray(face.kps, dtype=np.float64),
                _alignment_points(np.asarray(face.landmark_2d_106, dtype=np.float64)),
                float(face.det_score),
            )
            for face in found
            if face.det_score >= self._min_score
        ]
        best = usable(faces, *frame.shape[:2])
        return best[0] if best else None


def _alignment_points(landmarks: Points) -> Points:
    """Brows and nose (3, 2) from 106 landmarks (106, 2), rounded twice as the original does."""
    whole = np.round(landmarks)
    groups = (_LEFT_BROW, _RIGHT_BROW, _NOSE)
    return np.round(np.stack([whole[group].mean(axis=0) for group in groups]))
