# mypy: allow-untyped-defs, allow-incomplete-defs
"""Matrix products that end in a gate, so that the hidden channels never reach memory.

A product's columns are values and gates in turn: rows of the weight are read so, value 0, gate 0,
value 1, gate 1 and on. Tensor cores leave neighbouring columns in one thread, which can gate the
one with the other in its registers. The weight itself stays as it is.

Two kernels, of which the faster depends on the shape: one program a tile, whose gating overlaps
with another program's product on the same multiprocessor; and programs that go on from tile to
tile, fed by Hopper's copy engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lsync_compile.kernels.geglu import normal_cdf
from lsync_compile.kernels.launch import Config, TensorDescriptor, function, kernel, tl

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
def _gated(acc, value_bias, gate_bias, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, 2*COLUMNS), values and gates in turn -> (ROWS, COLUMNS)."""
    value, gate = tl.split(tl.reshape(acc, (ROWS, COLUMNS, 2)))
    value += value_bias[None, :]
    gate += gate_bias[None, :]
    return value * gate * normal_cdf(gate)


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
    out_ptr,  # (rows, columns), contiguous
    rows,
    columns,
    depth,  # a multiple of DEPTH
    stride_x,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    down_at, across_at = _place(tl.program_id(0), down, across, GROUP)
    row = down_at * ROWS + tl.arange(0, ROWS)
    column = across_at * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns

    # Rows and columns that do not exist read the first one; nothing of them is stored.
    turns = tl.arange(0, 2 * COLUMNS)
    hidden = across_at * COLUMNS + turns // 2
    hidden = tl.where(hidden < columns, hidden, 0) + turns % 2 * columns
    channel = tl.arange(0, DEPTH)
    x_at = x_ptr + tl.where(row < rows, row, 0).to(tl.int64)[:, None] * stride_x + channel[None, :]
    weight_at = weight_ptr + hidden[:, None] * depth + channel[None, :]
    acc = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for _ in range(0, depth, DEPTH):
        x = tl.load(x_at)
        weight = tl.load(weight_at)
        acc = tl.dot(x, tl.trans(weight), acc)
        x_at += DEPTH
        weight_at += DEPTH

    value_bias = tl.zeros((COLUMNS,), tl.float32)
    gate_bias = tl.zeros((COLUMNS,), tl.float32)
    if bias_ptr is not None:
        value_bias += tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
        gate_bias += tl.load(bias_ptr + columns + column, inside, 0.0).to(tl.float32)
    out = _gated(acc, value_bias, gate_bias, ROWS, COLUMNS)
    out_at = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    kept = (row < rows)[:, None] & inside[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), kept)


@kernel(
    [Config({"ROWS": 128, "COLUMNS": 128, "GROUP": 8}, warps=8, stages=3)],
    key=("rows", "columns", "depth"),
)
def _linear_geglu_stream(
    bias_ptr,  # (2 * columns,), contiguous, or none
    x,  # descriptor of (rows, depth), blocks (ROWS, DEPTH)
    weight,  # of (columns, 2, depth), value and gate of a column, blocks (COLUMNS, 2, DEPTH)
    out,  # of (rows, columns), blocks (ROWS, COLUMNS)
    rows,
    columns,
    depth,
    programs,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), across * down, programs):
        down_at, across_at = _place(tile, down, across, GROUP)
        acc = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for start in range(0, depth, DEPTH):
            rows_of_x = x.load([down_at * ROWS, start])
            turns = weight.load([across_at * COLUMNS, 0, start]).reshape(2 * COLUMNS, DEPTH)
            acc = tl.dot(rows_of_x, turns.T, acc)
        column = across_at * COLUMNS + tl.arange(0, COLUMNS)
        value_bias = tl.zeros((COLUMNS,), tl.float32)
        gate_bias = tl.zeros((COLUMNS,), tl.float32)
        if bias_ptr is not None:
            value_bias += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)
            gate_bias += tl.load(bias_ptr + columns + column, column < columns, 0.0).to(tl.float32)
        gated = _gated(acc, value_bias, gate_bias, ROWS, COLUMNS)
        out.store([down_at * ROWS, across_at * COLUMNS], gated.to(out.dtype))


def tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One program a tile, on tensors that `takes` allows: ``(rows, depth)`` -> ``(rows, C)``."""
    rows, depth = x.shape
    out = x.new_empty(rows, weight.shape[0] // 2)
    columns = out.shape[1]
    _linear_geglu_tiles.launch(
        lambda blocks: (-(-rows // blocks["ROWS"]) * -(-columns // blocks["COLUMNS"]),),
        x, weight, bias, out, rows, columns, depth, x.stride(0),
        DEPTH=DEPTH,
    )  # fmt: skip
    return out


def stream(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Programs that go from tile to tile, on tensors that `streams` allows."""
    rows, depth = x.shape
    out = x.new_empty(rows, weight.shape[0] // 2)
    columns = out.shape[1]
    (config,) = _linear_geglu_stream.configs
    high, wide = config.blocks["ROWS"], config.blocks["COLUMNS"]
    programs = min(_processors(x), -(-rows // high) * -(-columns // wide))
    turns = weight.view(2, columns, depth).transpose(0, 1)
    _linear_geglu_stream.launch(
        lambda blocks: (programs,),
        bias,
        TensorDescriptor(x, [rows, depth], [x.stride(0), 1], [high, DEPTH]),
        TensorDescriptor(turns, [columns, 2, depth], [*turns.stride()], [wide, 2, DEPTH]),
        TensorDescriptor(out, [rows, columns], [columns, 1], [high, wide]),
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
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device) == (9, 0)
    return TensorDescriptor is not None and aligned and hopper and takes(x, weight, bias)


def _processors(x: Tensor) -> int:
    if not x.is_cuda:
        return PROGRAMS
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
