# mypy: allow-untyped-defs, allow-incomplete-defs
"""A linear layer whose product is made of eight-bit floating-point numbers.

``out = x @ weight.T + bias`` with both factors rounded to float8_e4m3fn (Micikevicius et al., 2022,
https://arxiv.org/abs/2209.05433), each row of ``x`` and each of ``weight`` scaled so that its
largest value is 448, the largest that there is. Products are summed in float32. Tensor cores of
Hopper make twice as many such products a second as of float16; the price is 3 bits of mantissa, an
error of 2 to 3 % of a layer's output where values are normal numbers. Scaling and rounding ``x`` is
a pass of its own over it: where the product is small that costs more than it gains, so that on a
GPU the library's product of ``x`` and ``weight`` as they are is timed too, and taken where faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.fastest import Choices
from lsync_compile.kernels.launch import INTERPRETED, Config, kernel, recording, runs_kernel, tl
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register

CODES = torch.float8_e4m3fn
LARGEST = 448.0  # of CODES
SMALLEST_ROW = 1e-12  # what a row's largest value counts for at least: rows of zeros stay zero


@kernel([Config({}, warps=4), Config({}, warps=8)], key=("rows", "columns"))
def _quantise_rows(
    x_ptr,  # (rows, columns), columns together
    codes_ptr,  # (rows, columns), contiguous, float8
    scale_ptr,  # (rows,), float32
    rows,
    columns,
    stride_x,
    smallest,
    largest,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least as many as there are
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * stride_x + column, inside, 0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(x), 1, keep_dims=True), smallest)
    codes = x * tl.div_rn(largest, most)
    tl.store(codes_ptr + row * columns + column, codes.to(codes_ptr.dtype.element_ty), inside)
    tl.store(scale_ptr + row, most / largest, row < rows)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(M, K)`` as codes ``(M, K)`` and scales ``(M, 1)``: ``x`` is about ``codes * scales``."""
    codes = torch.empty(x.shape, dtype=CODES, device=x.device)
    scales = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, columns = x.shape
    padded = 1 << (columns - 1).bit_length()
    block = max(1, 4096 // padded)
    _quantise_rows.launch(
        lambda blocks: (-(-rows // block),),
        x, codes, scales, rows, columns, x.stride(0), SMALLEST_ROW, LARGEST,
        ROWS=block, COLUMNS=padded,
    )  # fmt: skip
    return codes, scales


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, for weights and on a CPU."""
    wide = x.float()  # of wider numbers too, so that their codes are the same
    most = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_ROW)
    return (wide * (LARGEST / most)).to(CODES), most / LARGEST


def fp8_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor
) -> Tensor:
    """The numbers that the codes stand for, multiplied in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    own, own_scales = quantised(x)
    out = F.linear(own.to(wide) * own_scales.to(wide), codes.to(wide) * scales.to(wide))
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def scaled(
    x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, *, out: Any
) -> Tensor:
    """torch's product of codes, scaled by rows and columns, with a result of dtype ``out``."""
    own, own_scales = quantise_rows(x)
    if bias is not None:
        bias = bias.to(out)
    product = torch._scaled_mm(
        own, codes.t(), own_scales, scales.t(), bias, out_dtype=out, use_fast_accum=True
    )
    return product.to(x.dtype)


def library(
    x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor
) -> Tensor:
    """No codes at all."""
    return F.linear(x, weight, bias)


def in_dtype(x: Tensor, *rest: Any) -> Tensor:
    """`scaled` with a result of ``x``'s dtype, which not every version of CUDA makes."""
    return scaled(x, *rest, out=x.dtype)


def in_bfloat16(x: Tensor, *rest: Any) -> Tensor:
    """`scaled` with a bfloat16 result, turned into ``x``'s dtype."""
    return scaled(x, *rest, out=torch.bfloat16)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "library": library,
    "fp8": in_dtype,
    "fp8 by bfloat16": in_bfloat16,
}
"""What to choose from on a GPU."""

_chosen = Choices(__name__)


def fp8_linear_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor
) -> Tensor:
    """Compute it in the way found fastest for arguments like these.

    The first call with new shapes or dtypes times all. While a CUDA graph is captured nothing can
    be timed: then the library multiplies. In the interpreter only the rounding is a kernel.
    """
    rows = x.reshape(-1, x.shape[-1])
    if recording():
        quantise_rows(rows)
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    if INTERPRETED and not x.is_cuda:
        own, own_scales = quantise_rows(rows)
        out = F.linear(own.float() * own_scales, codes.float() * scales)
        out = (out if bias is None else out + bias).to(x.dtype)
    else:
        arguments = rows, weight, bias, codes, scales
        key = (x.dtype, tuple(rows.shape), rows.stride(), tuple(weight.shape), bias is None)
        calls = {name: functools.partial(call, *arguments) for name, call in KERNELS.items()}
        if x.dtype == torch.bfloat16:
            del calls["fp8 by bfloat16"]
        name = _chosen.fastest(x.device, key, lambda: calls) or "library"
        out = KERNELS[name](*arguments)
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op(
    "lsync::fp8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor codes, Tensor scales) -> Tensor",
)
def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor
) -> Tensor:
    """Multiply with a weight of eight bits, ``x`` rounded to eight bits too.

    Args:
        x: ``(..., K)``; float16, bfloat16 or float32. On a GPU K is a multiple of 16.
        weight: ``(N, K)`` of ``x``'s dtype, for where the library's product is faster.
        bias: ``(N,)`` of ``x``'s dtype, or none.
        codes, scales: ``quantised(weight)``, made once: ``(N, K)`` float8_e4m3fn and ``(N, 1)``
            float32.

    Returns:
        ``(..., N)``, contiguous, of ``x``'s dtype.

    Raises:
        OptionError: shapes or dtypes that do not fit each other.
    """
    _check(x, weight, bias, codes, scales)
    path = fp8_linear_kernel if runs_kernel(x) else fp8_linear_reference
    return path(x, weight, bias, codes, scales)


@fp8_linear.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor) -> Tensor:
    _check(x, weight, bias, codes, scales)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor) -> None:
    outside, inside = weight.shape
    if x.dim() == 0 or x.shape[-1] != inside:
        raise OptionError(f"fp8_linear: the last of dimensions {tuple(x.shape)} must be {inside}")
    if codes.shape != weight.shape or codes.dtype != CODES or scales.shape != (outside, 1):
        raise OptionError(
            f"fp8_linear: codes {tuple(codes.shape)} {codes.dtype} and scales "
            f"{tuple(scales.shape)} are of another weight"
        )
    if bias is not None and bias.shape != (outside,):
        raise OptionError(f"fp8_linear: bias {tuple(bias.shape)} must be ({outside},)")
    if any(each is not None and each.dtype != x.dtype for each in (weight, bias)):
        raise OptionError("fp8_linear: x, weight and bias differ in dtype")


# Of the codes' product itself the error is that of its rounding, beside single codes at the border
# of two. But where the library's product is faster the op takes that, which has no codes.
_EITHER = Tolerance(0.05, "rounding to 4 bits, or the library's product, which has none")

SPEC = register(
    KernelSpec(
        name="fp8_linear",
        summary="Linear layer of factors rounded to float8_e4m3fn by rows, or the library's",
        op=fp8_linear,
        kernel=fp8_linear_kernel,
        reference=fp8_linear_reference,
        source="Micikevicius et al. (2022), https://arxiv.org/abs/2209.05433",
        tolerances=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), _EITHER),
        capability=(8, 9),  # the first with tensor cores for these codes
    )
)
