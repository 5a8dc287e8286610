"""Remove operations that return what they were given.

Captured at torch level, a network still holds what its Python says and the numbers do not need:
dropout outside training, ``to`` the dtype it has, a transpose undone by the next one.

Case 1, the operation returns its input itself (also: ``to``, ``contiguous``, ``float`` and
``half`` of what is so already)::

    h = mul(x, gelu)                    h = mul(x, gelu)
    d = dropout(h, 0.0, False)    ->    y = linear(h, w)
    y = linear(d, w)

Case 2, the operation returns the same memory with the same shape and strides (also: ``view``,
``reshape``, ``flatten``, ``expand`` to the same shape)::

    a = x.transpose(1, 2)
    b = a.transpose(1, 2)         ->    y = x.flatten(0, 1)
    y = b.flatten(0, 1)

Case 3, the operation copies its input bit for bit (also: ``x * 1``, ``x / 1.0``)::

    e = 1 * x                     ->    y = sin(x)
    y = sin(e)

Adding zero is not among them: ``-0.0 + 0.0`` is ``0.0``. Case 2 leaves results of the graph alone,
which must not become its inputs. Case 3 leaves memory alone that results lie in, and graphs that
write in place: there a copy is more than its bits.

Exact under every lowering, forward and backward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lsync_compile.graph.purity import has_writes, result_storages, storage
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

_CASTS = ("to", "float", "half", "bfloat16", "double", "contiguous", "type_as")
_VIEWS = ("view", "reshape", "flatten", "expand", "transpose")
_MULTIPLY = (operator.mul, torch.mul, torch.multiply)
_DIVIDE = (operator.truediv, torch.div, torch.divide, torch.true_divide)


@register
class RemoveNoops(Pass):
    """Case by case above; counts the operations removed."""

    spec = PassSpec(
        name="remove_noops",
        phase=Phase.CLEAN,
        option="remove_noops",
        summary="Removes operations that return their input: dropout outside training, casts to "
        "the same dtype, transposes that undo each other, products with 1.",
    )

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        copies_matter = has_writes(gm.graph)
        results = result_storages(gm.graph)
        removed = 0
        for node in gm.graph.nodes:
            source = _same_object(node)
            if source is None and not any(user.op == "output" for user in node.users):
                source = _same_memory(node)
            if source is None and not copies_matter and storage(node) not in results:
                source = _same_bits(node)
            if source is not None:
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
                removed += 1
        return removed


def _same_object(node: Node) -> Node | None:
    """Case 1."""
    if node.op == "call_function" and node.target is F.dropout:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return _input(node) if training is False else None
    if node.op == "call_method" and node.target in _CASTS:
        copies = node.kwargs.get("copy") or any(argument is True for argument in node.args[1:])
        formats = (*node.args[1:], *node.kwargs.values())
        if copies or any(isinstance(value, torch.memory_format) for value in formats):
            return None
        source = _input(node)
        if node.target == "contiguous":
            return source if _holds(source, torch.Tensor.is_contiguous) else None
        return source if _alike(source, node) else None
    return None


def _same_memory(node: Node) -> Node | None:
    """Case 2."""
    if node.op != "call_method" or node.target not in _VIEWS:
        return None
    source = _input(node)
    if source is None:
        return None
    if node.target == "transpose":
        if source.op != "call_method" or source.target != "transpose":
            return None
        first, second = _dims(source), _dims(node)
        before = _input(source)
        return before if first is not None and first == second and _alike(before, node) else None
    return source if _alike(source, node) else None


def _same_bits(node: Node) -> Node | None:
    """Case 3; the strides must not change either."""
    if node.op != "call_function" or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    if node.target in _MULTIPLY and _is_one(left) and isinstance(right, Node):
        left, right = right, left
    if (node.target not in _MULTIPLY and node.target not in _DIVIDE) or not _is_one(right):
        return None
    return left if isinstance(left, Node) and _alike(left, node) else None


def _input(node: Node) -> Node | None:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, Node) else None


def _dims(node: Node) -> frozenset[int] | None:
    """The two dimensions of a transpose, counted from the front."""
    value = _tensor(node)
    dims = node.args[1:]
    if value is None or len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        return None
    return frozenset(dim % value.dim() for dim in dims if isinstance(dim, int))


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1


def _tensor(node: Node | None) -> torch.Tensor | None:
    value = None if node is None else node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def _holds(node: Node | None, check: Callable[[torch.Tensor], bool]) -> bool:
    value = _tensor(node)
    return value is not None and check(value)


def _alike(first: Node | None, second: Node) -> bool:
    """Whether two nodes have the same shape, strides, dtype and device."""
    one, two = _tensor(first), _tensor(second)
    return (
        one is not None
        and two is not None
        and one.shape == two.shape
        and one.stride() == two.stride()
        and (one.dtype, one.device, one.layout) == (two.dtype, two.device, two.layout)
    )
