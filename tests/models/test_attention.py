"""Attention and the transformer of a frame."""

from __future__ import annotations

import torch

from lsync_compile.models.attention import Attention, Transformer3DModel


def test_attention_to_a_context_is_softmax_attention() -> None:
    torch.manual_seed(0)
    attention = Attention(6, heads=1, context_dim=4)
    x, context = torch.randn(2, 7, 6), torch.randn(2, 3, 4)
    scores = attention.to_q(x) @ attention.to_k(context).transpose(1, 2) / 6**0.5
    expected = attention.to_out[0](torch.softmax(scores, dim=-1) @ attention.to_v(context))
    torch.testing.assert_close(attention(x, context), expected, rtol=0, atol=1e-6)


def test_frames_do_not_see_each_other_and_each_has_its_own_sound() -> None:
    torch.manual_seed(0)
    transformer = Transformer3DModel(16, heads=2, groups=4, audio_dim=5).eval()
    video, audio = torch.randn(2, 16, 3, 4, 6), torch.randn(6, 2, 5)
    with torch.no_grad():
        whole = transformer(video, audio)
        for b in range(2):
            for f in range(3):
                frame = transformer(video[b : b + 1, :, f : f + 1], audio[3 * b + f][None])
                torch.testing.assert_close(whole[b : b + 1, :, f : f + 1], frame, rtol=0, atol=1e-5)


def test_null_sound_adds_only_the_output_bias() -> None:
    attention = Attention(8, heads=2, context_dim=4)
    out = attention(torch.randn(2, 5, 8), torch.zeros(2, 3, 4))
    assert torch.equal(out, attention.to_out[0].bias.expand(2, 5, 8))
