"""What a chain of views does, as arithmetic on index digits.

``view``, ``reshape``, ``flatten``, ``transpose`` and ``permute`` move numbers, or only say where
they lie; none computes anything. Which index of the first tensor each index of the last one is can
be told from their arguments: an index of size 6 is written with digits of sizes 2 and 3, digits
change places, and neighbours become one index again::

    x                          (b f) c h w      b=2 f=4 c=3 h=5 w=5
    x.view(2, 4, 3, 5, 5)      b f c h w
     .permute(0, 3, 4, 1, 2)   b h w f c
     .flatten(0, 2)            (b h w) f c

A pass that knows the digits recognises an arrangement however it was written, and
:func:`arrange` writes a new one in at most three calls.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from lsync_compile.graph.build import call, example


@dataclass(frozen=True)
class Digit:
    """``index // low % (high // low)`` of one index of a tensor.

    Attributes:
        of: names the index.
        low: weight of the digit's own unit.
        high: weight of the next higher digit.
    """

    of: Hashable
    low: int
    high: int

    @property
    def size(self) -> int:
        return self.high // self.low


Axes = tuple[tuple[Digit, ...], ...]
"""For each dimension of a tensor, outermost first, the digits that its index is written with.

Neighbours that are one number together are one digit, so that equal arrangements are equal values.
A dimension of size 1 has none.
"""


def whole(shape: Sequence[int], names: Iterable[Hashable] | None = None) -> Axes:
    """Each dimension an index of its own, named by its number or by ``names``."""
    named = zip(range(len(shape)) if names is None else names, shape, strict=True)
    return tuple((Digit(name, 1, size),) if size != 1 else () for name, size in named)


def sizes(axes: Axes) -> tuple[int, ...]:
    """The shape of a tensor with these axes."""
    return tuple(math.prod(digit.size for digit in group) for group in axes)


def merged(group: Sequence[Digit]) -> tuple[Digit, ...]:
    """The digits of one dimension, those that are one number together made one."""
    result: list[Digit] = []
    for digit in group:
        if result and result[-1].of == digit.of and result[-1].low == digit.high:
            digit = Digit(digit.of, digit.low, result.pop().high)
        result.append(digit)
    return tuple(result)


def permuted(axes: Axes, order: Sequence[int]) -> Axes:
    """The dimensions in another order, as ``Tensor.permute`` takes it."""
    return tuple(axes[dim] for dim in order)


def regrouped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The same numbers in row-major order as another shape.

    Returns:
        None where digits and shape have no common divisors, as for ``(2, 3)`` to ``(3, 2)``.
    """
    waiting = [digit for group in axes for digit in group]
    waiting.reverse()
    groups = []
    for size in shape:
        group: list[Digit] = []
        while size > 1:
            if not waiting:
                return None
            digit = waiting.pop()
            if size % digit.size == 0:
                group.append(digit)
                size //= digit.size
                continue
            inner, rest = divmod(digit.size, size)
            if rest:
                return None
            middle = digit.low * inner
            group.append(Digit(digit.of, middle, digit.high))
            waiting.append(Digit(digit.of, digit.low, middle))
            size = 1
        groups.append(merged(group))
    return None if waiting else tuple(groups)


_FUNCTIONS = (torch.transpose, torch.permute, torch.reshape, torch.flatten)
_METHODS = (
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("transpose", "permute", "contiguous"),
)


def viewed(node: Node) -> Node | None:
    """What the node is another arrangement of; None where it is more than that."""
    known = (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )
    source = node.args[0] if known and node.args else None
    before, after = example(source), example(node)
    if before is None or after is None or after.dtype != before.dtype:  # view(dtype) reads bits
        return None
    fixed = all(isinstance(size, int) for size in (*before.shape, *after.shape))
    return source if fixed and before.numel() > 0 and isinstance(source, Node) else None


def after_view(node: Node, axes: Axes) -> Axes | None:
    """The axes of a view, by those of its source.

    Args:
        node: one for which :func:`viewed` gives the source.
        axes: of the source.

    Returns:
        None where the digits do not suffice to say it.
    """
    value = example(node)
    assert value is not None  # viewed() asked for it
    name = getattr(node.target, "__name__", node.target)
    if name == "transpose":
        order = list(range(len(axes)))
        dims = _integers(node, 2)
        if dims is None:
            return None
        first, second = dims
        order[first], order[second] = order[second], order[first]
        return permuted(axes, order)
    if name == "permute":
        dims = _integers(node, len(axes))
        return None if dims is None else permuted(axes, [dim % len(axes) for dim in dims])
    return regrouped(axes, value.shape)


def arrange(graph: Graph, source: Node, have: Axes, want: Axes, like: Node) -> Node:
    """Insert the calls that bring a tensor with axes ``have`` into the arrangement ``want``.

    Args:
        graph: changed at its insertion point.
        source: the tensor.
        have: its axes.
        want: the axes wanted, of the same indices.
        like: see :func:`lsync_compile.graph.build.call`.

    Returns:
        ``source`` itself where nothing needs to change.

    Raises:
        ValueError: ``want`` does not hold the same digits.
    """
    if have == want:
        return source
    cuts: dict[Hashable, set[int]] = {}
    for digit in (*_flat(have), *_flat(want)):
        cuts.setdefault(digit.of, set()).update((digit.low, digit.high))
    before = [part for digit in _flat(have) for part in _cut(digit, cuts[digit.of])]
    after = [part for digit in _flat(want) for part in _cut(digit, cuts[digit.of])]
    if len(before) != len(after) or set(before) != set(after):
        raise ValueError(f"{source.name}: {want} is no arrangement of {have}")
    node = source
    order = [before.index(digit) for digit in after]
    if order != sorted(order):
        # Neighbours that stay neighbours need no dimensions of their own.
        runs = _runs(order)
        blocks = [math.prod(before[i].size for i in run) for run in sorted(runs)]
        node = _reshape(graph, node, blocks, like)
        node = call(graph, "permute", node, *(sorted(runs).index(run) for run in runs), like=like)
    return _reshape(graph, node, sizes(want), like)


def _reshape(graph: Graph, node: Node, shape: Sequence[int], like: Node) -> Node:
    value = example(node)
    if value is not None and tuple(value.shape) == tuple(shape):
        return node
    return call(graph, "reshape", node, *shape, like=like)


def _runs(order: Sequence[int]) -> list[list[int]]:
    """``[2, 3, 0, 1]`` -> ``[[2, 3], [0, 1]]``."""
    runs = [[order[0]]]
    for before, after in pairwise(order):
        if after == before + 1:
            runs[-1].append(after)
        else:
            runs.append([after])
    return runs


def _flat(axes: Axes) -> list[Digit]:
    return [digit for group in axes for digit in group]


def _cut(digit: Digit, cuts: Iterable[int]) -> list[Digit]:
    """The digit in parts, outermost first.

    Raises:
        ValueError: cuts that do not divide each other.
    """
    marks = sorted(cut for cut in cuts if digit.low <= cut <= digit.high)
    if any(high % low for low, high in pairwise(marks)):
        raise ValueError(f"{digit} cannot be cut at {marks}")
    return [Digit(digit.of, low, high) for low, high in pairwise(marks)][::-1]


def _integers(node: Node, count: int) -> list[int] | None:
    """The ``count`` dimensions that a transpose or permute was given, as arguments or a list."""
    given: Any = node.args[1:]
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = given[0]
    fit = len(given) == count and not node.kwargs and all(isinstance(dim, int) for dim in given)
    return list(given) if fit else None
