"""The shapes in which LatentSync calls each kernel, for all that measures or compiles kernels.

At 512 px the UNet works on latents of 64, 32, 16 and 8 pixels a side with 320, 640, 1280 and 1280
channels, on 16 frames, twice for guidance. Activations are channels-last; queries, keys and values
are slices of one fused projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import mouth_mask
from torch import Tensor

from lsync_compile.kernels.fp8_linear import quantised
from lsync_compile.kernels.lip_tables import encode_region
from lsync_compile.kernels.residual_moments import residual_moments_reference
from lsync_compile.kernels.upsample_conv import phases_of

Draw = Callable[..., Tensor]  # shape -> numbers of that shape

LEVELS = ((64, 320), (32, 640), (16, 1280), (8, 1280))
BATCH, FRAMES, HEADS, GROUPS, SOUND_TOKENS = 2, 16, 8, 32, 50


@dataclass(frozen=True)
class Case:
    """One call of a kernel: ``arguments(draw)`` makes the op's arguments."""

    kernel: str
    label: str
    side: int
    arguments: Callable[[Draw], tuple[Any, ...]]


def cases(
    levels: tuple[tuple[int, int], ...] = LEVELS, batch: int = BATCH, frames: int = FRAMES
) -> list[Case]:
    """All kernels at all levels, the largest level first; then the middle of the VAE."""
    found = [
        Case(
            kernel, f"{what}{side}x{side}, {width} channels", side, make(side, width, batch, frames)
        )
        for side, width in levels
        for kernel, what, make in (
            ("temporal_attention", "", _temporal_attention),
            ("spatial_attention", "frames ", _attention_within_frames),
            ("spatial_attention", "sound ", _attention_to_sound),
            ("group_norm_silu", "frames ", _group_norm_frames),
            ("group_norm_silu", "video ", _group_norm_video),
            ("residual_moments", "sum ", _residual_moments),
            ("group_norm_from_moments", "measured ", _group_norm_from_moments),
            ("lip_attention", "cells of 2 ", _lip_attention(2)),
            ("lip_attention", "cells of 4 ", _lip_attention(4)),
            ("geglu", "", _geglu),
            ("linear_geglu", "projected ", _linear_geglu),
            ("feed_forward", "ending ", _feed_forward),
            ("fp8_linear", "queries, keys, values ", _fp8_linear(1, 3)),
            ("fp8_linear", "feed-forward in ", _fp8_linear(1, 8)),
            ("fp8_linear", "feed-forward out ", _fp8_linear(4, 1)),
            ("add_layer_norm", "", _add_layer_norm),
            ("layer_norm", "alone ", _layer_norm),
            ("upsample_conv", "to ", _upsample_conv),
        )
    ]
    if levels == LEVELS:
        vae = Case("spatial_attention", "VAE 64x64, 512 channels", 64, _attention_in_vae(frames))
        found.append(vae)
    return found


def _temporal_attention(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        q, k, v = draw(batch * frames, side * side, 3 * width).chunk(3, dim=2)
        return q, k, v, frames, HEADS, None

    return arguments


def _attention_within_frames(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        q, k, v = draw(batch * frames, side * side, 3 * width).chunk(3, dim=2)
        return q, k, v, HEADS, None

    return arguments


def _lip_attention(pool: int) -> Callable[..., Callable[[Draw], tuple[Any, ...]]]:
    """A halo of one token around the mouth, cells of pool x pool elsewhere."""

    def case(side: int, width: int, batch: int, frames: int) -> Callable[[Draw], tuple[Any, ...]]:
        def arguments(draw: Draw) -> tuple[Any, ...]:
            q, k, v = draw(batch * frames, side * side, 3 * width).chunk(3, dim=2)
            region = encode_region(mouth_mask(64)[0] < 0.5)
            return q, k, v, HEADS, region, 1, pool, pool, 1.0, None

        return arguments

    return case


def _attention_in_vae(frames: int) -> Callable[[Draw], tuple[Any, ...]]:
    """One head over all positions of a picture."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        q, k, v = draw(frames, 64 * 64, 3 * 512).chunk(3, dim=2)
        return q, k, v, 1, None

    return arguments


def _attention_to_sound(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """Keys and values of one fused projection of the sound."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        k, v = draw(batch * frames, SOUND_TOKENS, 2 * width).chunk(2, dim=2)
        return draw(batch * frames, side * side, width), k, v, HEADS, None

    return arguments


def _group_norm_frames(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """The entrance of a transformer: each frame alone, no activation."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        x = draw(batch * frames, side, side, width).movedim(-1, 1)
        return x, GROUPS, draw(width), draw(width), 1e-6, False, None

    return arguments


def _group_norm_video(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """The middle of a residual block: the time embedding, statistics over all frames, SiLU."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        x = draw(batch, frames, side, side, width).movedim(-1, 1)
        return x, GROUPS, draw(width), draw(width), 1e-5, True, draw(batch, width)

    return arguments


def _residual_moments(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """The end of a transformer: its last convolution, its residual, the convolution's bias."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        shape = (batch * frames, side, side, width)
        return draw(*shape).movedim(-1, 1), draw(*shape).movedim(-1, 1), draw(width)

    return arguments


def _group_norm_from_moments(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """The entrance of a residual block, which spans all frames."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        x = draw(batch, frames, side, side, width).movedim(-1, 1)
        _, moments = residual_moments_reference(x, None, None)
        return x, moments, GROUPS, draw(width), draw(width), 1e-5, True

    return arguments


def _geglu(side: int, width: int, batch: int, frames: int) -> Callable[[Draw], tuple[Any, ...]]:
    return lambda draw: (draw(batch * frames, side * side, 8 * width),)


def _linear_geglu(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """Weights as large as a network's, so that gates are neither all open nor all shut."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        x, weight = draw(batch * frames, side * side, width), draw(8 * width, width)
        return x, weight * width**-0.5, draw(8 * width)

    return arguments


def _feed_forward(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """Of a transformer that attends to the sound, silence in the first half."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        shape, inner = (batch * frames, side * side, width), 4 * width
        half = (max(1, shape[0] // 2), *shape[1:])
        weight_in = draw(2 * inner, width) * width**-0.5
        weight_out = draw(width, inner + width) * (inner + width) ** -0.5
        norm = draw(width), draw(width), 1e-5
        products = weight_in, draw(2 * inner), weight_out, draw(width)
        return draw(*half), draw(*shape), *norm, *products, draw(width)

    return arguments


def _fp8_linear(inside: int, outside: int) -> Callable[[int, int, int, int], Any]:
    """A linear layer from and to so many times the width."""

    def make(side: int, width: int, batch: int, frames: int) -> Callable[[Draw], tuple[Any, ...]]:
        def arguments(draw: Draw) -> tuple[Any, ...]:
            x = draw(batch * frames, side * side, inside * width)
            weight = draw(outside * width, inside * width) * (inside * width) ** -0.5
            return x, weight, draw(outside * width), *quantised(weight)

        return arguments

    return make


def _add_layer_norm(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        shape = (batch * frames, side * side, width)
        x, residual, weight, bias = draw(*shape), draw(*shape), draw(width), draw(width)
        return x, residual, weight, bias, 1e-5, draw(frames, width)

    return arguments


def _layer_norm(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """The first norm of a motion module."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        x, weight, bias = draw(batch * frames, side * side, width), draw(width), draw(width)
        return x, weight, bias, 1e-5, draw(frames, width)

    return arguments


def _upsample_conv(
    side: int, width: int, batch: int, frames: int
) -> Callable[[Draw], tuple[Any, ...]]:
    """To pictures of ``side``; weights scaled as in a network."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        x = draw(batch * frames, side // 2, side // 2, width).movedim(-1, 1)
        weight = draw(width, 3, 3, width).movedim(-1, 1) * (9 * width) ** -0.5
        phases = phases_of(weight.float()).to(weight.dtype)
        return x, weight, draw(width), phases

    return arguments
