"""Attend across frames where the frames lie, without rearranging to positions and back.

A motion module attends along the frames at each pixel position. Library attention wants the
sequence next to the channels, so the module makes rows of positions, works there, and goes back::

    x (b f) c h w                               x (b f) c h w
    h = x.view(b, f, c, h, w)                   h = x.reshape(b*f, c, h*w)
         .permute(0, 3, 4, 1, 2)                     .permute(0, 2, 1)
         .flatten(0, 2)        # (b s) f c           .contiguous()          # (b f) s c
    n = layer_norm(h, ...) + pe           ->    n = (layer_norm(h, ...).unflatten(0, (b, f))
                                                     + pe[:, None]).flatten(0, 1)
    q, k, v = linear(n, ...), ...               q, k, v = linear(n, ...), ...
    a = scaled_dot_product_attention(           a = lsync.temporal_attention(q, k, v, f, heads)
        heads(q), heads(k), heads(v))
    h = linear(merge(a), ...) + h               h = linear(a, ...) + h
    y = h.view(b, h, w, f, c)                   y = h.view(b, f, h, w, c)
         .permute(0, 4, 3, 1, 2)                     .permute(0, 4, 1, 2, 3)

Whole regions are carried over, whatever lies between the two rearrangements: norms, projections,
feed-forward, residual sums, any number of attentions. An arrangement is recognised by what it does
(:mod:`lsync_compile.graph.axes`), so the place where one attention alone is rearranged, as in
AnimateDiff, is found as well. All else in a region works on channels alone and gives the same
numbers in either order of the rows; the kernel rounds otherwise.

The pass stays away where a sequence is longer than the kernel's 32 frames, with a mask, dropout or
another number of keys, and where rows are not exchanged at all (attention within a frame).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lsync_compile.graph.attention import attention
from lsync_compile.graph.axes import (
    Axes,
    Digit,
    after_view,
    arrange,
    merged,
    permuted,
    regrouped,
    sizes,
    viewed,
    whole,
)
from lsync_compile.graph.build import call, example, replace
from lsync_compile.kernels.temporal_attention import MAX_FRAMES, SPEC
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

# Functions of each row's channels; the row is the first argument.
_ROWWISE = (F.linear, F.gelu, F.silu, F.relu)
_BINARY = (
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(torch.add, torch.sub, torch.mul, torch.div),
)


@dataclass(frozen=True)
class Grid:
    """The rows of a region: ``(batch*tokens, frames)`` before, ``(batch*frames, tokens)`` after."""

    batch: int
    frames: int
    tokens: int

    def before(self, channels: int) -> Axes:
        return whole((self.batch * self.tokens, self.frames, channels), "pfc")

    def after(self, channels: int) -> Axes:
        total = self.batch * self.tokens
        chunk, place = Digit("p", self.tokens, total), Digit("p", 1, self.tokens)
        outer = (chunk,) if self.batch > 1 else ()
        return ((*outer, Digit("f", 1, self.frames)), (place,), *whole((channels,), "c"))


Kind = Literal["entrance", "view", "rowwise", "table", "attention"]


@dataclass(frozen=True)
class Value:
    """A node of a region.

    Attributes:
        kind: how its counterpart is made from those of its inputs.
        grid: the region's rows.
        channels: of its counterpart, a tensor ``(batch*frames, tokens, channels)``.
        axes: what the node itself is, in digits of position "p", frame "f" and channel "c".
        root: of an entrance, what it is a view of and how that has to be arranged.
    """

    kind: Kind
    grid: Grid
    channels: int
    axes: Axes
    root: tuple[Node, Axes] | None = None


@register
class FuseTemporalAttention(KernelPass):
    """Finds regions first, then rebuilds those that attend; counts the attentions."""

    kernel = SPEC
    spec = PassSpec(
        name="fuse_temporal_attention",
        phase=Phase.REWRITE,
        option="fuse_temporal_attention",
        exact=False,
        summary="Attends across frames in the layout of the frames' tokens, without the "
        "rearrangements around each motion module. Rounds otherwise.",
        source="AnimateDiff, https://arxiv.org/abs/2307.04725",
    )

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        values = _Analysis(self, gm, context).values
        attentions = [node for node, value in values.items() if value.kind == "attention"]
        region = _connected(attentions, values)
        inside = [node for node in values if node in region]
        made: dict[Node, Node] = {}
        for node in inside:
            with gm.graph.inserting_before(node):
                made[node] = _counterpart(node, values[node], made)
        for node in inside:
            value = values[node]
            if value.kind != "entrance" and any(user not in region for user in node.users):
                with gm.graph.inserting_before(node):
                    have = value.grid.after(value.channels)
                    replace(node, arrange(gm.graph, made[node], have, value.axes, like=node))
        return len(attentions)


class _Analysis:
    """Which nodes could be computed with the rows in the other order; changes nothing.

    Attributes:
        values: those nodes, in execution order.
    """

    def __init__(self, owner: KernelPass, gm: GraphModule, context: PassContext) -> None:
        self.values: dict[Node, Value] = {}
        self._views: dict[Node, tuple[Node, Axes]] = {}
        for node in gm.graph.nodes:
            value = self._follow(node) or self._entrance(node)
            if value is not None and (value.kind != "attention" or owner.takes(node, context)):
                self.values[node] = value

    def _entrance(self, node: Node) -> Value | None:
        """A view whose second index was, before, an outer one of those in its first."""
        source = viewed(node)
        if source is None:
            return None
        root, axes = self._views.get(source) or (source, whole(_shape(source)))
        new = after_view(node, axes)
        if new is None:
            return None
        self._views[node] = root, new
        if len(new) != 3 or len(new[1]) != 1:
            return None
        rows, (frame,), channels = new
        outer = tuple(digit for digit in rows if _order(digit) < _order(frame))
        inner = rows[len(outer) :]
        if not inner or rows[: len(outer)] != outer:
            return None
        tokens = math.prod(digit.size for digit in inner)
        total, frames, width = _shape(node)
        if not 2 <= frames <= MAX_FRAMES:
            return None
        grid = Grid(total // tokens, frames, tokens)
        want = (merged((*outer, frame)), inner, channels)
        return Value("entrance", grid, width, grid.before(width), (root, want))

    def _follow(self, node: Node) -> Value | None:
        """What a node does with values of a region, if it can be done in both orders."""
        source = viewed(node)
        if source is not None:
            value = self.values.get(source)
            axes = None if value is None else after_view(node, value.axes)
            if value is None or axes is None:
                return None
            return Value("view", value.grid, value.channels, axes)
        if node.op not in ("call_function", "call_method") or not node.args:
            return None
        if node.target in _BINARY:
            return self._binary(node)
        return self._rowwise(node) or self._attention(node)

    def _rowwise(self, node: Node) -> Value | None:
        first = node.args[0]
        value = self._rows(first)
        if value is None or any(n in self.values for n in node.all_input_nodes if n is not first):
            return None
        if _is_chunk(node):
            return Value("rowwise", value.grid, 0, ())
        if node.target is operator.getitem:
            known = isinstance(first, Node) and _is_chunk(first) and isinstance(node.args[1], int)
        elif node.target is F.layer_norm:
            known = len(node.args) > 1 and len(node.args[1]) == 1  # type: ignore[arg-type]  # a shape
        elif node.target is F.dropout:
            known = len(node.args) > 2 and (node.args[1] in (0, 0.0) or node.args[2] is False)
        else:
            known = node.op == "call_function" and node.target in _ROWWISE
        return self._made(value.grid, node, "rowwise") if known else None

    def _binary(self, node: Node) -> Value | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = (self._rows(operand) for operand in node.args)
        value = left or right
        if value is None:
            return None
        if left is not None and right is not None:
            alike = left.grid == right.grid and _shape(node.args[0]) == _shape(node.args[1])
            return self._made(value.grid, node, "rowwise") if alike else None
        other = node.args[1] if right is None else node.args[0]
        if isinstance(other, (int, float)):
            return self._made(value.grid, node, "rowwise")
        if not isinstance(other, Node) or other in self.values or example(other) is None:
            return None
        *leading, width = (1, 1, 1, *_shape(other))[-3:]
        if width not in (1, value.channels) or leading[0] != 1:
            return None
        if leading[1] == 1:
            return self._made(value.grid, node, "rowwise")
        return self._made(value.grid, node, "table") if leading[1] == value.grid.frames else None

    def _attention(self, node: Node) -> Value | None:
        found = attention(node)
        if found is None:
            return None
        values = [self.values.get(operand) for operand in found.operands]
        first = values[0]
        if first is None:
            return None
        heads, width = _shape(found.query)[1::2]
        rows = first.grid.before(first.channels)
        split = regrouped(rows, (*sizes(rows)[:2], heads, width))
        if split is None:
            return None
        value = Value("view", first.grid, first.channels, permuted(split, (0, 2, 1, 3)))
        if any(each != value for each in values):
            return None
        return Value("attention", value.grid, value.channels, value.axes)

    def _rows(self, node: object) -> Value | None:
        """The value of a node of a region whose dimensions are positions, frames, channels."""
        value = self.values.get(node) if isinstance(node, Node) else None
        if value is None or value.axes not in ((), value.grid.before(value.channels)):
            return None
        return value

    def _made(self, grid: Grid, node: Node, kind: Kind) -> Value | None:
        """A value in rows, where the node's shape is one of rows."""
        shape = _shape(node)
        if shape[:2] != (grid.batch * grid.tokens, grid.frames) or len(shape) != 3:
            return None
        return Value(kind, grid, shape[2], grid.before(shape[2]))


def _counterpart(node: Node, value: Value, made: dict[Node, Node]) -> Node:
    """Insert what gives the node's numbers as ``(batch*frames, tokens, channels)``."""
    graph, grid = node.graph, value.grid
    if value.root is not None:
        root, want = value.root
        rows = arrange(graph, root, whole(_shape(root)), want, like=node)
        # Free where channels lie together; elsewhere products of turned rows would cost more.
        return call(graph, "contiguous", rows, like=node)
    if value.kind == "view":
        return made[node.args[0]]  # type: ignore[index]  # viewed() saw that it is a node
    if value.kind == "attention":
        found = attention(node)
        assert found is not None  # or it would be of another kind
        q, k, v = (made[operand] for operand in found.operands)
        heads = _shape(found.query)[1]
        op = torch.ops.lsync.temporal_attention.default
        return call(graph, op, q, k, v, grid.frames, heads, found.scale, like=node)
    if value.kind == "rowwise":
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
        return call(graph, node.target, *args, like=node, **kwargs)

    def operand(argument: object) -> Node:
        """Rows by batch and frame; the table by frame."""
        assert isinstance(argument, Node)  # or the kind would be "rowwise"
        if argument in made:
            shape = (grid.batch, grid.frames)
            return call(graph, "unflatten", made[argument], 0, shape, like=node)
        return call(graph, "reshape", argument, grid.frames, 1, -1, like=node)

    sum_ = call(graph, node.target, *(operand(a) for a in node.args), like=node)
    return call(graph, "flatten", sum_, 0, 1, like=node)


def _connected(start: list[Node], values: dict[Node, Value]) -> set[Node]:
    """The nodes of ``values`` that are joined to ``start`` by others of ``values``."""
    found = set(start)
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        inputs = [] if values[node].kind == "entrance" else node.all_input_nodes
        for near in (*inputs, *node.users):
            if near in values and near not in found:
                if values[near].kind == "entrance" and near in node.users:
                    continue  # another region's
                found.add(near)
                waiting.append(near)
    return found


def _is_chunk(node: Node) -> bool:
    """Whether the node splits the channels."""
    if node.target not in (torch.chunk, "chunk"):
        return False
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return dim in (-1, 2)


def _shape(node: object) -> tuple[int, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)


def _order(digit: Digit) -> tuple[int, int]:
    """Sorts digits of a whole tensor's dimensions, the outermost first."""
    assert isinstance(digit.of, int)
    return digit.of, -digit.low
