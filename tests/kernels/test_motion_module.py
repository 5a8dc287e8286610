"""All kernels together: a motion module in the ``(b f) s c`` layout, from end to end."""

from __future__ import annotations

import torch

from lsync_compile.kernels import add_layer_norm, geglu, group_norm_silu, temporal_attention
from lsync_compile.models.motion import TemporalTransformer3DModel


def with_kernels(model, x, heads):
    """``model(x)``: rows stay frames, where the module itself makes positions of them."""
    batch, channels, frames, height, width = x.shape
    h = x.transpose(1, 2).flatten(0, 1)
    norm = model.norm
    h = group_norm_silu(h, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=False)
    h = model.proj_in(h.permute(0, 2, 3, 1).flatten(1, 2))  # (B*F, H*W, C)
    for block in model.transformer_blocks:
        first, second = block.attention_blocks
        first_norm, second_norm = block.norms
        position = first.pos_encoder.pe[0, :frames]
        normed = first_norm(h).unflatten(0, (batch, frames)) + position[:, None]
        h, normed = add_layer_norm(
            attention(first, normed.flatten(0, 1), frames, heads), h,
            second_norm.weight, second_norm.bias, second_norm.eps,
            second.pos_encoder.pe[0, :frames],
        )  # fmt: skip
        norm = block.ff_norm
        h, normed = add_layer_norm(
            attention(second, normed, frames, heads), h, norm.weight, norm.bias, norm.eps
        )
        h = block.ff.net[2](geglu(block.ff.net[0].proj(normed))) + h
    h = model.proj_out(h).view(batch, frames, height, width, channels)
    return h.permute(0, 4, 1, 2, 3) + x


def attention(module, x, frames, heads):
    weight = torch.cat([module.to_q.weight, module.to_k.weight, module.to_v.weight])
    q, k, v = torch.nn.functional.linear(x, weight).chunk(3, dim=-1)
    return module.to_out[0](temporal_attention(q, k, v, frames, heads))


def test_a_motion_module_without_rearranges(normal):
    torch.manual_seed(0)
    heads, channels = 2, 16
    model = TemporalTransformer3DModel(
        channels, inner_dim=channels, heads=heads, groups=4, layers=2, attentions=2, max_len=8
    ).requires_grad_(False)
    x = normal(2, 5, 3, 4, channels).movedim(-1, 1)  # channels-last
    out = with_kernels(model, x, heads)
    torch.testing.assert_close(out, model(x))
    assert out.stride() == x.stride()
