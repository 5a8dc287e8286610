"""One operation for half of the batch.

In a denoising network the batch is the outermost index of nearly every tensor: of dimension 0, or
of the part of it that changes slowest, as in ``(b f) c h w``. For such operations, taking a half
and computing is the same as computing and taking a half::

    y = conv2d(x, w)           (8, 32, 16, 16)         h = conv2d(x[:4], w)     y[:4] == h
    z = y.view(2, 4, 32, 16, 16)                       g = h.view(1, 4, 32, 16, 16)

:func:`halved` knows for which operations that holds, derives the sizes in their arguments anew and
checks the shape of the result. What it does not know it declines.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from lsync_compile.graph.build import call, example
from lsync_compile.graph.match import argument

# Gives the half of a node's value, or None where it is not to be had.
Halves = Callable[[Node], Node | None]

_POINTWISE = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.exp, torch.sin, torch.cos, torch.tanh),
        *(torch.sigmoid, torch.sqrt, F.silu, F.gelu, F.relu, F.mish, F.sigmoid, F.tanh),
        *(
            "to",
            "float",
            "half",
            "bfloat16",
            "double",
            "contiguous",
            "clone",
            "exp",
            "sin",
            "cos",
            "tanh",
        ),
    }
)
# Their first argument has the batch outermost, and they treat each sample alone; the ranks it may
# have there. The other tensors are weights.
_BY_SAMPLE: dict[Any, range] = {
    F.linear: range(2, 9),
    F.conv1d: range(3, 4),
    F.conv2d: range(4, 5),
    F.conv3d: range(5, 6),
    F.group_norm: range(3, 9),
    F.interpolate: range(3, 6),
    F.avg_pool2d: range(4, 5),
}
_RESHAPES = ("view", "reshape", "flatten", "unflatten")


def halved(node: Node, halves: Halves) -> Node | None:
    """Insert, at the graph's insertion point, the node's operation for half of the batch.

    Args:
        node: gives a tensor with an even dimension 0, or a tuple of such.
        halves: the operation's inputs for that half.

    Returns:
        The new node; its value has half the node's dimension 0. None, and the graph unchanged,
        where the operation is none that this function knows, or an input has no half.
    """
    if not _even(node) or not node.op.startswith("call_"):
        return None
    arguments = _arguments(node, halves)
    if arguments is None:
        return None
    args, kwargs = arguments
    target: Any = node.target
    wanted = _halved_shapes(node)
    try:
        new = call(node.graph, target, *args, like=node, **kwargs)
    except (RuntimeError, ValueError):
        new = None
    if new is not None and _shapes(new) == wanted:
        return new
    if new is not None:
        node.graph.erase_node(new)
    if target not in ("view", "reshape", "unflatten", "expand"):
        return None
    # The arguments say the size of the whole batch.
    target = "reshape" if target == "unflatten" else target
    try:
        return call(node.graph, target, args[0], *wanted[0], like=node)
    except (RuntimeError, ValueError):
        return None


def half_of(node: Node, second: bool) -> Node | None:
    """Insert a slice of the first or second half of dimension 0; None where that is odd."""
    value = example(node)
    if value is None or value.dim() == 0 or value.shape[0] % 2:
        return None
    middle = value.shape[0] // 2
    part = slice(middle, None) if second else slice(None, middle)
    return call(node.graph, operator.getitem, node, (part,), like=node)


def is_half(node: Node, source: Node, second: bool | None = None) -> bool:
    """Whether a node is a slice of just one half of ``source``'s dimension 0.

    Args:
        second: which half; None for any.
    """
    value = example(source)
    if node.target is not operator.getitem or node.args[0] is not source or value is None:
        return False
    if value.dim() == 0 or value.shape[0] % 2:
        return False
    index = node.args[1]
    first = index[0] if isinstance(index, tuple) and index else index
    if not isinstance(first, slice) or (isinstance(index, tuple) and len(index) > 1):
        return False
    middle, size = value.shape[0] // 2, value.shape[0]
    try:
        bounds = first.indices(size)
    except TypeError:  # a bound that is a node
        return False
    is_first, is_second = bounds == (0, middle, 1), bounds == (middle, size, 1)
    return (is_first or is_second) if second is None else (is_second if second else is_first)


def _arguments(node: Node, halves: Halves) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments for half of the batch, sizes as they were; None for unknown operations."""
    target: Any = node.target
    if target in _POINTWISE:
        return _pointwise(node, halves)
    if target in (torch.cat, torch.concat):
        return _joined(node, halves)
    if not node.args or not isinstance(node.args[0], Node):
        return None
    if target is F.dropout:
        training = argument(node, 2, "training", True)
        return _first(node, halves) if training is False else None
    if target is F.scaled_dot_product_attention:
        return _attention(node, halves)
    if target == "expand":
        return _expanded(node, halves)
    rank = _rank(node.args[0])
    if target in _BY_SAMPLE:
        return _first(node, halves) if rank in _BY_SAMPLE[target] else None
    if target is F.layer_norm:
        shape = argument(node, 1, "normalized_shape")
        return _first(node, halves) if len(shape) < rank else None
    if _keeps_the_batch_first(node, rank):
        return _first(node, halves)
    return None


def _keeps_the_batch_first(node: Node, rank: int) -> bool:
    """Whether an operation that moves numbers leaves dimension 0 where it is, or reshapes it."""
    target: Any = node.target
    rest: tuple[Any, ...] = node.args[1:]
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)) and target == "permute":
        rest = tuple(rest[0])  # as einops writes it
    if target in _RESHAPES:
        return True  # in the order of memory the first half stays the first half
    if target is operator.getitem:
        index = rest[0]
        if isinstance(index, int):  # a part of a tuple
            return isinstance(node.args[0], Node) and example(node.args[0]) is None
        return isinstance(index, tuple) and len(index) > 0 and index[0] == slice(None)
    if not all(isinstance(value, int) for value in (*rest, *node.kwargs.values())):
        return False
    if target == "transpose":
        return len(rest) == 2 and all(dim % rank for dim in rest)
    if target == "permute":
        return len(rest) == rank and rest[0] % rank == 0
    if target == "unsqueeze":
        return len(rest) == 1 and rest[0] % (rank + 1) != 0
    if target == "squeeze":
        return len(rest) == 1 and rest[0] % rank != 0
    if target in ("chunk", torch.chunk):
        dim = argument(node, 2, "dim", 0)
        return isinstance(dim, int) and dim % rank != 0
    if target in ("repeat_interleave", torch.repeat_interleave):
        return argument(node, 2, "dim") is not None and isinstance(rest[0], int)
    return False


def _first(node: Node, halves: Halves) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The half of the first argument, the others as they are."""
    source = node.args[0]
    half = halves(source) if isinstance(source, Node) else None
    return None if half is None else ((half, *node.args[1:]), dict(node.kwargs))


def _pointwise(node: Node, halves: Halves) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Halves of the operands that have the batch; one that is spread over it stays."""
    result = example(node)
    found: dict[Node, Node | None] = {}
    for source in node.all_input_nodes:
        value = example(source)
        if value is None or result is None or value.dim() > result.dim():
            return None
        if value.dim() == result.dim() and value.shape[0] == result.shape[0]:
            found[source] = halves(source)
    if not found or None in found.values():
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: found.get(n, n))
    return args, kwargs


def _joined(node: Node, halves: Halves) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tensors joined along another dimension than the batch's."""
    dim, parts, value = argument(node, 1, "dim", 0), node.args[0], example(node)
    if not isinstance(dim, int) or not isinstance(parts, (list, tuple)) or value is None:
        return None
    found = [halves(part) if isinstance(part, Node) else None for part in parts]
    if dim % value.dim() == 0 or None in found:
        return None
    return (found, *node.args[1:]), dict(node.kwargs)


def _attention(node: Node, halves: Halves) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Attention without a mask, its tensors given by position."""
    if argument(node, 3, "attn_mask") is not None or argument(node, 4, "dropout_p", 0.0) != 0.0:
        return None
    if any(_rank(part) < 3 for part in node.args[:3]) or len(node.args) < 3:
        return None
    found = [halves(part) if isinstance(part, Node) else None for part in node.args[:3]]
    return None if None in found else ((*found, *node.args[3:]), dict(node.kwargs))


def _expanded(node: Node, halves: Halves) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A tensor with the batch, or one that is only now spread over it."""
    source = node.args[0]
    value, result = example(source), example(node)
    if value is None or result is None:
        return None
    if value.dim() == result.dim() and value.shape[0] == result.shape[0]:
        return _first(node, halves)
    return tuple(node.args), dict(node.kwargs)


def _even(node: Node) -> bool:
    shapes = _shapes(node)
    return bool(shapes) and all(shape and shape[0] > 0 and shape[0] % 2 == 0 for shape in shapes)


def _halved_shapes(node: Node) -> list[tuple[int, ...]]:
    return [(shape[0] // 2, *shape[1:]) for shape in _shapes(node)]


def _shapes(node: Node) -> list[tuple[int, ...]]:
    """Shapes of the tensors of the example value; empty where there is anything else in it."""
    value = node.meta.get("example_value")
    parts = value if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(part, Tensor) for part in parts):
        return []
    return [tuple(part.shape) for part in parts]


def _rank(node: Any) -> int:
    value = example(node)
    return 0 if value is None else value.dim()
