# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gated activation of a transformer's feed-forward: ``out = x * gelu(gate)``.

``x`` and ``gate`` are the halves of the last dimension and gelu is the exact one,
``gelu(g) = g * (1 + erf(g / sqrt(2))) / 2`` (Shazeer, 2020, https://arxiv.org/abs/2002.05202).
Each half is read once and the product written once: three values moved where eager torch, with
its intermediate, moves five.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.launch import Config, function, kernel, runs_kernel, tl
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register


@function
def normal_cdf(g):
    """``(1 + erf(g / sqrt(2))) / 2`` within 3e-7: float32 rounding, and 7.5e-8 of the formula.

    With the library's erf the kernel has a third more instructions. Abramowitz & Stegun (1964),
    7.1.26: ``erfc(z) = P(t) exp(-z^2)`` with ``t = 1 / (1 + 0.3275911 z)``.
    """
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(g))  # 0.3275911 / sqrt(2)
    tail = 0.5307027145  # the coefficients, halved
    tail = tail * t - 0.7265760135
    tail = tail * t + 0.7107068705
    tail = tail * t - 0.142248368
    tail = tail * t + 0.127414796
    tail = tail * t * tl.exp2(g * g * -0.7213475204444817)  # log2(e) / 2
    return tl.where(g < 0, tail, 1.0 - tail)


@kernel(
    [
        Config({"ROWS": 4, "COLUMNS": 256}),
        Config({"ROWS": 8, "COLUMNS": 256}),
        Config({"ROWS": 8, "COLUMNS": 256}, warps=8),
    ],
    key=("rows", "columns"),
)
def _geglu(
    x_ptr,  # (rows, 2 * columns), columns together
    out_ptr,  # (rows, columns), columns together
    rows,
    columns,
    stride_x,
    stride_out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    first = (tl.program_id(0) // across).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (first + row < rows) & (column < columns)
    x_at = x_ptr + first * stride_x + (row * stride_x + column)
    x = tl.load(x_at, inside, 0.0).to(tl.float32)
    gate = tl.load(x_at + columns, inside, 0.0).to(tl.float32)
    out = x * gate * normal_cdf(gate)
    out_at = out_ptr + first * stride_out + (row * stride_out + column)
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), inside)


def geglu_kernel(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Launch the kernel on arguments that `geglu` accepts; ``out (rows, C)``: where to write."""
    if out is None:
        out = torch.empty(_shape(x), dtype=x.dtype, device=x.device)
    columns = out.shape[-1]
    flat = x.reshape(-1, 2 * columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    rows = flat.shape[0]
    _geglu.launch(
        lambda blocks: (-(-columns // blocks["COLUMNS"]) * -(-rows // blocks["ROWS"]),),
        flat, out, rows, columns, flat.stride(0), out.view(-1, columns).stride(0),
    )  # fmt: skip
    return out


def geglu_reference(x: Tensor) -> Tensor:
    """The same with torch's gelu."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


@torch.library.custom_op("lsync::geglu", mutates_args=(), schema="(Tensor x) -> Tensor")
def geglu(x: Tensor) -> Tensor:
    """Multiply one half of the channels with the exact gelu of the other.

    Args:
        x: ``(..., 2*C)``, values then gates; float16, bfloat16 or float32.

    Returns:
        ``(..., C)``, contiguous, of ``x``'s dtype.

    Raises:
        OptionError: an odd number of channels.
    """
    _shape(x)
    return geglu_kernel(x) if runs_kernel(x) else geglu_reference(x).contiguous()


@geglu.register_fake
def _fake(x: Tensor) -> Tensor:
    return x.new_empty(_shape(x))


def _shape(x: Tensor) -> tuple[int, ...]:
    if x.dim() == 0 or x.shape[-1] % 2:
        raise OptionError(f"geglu: the last of dimensions {tuple(x.shape)} must be even")
    return (*x.shape[:-1], x.shape[-1] // 2)


SPEC = register(
    KernelSpec(
        name="geglu",
        summary="`x * gelu(gate)` of the halves of the last dimension, gelu with erf",
        op=geglu,
        kernel=geglu_kernel,
        reference=geglu_reference,
        source="Shazeer (2020), https://arxiv.org/abs/2002.05202",
        tolerances={
            torch.float32: Tolerance(1e-6, "float32 arithmetic"),
            torch.float16: Tolerance(5e-4, "the result is rounded to 11 bits"),
            torch.bfloat16: Tolerance(4e-3, "the result is rounded to 8 bits"),
        },
    )
)
