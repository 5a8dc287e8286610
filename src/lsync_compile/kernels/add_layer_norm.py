# mypy: allow-untyped-defs, allow-incomplete-defs
"""A residual sum and its layer norm, both of which a transformer block goes on with.

``total = x + residual``; ``normed = (total - mean) / sqrt(var + eps) * weight + bias`` over the
channels of each token (Ba et al., 2016, https://arxiv.org/abs/1607.06450), optionally plus the
encoding of the token's frame. The statistics are those of the sum as it is stored, rounded.

``shift``, one number a channel, is added to ``x`` first: the bias of the projection that made it,
which costs nothing here (:mod:`~lsync_compile.passes.defer_bias`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.launch import Config, kernel, runs_kernel, tl
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register

MAX_CHANNELS = 8192


def _fits(config: Config, arguments: Mapping[str, Any]) -> bool:
    """16 to 64 values a thread, of 128 threads, or the most rows."""
    rows = config.blocks["ROWS"]
    values: int = rows * arguments["PADDED"]
    return values <= 8192 and (values >= 2048 or rows == 8)


@kernel(
    [Config({"ROWS": 4}), Config({"ROWS": 8}), Config({"ROWS": 2}), Config({"ROWS": 1})],
    key=("rows", "CHANNELS"),
    fits=_fits,
)
def _add_layer_norm(
    x_ptr,  # (rows, CHANNELS), channels together; with null only the last rows - missing of them
    shift_ptr,  # (CHANNELS,), added to the rows of x, or none
    residual_ptr,  # (rows, CHANNELS), channels together, or none: x is the sum
    null_ptr,  # (CHANNELS,), what the first rows of x are, or none
    weight_ptr,  # (CHANNELS,)
    bias_ptr,  # (CHANNELS,)
    position_ptr,  # (frames, CHANNELS), contiguous, or none
    total_ptr,  # (rows, CHANNELS), channels together, or none
    normed_ptr,  # (rows, CHANNELS), contiguous
    rows,
    missing,  # rows that x has not
    tokens,  # rows of one frame
    frames,
    stride_x,
    stride_residual,
    stride_total,
    eps,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)
    across = column < CHANNELS
    inside = (first + row < rows) & across[None, :]

    out_at = first * CHANNELS + (row * CHANNELS + column[None, :])
    x_at = x_ptr + (first - missing) * stride_x + (row * stride_x + column[None, :])
    given = inside if null_ptr is None else inside & (first + row >= missing)
    total = tl.load(x_at, given, 0.0).to(tl.float32)
    if shift_ptr is not None:
        total += tl.load(shift_ptr + column, across, 0.0).to(tl.float32)[None, :]
    if null_ptr is not None:
        null = tl.load(null_ptr + column, across, 0.0).to(tl.float32)
        total = tl.where(given, total, null[None, :])
    if residual_ptr is not None:
        residual_at = row * stride_residual + column[None, :]
        residual_at = residual_ptr + first * stride_residual + residual_at
        total += tl.load(residual_at, inside, 0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        total_at = total_ptr + first * stride_total + (row * stride_total + column[None, :])
        tl.store(total_at, rounded, inside)
        total = rounded.to(tl.float32)

    mean = tl.sum(total, 1)[:, None] / CHANNELS
    centred = tl.where(across[None, :], total - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / CHANNELS
    weight = tl.load(weight_ptr + column, across, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, across, 0.0).to(tl.float32)
    normed = centred * tl.rsqrt(variance + eps) * weight[None, :] + bias[None, :]
    if position_ptr is not None:
        frame = (tl.program_id(0) * ROWS + row) // tokens % frames
        position_at = position_ptr + (frame * CHANNELS + column[None, :])
        normed += tl.load(position_at, inside, 0.0).to(tl.float32)
    tl.store(normed_ptr + out_at, normed.to(normed_ptr.dtype.element_ty), inside)


def add_layer_norm_kernel(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    position: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on arguments that `add_layer_norm` accepts."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, normalise(x, (residual, total), weight, bias, eps, position, shift)


def normalise(
    x: Tensor,
    sum_of: tuple[Tensor, Tensor] | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    position: Tensor | None,
    shift: Tensor | None = None,
    null: Tensor | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        sum_of: what to add to ``x``, and where the sum goes: like ``x``, contiguous, or ``(rows,
            channels)`` with channels together.
        shift: ``(channels,)``, added to the rows of ``x``.
        null: ``(channels,)``, what the first rows are where ``x`` has fewer than is added to it.
    """
    shape = x.shape if sum_of is None else sum_of[0].shape
    normed = torch.empty(shape, dtype=x.dtype, device=x.device)
    channels = x.shape[-1]
    tokens = x.shape[-2] if x.dim() > 1 else 1
    flat = _rows(x, channels)
    residual, total = (None, None) if sum_of is None else (_rows(sum_of[0], channels), sum_of[1])
    rows = normed.numel() // channels
    _add_layer_norm.launch(
        lambda blocks: (-(-rows // blocks["ROWS"]),),
        flat, _together(shift), residual, _together(null), weight.contiguous(), bias.contiguous(),
        _together(position),
        total, normed, rows, rows - flat.shape[0], tokens,
        1 if position is None else position.shape[0],
        flat.stride(0), 0 if residual is None else residual.stride(0),
        0 if total is None else total.view(-1, channels).stride(0), eps,
        CHANNELS=channels,
        PADDED=1 << (channels - 1).bit_length(),
    )  # fmt: skip
    return normed


def _together(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rows(x: Tensor, channels: int) -> Tensor:
    flat = x.reshape(-1, channels)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    position: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with torch's layer norm."""
    total = (x if shift is None else x + shift) + residual
    return total, norm_reference(total, weight, bias, eps, position)


def norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, position: Tensor | None
) -> Tensor:
    """torch's layer norm, plus the encoding of each row's frame."""
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if position is None:
        return normed
    shape = normed.shape
    normed = normed.unflatten(0, (-1, position.shape[0])) + position[:, None, :]
    placed: Tensor = normed.reshape(shape)
    return placed


@torch.library.custom_op(
    "lsync::add_layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps=1e-5, "
    "Tensor? position=None, Tensor? shift=None) -> (Tensor, Tensor)",
)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    position: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add two tensors and normalise the sum over its last dimension.

    Args:
        x, residual: ``(..., C)`` of one shape and dtype: float16, bfloat16 or float32.
        weight, bias: ``(C,)``, of any of these dtypes.
        eps: added to the variance.
        position: ``(F, C)``, added to the norm of frame ``f``. Then ``x`` is
            ``(batch*F, tokens, C)``, frames of a chunk one after another.
        shift: ``(C,)``, added to the sum. The kernel rounds once, the reference twice.

    Returns:
        ``total (..., C)``, the rounded sum, and ``normed (..., C)``, its norm; contiguous, of
        ``x``'s dtype.

    Raises:
        OptionError: shapes or dtypes that do not fit each other, or more than 8192 channels.
    """
    _check(x, residual, weight, bias, position, shift)
    if runs_kernel(x):
        return add_layer_norm_kernel(x, residual, weight, bias, eps, position, shift)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    position = None if position is None else position.to(x.dtype)
    shift = None if shift is None else shift.to(x.dtype)
    total, normed = add_layer_norm_reference(x, residual, weight, bias, eps, position, shift)
    return total.contiguous(), normed.contiguous()


@add_layer_norm.register_fake
def _fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    position: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight, bias, position, shift)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _check(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    shift: Tensor | None,
) -> None:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise OptionError(
            f"add_layer_norm: x is {tuple(x.shape)} {x.dtype}, but residual is "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    check_norm("add_layer_norm", x, weight, bias, position, shift)


def check_norm(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    shift: Tensor | None,
) -> None:
    """Whether the weights, the frames' encoding and a shift fit ``x``; raises OptionError."""
    channels = x.shape[-1]
    if channels > MAX_CHANNELS:
        raise OptionError(f"{op}: {channels} channels are more than {MAX_CHANNELS}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise OptionError(
            f"{op}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be ({channels},)"
        )
    if shift is not None and shift.shape != (channels,):
        raise OptionError(f"{op}: shift {tuple(shift.shape)} must be ({channels},)")
    if position is None:
        return
    if position.dim() != 2 or position.shape[1] != channels:
        raise OptionError(f"{op}: position {tuple(position.shape)} must be (frames, {channels})")
    if x.dim() != 3 or x.shape[0] % position.shape[0]:
        raise OptionError(
            f"{op}: with {position.shape[0]} positions x must be (batch*"
            f"{position.shape[0]}, tokens, channels), got {tuple(x.shape)}"
        )


SPEC = register(
    KernelSpec(
        name="add_layer_norm",
        summary="Residual sum and its layer norm, with the frame's encoding if wanted",
        op=add_layer_norm,
        kernel=add_layer_norm_kernel,
        reference=add_layer_norm_reference,
        source="Ba et al. (2016), https://arxiv.org/abs/1607.06450",
        tolerances={
            torch.float32: Tolerance(1e-6, "float32 arithmetic"),
            torch.float16: Tolerance(6e-4, "sum and norm are rounded to 11 bits"),
            torch.bfloat16: Tolerance(5e-3, "sum and norm are rounded to 8 bits"),
        },
    )
)
