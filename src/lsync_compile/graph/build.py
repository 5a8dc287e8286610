"""New nodes for a captured graph, with the example values that later passes look at.

Passes write the graph in ``torch`` calls. Each node of a captured graph carries a fake tensor of
its result in ``meta["example_value"]``; :func:`call` makes nodes that do too, and :func:`replace`
hands an old node's users to a new one and corrects theirs where strides have changed.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node, symbolic_trace
from torch.fx.node import map_arg

from lsync_compile.graph.purity import writes_in_place


def example(node: Any) -> Tensor | None:
    """The node's example value where it is a tensor."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def call(
    graph: Graph,
    target: Callable[..., Any] | str,
    *args: Any,
    like: Node | None = None,
    **kwargs: Any,
) -> Node:
    """Insert a call at the graph's insertion point; see ``Graph.inserting_before``.

    Args:
        graph: changed in place.
        target: a function, an operator such as ``torch.ops.lsync.geglu.default``, or a tensor
            method's name.
        *args, **kwargs: nodes and plain values, as in the call; lists and tuples of them too.
        like: a node whose place in the module tree the new one takes (all metadata but the
            example value).

    Returns:
        The new node, ``meta["example_value"]`` set. A tuple's parts are
        ``call(graph, operator.getitem, node, index)``.

    Raises:
        RuntimeError, ValueError: what the operation itself says of arguments that do not fit.
    """
    value = _evaluate(graph, target, args, kwargs)
    op = "call_method" if isinstance(target, str) else "call_function"
    node = graph.create_node(op, target, args, kwargs)
    if like is not None:
        node.meta.update({k: v for k, v in like.meta.items() if k != "example_value"})
    node.meta["example_value"] = value
    return node


def inline(graph: Graph, function: Callable[..., Tensor], *inputs: Node, like: Node) -> Node:
    """Insert the operations of a function, which stages and Inductor do not see otherwise.

    Args:
        graph: changed at its insertion point.
        function: of tensors, such that ``torch.fx.symbolic_trace`` takes it.
        *inputs: its arguments.
        like: see :func:`call`.
    """
    waiting, made = iter(inputs), dict[Node, Any]()
    for node in symbolic_trace(function).graph.nodes:
        if node.op == "placeholder":
            made[node] = next(waiting)
        elif node.op == "output":
            result: Node = made[node.args[0]]
            return result
        else:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), made.__getitem__)
            made[node] = call(graph, node.target, *args, like=like, **kwargs)
    raise AssertionError("a graph without an output")


def item(node: Node, index: int, like: Node | None = None) -> Node:
    """Insert ``node[index]``, a part of a tuple."""
    return call(node.graph, operator.getitem, node, index, like=like or node)


def replace(old: Node, new: Node) -> None:
    """Give the users of ``old`` to ``new`` (which may use ``old`` itself).

    Strides may differ: the example values of all that depends on them are computed again, and a
    ``view`` that they no longer allow becomes a ``reshape``.

    Raises:
        ValueError: shapes, dtypes or devices differ.
    """
    before, after = example(old), example(new)
    if before is None or after is None or _kind(before) != _kind(after):
        raise ValueError(
            f"{new.name} cannot replace {old.name}: {_said(after)} instead of {_said(before)}"
        )
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    refresh(new)


def drop(node: Node) -> None:
    """Erase a node that nothing uses, then those of its inputs that this leaves without users.

    Placeholders stay, as do nodes that do more than compute a value.
    """
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current.users or current.op == "placeholder" or _does_more(current):
            continue
        sources = current.all_input_nodes
        current.graph.erase_node(current)
        waiting.extend(sources)


def drop_unused(graph: Graph) -> None:
    """Erase what nothing uses, but what writes: FX takes ``x.add_(1)`` for a computed value."""
    graph.eliminate_dead_code(_does_more)


def _does_more(node: Node) -> bool:
    """Whether a node does more than compute a value."""
    return node.is_impure() or writes_in_place(node)


def refresh(changed: Node) -> None:
    """Compute the example values again that a changed one of this node has made wrong.

    Follows strides and shared memory from user to user, as far as either differs from before.
    """
    waiting = {user for user in changed.users if user.op != "output"}
    while waiting:
        node = min(waiting)  # nodes compare by their place in the graph
        waiting.remove(node)
        new = _reevaluate(node)
        # Views among the example values share memory: one that stays right stays the same object.
        if _layout(new) != _layout(node.meta.get("example_value")) or _shares_memory(node, new):
            node.meta["example_value"] = new
            waiting.update(user for user in node.users if user.op != "output")


def _reevaluate(node: Node) -> Any:
    try:
        return _evaluate(node.graph, node.target, node.args, node.kwargs)
    except (RuntimeError, ValueError):
        if node.op != "call_method" or node.target != "view":
            raise
    node.target = "reshape"
    return _evaluate(node.graph, node.target, node.args, node.kwargs)


def _evaluate(graph: Graph, target: Any, args: Any, kwargs: Any) -> Any:
    """The result for example values: shapes and strides, nothing is computed."""
    values, named = map_arg((args, dict(kwargs)), _value)
    with _fake_mode(graph) or contextlib.nullcontext():
        if isinstance(target, str):
            return getattr(values[0], target)(*values[1:], **named)
        return target(*values, **named)


def _value(node: Node) -> Any:
    return node.meta["example_value"]


def _fake_mode(graph: Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def _kind(value: Tensor) -> Any:
    return value.shape, value.dtype, value.device


def _layout(value: Any) -> Any:
    """What users of a value see of it; lists of tensors part by part."""
    if isinstance(value, (list, tuple)):
        return [_layout(part) for part in value]
    if isinstance(value, Tensor):
        return _kind(value), value.stride(), value.storage_offset()
    return value


def _shares_memory(node: Node, value: Any) -> bool:
    """Whether a part of the node's value lies in the memory of one of its inputs."""
    inputs = {_memory(source) for each in node.all_input_nodes for source in _tensors(each)}
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(_memory(part) in inputs for part in parts if isinstance(part, Tensor))


def _tensors(node: Node) -> list[Tensor]:
    """The node's example value, or the parts of a tuple."""
    value = node.meta.get("example_value")
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [part for part in parts if isinstance(part, Tensor)]


def _memory(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _said(value: Tensor | None) -> str:
    return "no tensor" if value is None else f"{tuple(value.shape)} {value.dtype} {value.device}"
