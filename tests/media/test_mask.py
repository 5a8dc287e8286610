"""The mouth mask: its shape, and pictures that replace it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from lsync_compile.errors import CheckpointError
from lsync_compile.media.mask import mouth_mask


@pytest.mark.parametrize("resolution", [64, 128, 256, 512])
def test_shape_of_the_built_in_mask(resolution):
    mask = mouth_mask(resolution)
    assert mask.shape == (1, resolution, resolution)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    generated = mask[0] == 0
    rows = generated.any(1).nonzero().flatten() / resolution
    columns = generated.any(0).nonzero().flatten() / resolution
    tolerance = 1.5 / resolution
    assert rows.min() == pytest.approx(0.37, abs=0.003 + tolerance)
    assert rows.max() == pytest.approx(0.95, abs=0.003 + tolerance)
    assert columns.min() == pytest.approx(0.036, abs=0.003 + tolerance)
    assert columns.max() == pytest.approx(0.964, abs=0.003 + tolerance)
    assert generated.float().mean() == pytest.approx(0.407, abs=0.004 + tolerance)


def test_the_nose_is_kept_and_the_mouth_is_not():
    mask = mouth_mask(256)[0]
    assert mask[110, 128] == 1
    assert mask[110, 30] == mask[110, 226] == 0
    assert mask[170, 128] == 0


def test_built_in_mask_covers_what_latentsync_covers(shared):
    ours = mouth_mask(256)[0] < 0.5
    theirs = mouth_mask(256, shared / "data/upstream/mask.png")[0] < 0.5
    union = (ours | theirs).sum()
    assert (ours & theirs).sum() / union >= 0.98


def test_a_picture_replaces_it(tmp_path):
    picture = np.full((256, 256, 3), 255, dtype=np.uint8)
    picture[128:] = 0
    path = tmp_path / "mask.png"
    cv2.imwrite(str(path), picture)
    mask = mouth_mask(64, path)
    assert mask.shape == (1, 64, 64)
    assert (mask[0, :30] == 1).all()
    assert (mask[0, 34:] == 0).all()
    assert 0 <= mask.min() <= mask.max() <= 1


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_missing_or_broken_picture_is_named(tmp_path, content):
    path = tmp_path / "mask.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"mask\.png"):
        mouth_mask(64, path)
