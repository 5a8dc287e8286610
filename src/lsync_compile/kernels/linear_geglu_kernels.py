# mypy: allow-untyped-defs, allow-incomplete-defs
"""Matrix products that end in a gate, so that the hidden channels never reach memory.

A product's columns are eight values and their eight gates in turn: rows of the weight are read so,
values 0 to 7, gates 0 to 7, values 8 to 15 and on. Tensor cores leave a column and the one eight
further in the same thread, which can gate the one with the other in its registers, and neighbouring
columns too, so that results are stored in pairs. The weight itself stays as it is.

The gate costs as much as the product where inputs are narrow: 320 channels are five steps of the
tensor cores. So the bias is where the sums begin, and `_gelu` is 8 instructions a value.

Two kernels, of which the faster depends on the shape: one program a tile, whose gating overlaps
with another program's product on the same multiprocessor; and programs that go on from tile to
tile, fed by Hopper's copy engine, which may fetch for the next tile while this one is gated (FLAT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lsync_compile.kernels.launch import Config, TensorDescriptor, capability, function, kernel, tl

DEPTH = 64  # channels of the input taken together
PROGRAMS = 132  # multiprocessors of an H100, for tensors that are on no GPU
HALF = (torch.float16, torch.bfloat16)


@function
def _place(tile, down, across, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, which then stay in the cache."""
    group = tile // (GROUP * across)
    size = min(down - group * GROUP, GROUP)
    inside = tile % (GROUP * across)
    return group * GROUP + inside % size, inside // size


@function
def _gelu(g):
    """``g * (1 + erf(g / sqrt(2))) / 2`` within 6e-6, a hundredth of a float16's last bit at 1.

    ``max(g, 0) - |g| * Phi(-|g|)``, where the logarithm of the normal distribution's tail is nearly
    a parabola: to base 2, a polynomial of degree 5 with the least largest error of the result for
    ``|g| <= 5``. Its first coefficient is negative, so that it goes on to fall. A formula with a
    quotient and a comparison, as in `lsync_compile.kernels.geglu`, takes 25 instructions.
    """
    size = tl.abs(g)
    tail = -3.91104757e-04 * size + 6.46889145e-03
    tail = tail * size - 5.02530190e-02
    tail = tail * size - 4.61576064e-01
    tail = tail * size - 1.15027706
    tail = tail * size - 1.00004754
    return tl.maximum(g, 0.0) - size * tl.exp2(tail)


@function
def _turn(first, columns, COLUMNS: tl.constexpr):
    """Of values and gates in turn, from column ``first``: the columns, the rows of the weight."""
    turn = tl.arange(0, 2 * COLUMNS)
    column = first + turn // 16 * 8 + turn % 8
    return column, column + turn // 8 % 2 * columns


@function
def _biases(bias_ptr, first, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, 2*COLUMNS), what the sums begin with."""
    acc = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    if bias_ptr is not None:
        column, hidden = _turn(first, columns, COLUMNS)
        acc += tl.load(bias_ptr + hidden, column < columns, 0.0).to(tl.float32)[None, :]
    return acc


@function
def _gated(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, 2*COLUMNS), values and gates in turn -> (ROWS, COLUMNS)."""
    turns = tl.permute(tl.reshape(acc, (ROWS, COLUMNS // 8, 2, 8)), (0, 1, 3, 2))
    value, gate = tl.split(turns)
    return tl.reshape(value * _gelu(gate), (ROWS, COLUMNS))


def _fits(config: Config, arguments: Mapping[str, Any]) -> bool:
    """Large tiles only where there are enough of them for all multiprocessors."""
    tiles = arguments["rows"] * arguments["columns"] / (128 * 128)
    return config.warps == 4 or tiles >= PROGRAMS


@kernel(
    [
        Config({"ROWS": 128, "COLUMNS": 64, "GROUP": 8}, warps=4, stages=3),
        Config({"ROWS": 128, "COLUMNS": 128, "GROUP": 8}, warps=8, stages=3),
        Config({"ROWS": 128, "COLUMNS": 128, "GROUP": 8}, warps=8, stages=4),
        Config({"ROWS": 256, "COLUMNS": 64, "GROUP": 4}, warps=8, stages=3),
    ],
    key=("rows", "columns", "depth", "stride_x"),
    fits=_fits,
)
def _linear_geglu_tiles(
    x_ptr,  # (rows, depth), channels together
    weight_ptr,  # (2 * columns, depth), contiguous; values, then gates
    bias_ptr,  # (2 * columns,), contiguous, or none
    out_ptr,  # (rows, columns), columns together
    rows,
    columns,
    depth,  # a multiple of DEPTH
    stride_x,
    stride_out,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    down_at, across_at = _place(tl.program_id(0), down, across, GROUP)
    row = down_at * ROWS + tl.arange(0, ROWS)

    # Rows and columns that do not exist read the first one; nothing of them is stored.
    taken, hidden = _turn(across_at * COLUMNS, columns, COLUMNS)
    hidden = tl.where(taken < columns, hidden, 0)
    channel = tl.arange(0, DEPTH)
    x_at = x_ptr + tl.where(row < rows, row, 0).to(tl.int64)[:, None] * stride_x + channel[None, :]
    weight_at = weight_ptr + hidden[:, None] * depth + channel[None, :]
    acc = _biases(bias_ptr, across_at * COLUMNS, columns, ROWS, COLUMNS)
    for _ in range(0, depth, DEPTH):
        x = tl.load(x_at)
        weight = tl.load(weight_at)
        acc = tl.dot(x, tl.trans(weight), acc)
        x_at += DEPTH
        weight_at += DEPTH

    column = across_at * COLUMNS + tl.arange(0, COLUMNS)
    out = _gated(acc, ROWS, COLUMNS).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + row.to(tl.int64)[:, None] * stride_out + column[None, :]
    tl.store(out_at, out, (row < rows)[:, None] & (column < columns)[None, :])


@kernel(
    [
        Config({"ROWS": 128, "COLUMNS": 128, "GROUP": 8, "FLAT": True}, warps=8, stages=3),
        Config({"ROWS": 128, "COLUMNS": 128, "GROUP": 8, "FLAT": True}, warps=8, stages=4),
        Config({"ROWS": 128, "COLUMNS": 128, "GROUP": 8, "FLAT": False}, warps=8, stages=3),
    ],
    key=("rows", "columns", "depth"),
)
def _linear_geglu_stream(
    bias_ptr,  # (2 * columns,), contiguous, or none
    x,  # descriptor of (rows, depth), blocks (ROWS, DEPTH)
    weight,  # of (columns / 8, 2, 8, depth), values and gates, blocks (COLUMNS / 8, 2, 8, DEPTH)
    out,  # of (rows, columns), blocks (ROWS, COLUMNS)
    rows,
    columns,
    depth,
    programs,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FLAT: tl.constexpr,
):
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), across * down, programs, flatten=FLAT):
        down_at, across_at = _place(tile, down, across, GROUP)
        acc = _biases(bias_ptr, across_at * COLUMNS, columns, ROWS, COLUMNS)
        for start in range(0, depth, DEPTH):
            rows_of_x = x.load([down_at * ROWS, start])
            turns = weight.load([across_at * (COLUMNS // 8), 0, 0, start])
            acc = tl.dot(rows_of_x, turns.reshape(2 * COLUMNS, DEPTH).T, acc)
        gated = _gated(acc, ROWS, COLUMNS)
        out.store([down_at * ROWS, across_at * COLUMNS], gated.to(out.dtype))


def tiles(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """One program a tile, on tensors that `takes` allows: ``(rows, depth)`` -> ``(rows, C)``.

    Args:
        out: where to write: columns together, rows at multiples of 16 bytes.
    """
    rows, depth = x.shape
    out = x.new_empty(rows, weight.shape[0] // 2) if out is None else out
    columns = out.shape[1]
    _linear_geglu_tiles.launch(
        lambda blocks: (-(-rows // blocks["ROWS"]) * -(-columns // blocks["COLUMNS"]),),
        x, weight, bias, out, rows, columns, depth, x.stride(0), out.stride(0),
        DEPTH=DEPTH,
    )  # fmt: skip
    return out


def stream(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Programs that go from tile to tile, on tensors that `streams` allows; ``out`` as above."""
    rows, depth = x.shape
    out = x.new_empty(rows, weight.shape[0] // 2) if out is None else out
    columns = out.shape[1]
    blocks = _linear_geglu_stream.configs[0].blocks  # of all of them: descriptors are made for it
    high, wide = blocks["ROWS"], blocks["COLUMNS"]
    programs = min(_processors(x), -(-rows // high) * -(-columns // wide))
    turns = weight.view(2, columns // 8, 8, depth).transpose(0, 1)
    _linear_geglu_stream.launch(
        lambda blocks: (programs,),
        bias,
        TensorDescriptor(x, [rows, depth], [x.stride(0), 1], [high, DEPTH]),
        TensorDescriptor(turns, [*turns.shape], [*turns.stride()], [wide // 8, 2, 8, DEPTH]),
        TensorDescriptor(out, [rows, columns], [out.stride(0), 1], [high, wide]),
        rows, columns, depth, programs,
        DEPTH=DEPTH,
    )  # fmt: skip
    return out


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `tiles` computes this: rows of 16-byte multiples in half precision."""
    fits = x.dtype == weight.dtype and x.dtype in HALF and x.shape[0] > 0
    fits = fits and x.shape[1] % DEPTH == 0 and weight.shape[0] % 16 == 0
    fits = fits and x.stride(1) == 1 and x.stride(0) % 8 == 0 and weight.is_contiguous()
    return fits and (bias is None or bias.is_contiguous())


def streams(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `stream` does: it needs a copy engine, and memory that starts at 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    hopper = not x.is_cuda or capability(x.device) == (9, 0)
    return TensorDescriptor is not None and aligned and hopper and takes(x, weight, bias)


def _processors(x: Tensor) -> int:
    if not x.is_cuda:
        return PROGRAMS
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
