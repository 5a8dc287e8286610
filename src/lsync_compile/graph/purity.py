"""What a rewrite must know before it shares a value: who sees its memory, is it always the same."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operator.iadd and its kin, and item assignment.
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in operator.__all__ if name.startswith("i")
) - {operator.index, operator.indexOf, operator.inv, operator.invert, operator.is_, operator.is_not}
_WRITES = frozenset({*_IN_PLACE_OPERATORS, operator.setitem, operator.delitem})


def writes_in_place(node: Node) -> bool:
    """Whether the node changes one of its arguments, by name, schema, ``inplace`` or ``out``."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.target in _WRITES or "out" in node.kwargs:
        return True
    return (
        getattr(node.target, "__name__", "").rstrip("_") + "_"
        == getattr(node.target, "__name__", "")
        or _argument(node, "inplace") is True
    )


def has_writes(graph: Graph) -> bool:
    """Whether any node of the graph writes in place."""
    return any(writes_in_place(node) for node in graph.nodes)


def wants_gradient(graph: Graph) -> bool:
    """Whether a gradient may be asked of what the graph computes."""
    inputs = (node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder")
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )


def why_seen(graph: Graph) -> str:
    """Why others see values inside the graph; the empty string where only its results count."""
    if has_writes(graph):
        return "the graph writes in place"
    if wants_gradient(graph):
        return "a gradient is wanted"
    return ""


def result_storages(graph: Graph) -> set[int]:
    """Identities of the memory that the graph's results lie in, for :func:`storage`.

    Views among the captured example values share memory as the real ones will.
    """
    results = graph.output_node().all_input_nodes
    return {key for key in map(storage, results) if key is not None}


def storage(node: Node) -> int | None:
    """Identity of the memory of the node's example value; None where it is no tensor."""
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _argument(node: Node, name: str) -> object:
    """The value of a named argument however it was passed; None for functions written in C."""
    if name in node.kwargs:
        return node.kwargs[name]
    signature = _signature(node.target)
    if signature is None or name not in signature.parameters:
        return None
    try:
        return signature.bind(*node.args, **node.kwargs).arguments.get(name)
    except TypeError:  # it does not fit
        return None


@functools.lru_cache(1024)
def _signature(function: Any) -> inspect.Signature | None:
    """None where it has none, as many functions written in C."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def draws_random_numbers(node: Node) -> bool:
    """Whether the node's value may be another one next time, for the same inputs.

    Found out by running it on shapes alone and looking at the operators that it calls. What cannot
    run on shapes counts as random.
    """
    values, named = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("example_value"))
    seen = _SeededOperators()
    modes = {
        value.fake_mode for value in tree_leaves((values, named)) if isinstance(value, FakeTensor)
    }
    try:
        with modes.pop() if modes else FakeTensorMode(), seen:  # the last one sees operators first
            if node.op == "call_method":
                getattr(values[0], str(node.target))(*values[1:], **named)
            else:
                node.target(*values, **named)  # type: ignore[operator]  # a function here
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return True
    return seen.any


class _SeededOperators(TorchDispatchMode):
    """Notes whether an operator ran that takes numbers from a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.any |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
