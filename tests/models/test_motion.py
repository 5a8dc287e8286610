"""Temporal attention against its definition."""

from __future__ import annotations

import math

import torch

from lsync_compile.models.motion import MotionModule, PositionalEncoding, TemporalAttention


def test_position_table_alternates_sine_and_cosine() -> None:
    table = PositionalEncoding(8, 5).pe
    assert table.shape == (1, 5, 8)
    for frame in range(5):
        for pair in range(4):
            angle = frame / 10000 ** (2 * pair / 8)
            assert math.isclose(table[0, frame, 2 * pair], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(table[0, frame, 2 * pair + 1], math.cos(angle), abs_tol=1e-6)


def test_temporal_attention_is_softmax_attention_over_positioned_frames() -> None:
    torch.manual_seed(0)
    attention = TemporalAttention(8, heads=2, inner_dim=8, max_len=6)
    assert attention.pos_encoder is not None
    x = torch.randn(3, 5, 8)
    positioned = x + attention.pos_encoder.pe[:, :5]
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (
            positioned @ layer.weight[head].T
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 2.0, dim=-1) @ v)
    expected = attention.to_out[0](torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-6)


def module(position: bool) -> MotionModule:
    torch.manual_seed(0)
    return MotionModule(
        16,
        num_attention_heads=2,
        num_transformer_block=1,
        temporal_position_encoding=position,
        zero_initialize=False,
        norm_num_groups=4,
    ).eval()


def test_without_positions_the_order_of_frames_does_not_matter() -> None:
    video = torch.randn(2, 16, 4, 3, 5)
    order = torch.tensor([2, 0, 3, 1])
    for position in (False, True):
        motion = module(position)
        with torch.no_grad():
            shuffled = motion(video[:, :, order])
            same = torch.allclose(shuffled, motion(video)[:, :, order], atol=1e-5)
        assert same is not position


def test_pixels_attend_to_themselves_only() -> None:
    """Swapping two pixel positions in all frames swaps them in the result, nothing else."""
    motion = module(position=True)
    video = torch.randn(1, 16, 4, 1, 5)
    order = torch.tensor([0, 3, 2, 1, 4])
    with torch.no_grad():
        torch.testing.assert_close(
            motion(video[..., order]), motion(video)[..., order], rtol=0, atol=1e-5
        )


def test_a_batch_is_its_videos() -> None:
    motion = module(position=True)
    videos = torch.randn(3, 16, 4, 2, 5)
    with torch.no_grad():
        apart = torch.cat([motion(video[None]) for video in videos])
        torch.testing.assert_close(motion(videos), apart, rtol=0, atol=1e-5)
