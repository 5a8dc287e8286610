"""Convolutions see frames, norms see videos, and sizes halve and come back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsync_compile.models.resnet import (
    Downsample3D,
    FrameConv2d,
    ResnetBlock3D,
    Upsample3D,
    batch_to_frames,
    frames_to_batch,
)


def test_frames_to_batch_keeps_frames_of_a_video_together() -> None:
    video = torch.arange(2 * 3 * 4).view(2, 3, 4, 1, 1)
    flat = frames_to_batch(video)
    assert flat.shape == (8, 3, 1, 1)
    assert torch.equal(flat[5], video[1, :, 1])
    assert torch.equal(batch_to_frames(flat, 4), video)


def test_convolution_is_per_frame() -> None:
    conv = FrameConv2d(3, 5, kernel_size=3, padding=1)
    video = torch.randn(2, 3, 4, 6, 7)
    out = conv(video)
    expected = F.conv2d(video[1, :, 2][None], conv.weight, conv.bias, padding=1)[0]
    torch.testing.assert_close(out[1, :, 2], expected, rtol=0, atol=1e-5)


def test_residual_block_norms_over_all_frames() -> None:
    torch.manual_seed(0)
    block = ResnetBlock3D(8, 12, temb_channels=6, groups=4, eps=1e-5)
    video, temb = torch.randn(2, 8, 3, 4, 4), torch.randn(2, 6)
    expected = F.silu(block.norm1(video))
    whole_video = video.view(2, 4, -1)  # one mean and variance a group: over frames and pixels
    mean, variance = whole_video.mean(-1), whole_video.var(-1, unbiased=False)
    by_hand = (whole_video - mean[..., None]) / (variance[..., None] + 1e-5).sqrt()
    torch.testing.assert_close(F.silu(by_hand.view_as(video)), expected, rtol=0, atol=1e-5)

    brighter = video.clone()
    brighter[:, :, 2] += 3.0
    change = (block(brighter, temb) - block(video, temb)).abs().amax(dim=(0, 1, 3, 4))
    assert (change > 1e-3).all(), "one frame moves the statistics of the others"


def test_time_embedding_and_output_scale() -> None:
    torch.manual_seed(0)
    block = ResnetBlock3D(8, 8, temb_channels=6, groups=4, eps=1e-5)
    assert block.conv_shortcut is None
    video = torch.randn(1, 8, 2, 4, 4)
    one, other = block(video, torch.zeros(1, 6)), block(video, torch.ones(1, 6))
    assert not torch.allclose(one, other)
    halved = ResnetBlock3D(8, 8, temb_channels=6, groups=4, eps=1e-5, output_scale=2.0)
    halved.load_state_dict(block.state_dict())
    torch.testing.assert_close(halved(video, torch.zeros(1, 6)) * 2, one)


@pytest.mark.parametrize(("size", "half"), [((8, 8), (4, 4)), ((7, 5), (4, 3)), ((1, 2), (1, 1))])
def test_down_rounds_up_and_up_restores(size: tuple[int, int], half: tuple[int, int]) -> None:
    video = torch.randn(1, 4, 2, *size)
    down = Downsample3D(4)(video)
    assert down.shape[3:] == half
    assert Upsample3D(4)(down, size).shape == video.shape


def test_upsampling_repeats_the_nearest_pixel() -> None:
    up = Upsample3D(1)
    with torch.no_grad():
        up.conv.weight.zero_()
        up.conv.weight[0, 0, 1, 1] = 1.0  # the identity
        up.conv.bias.zero_()
        out = up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 1, 2, 2), (4, 4))
    expected = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    assert torch.equal(out[0, 0, 0], expected)
