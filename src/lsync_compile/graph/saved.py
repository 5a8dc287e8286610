"""A captured graph as plain values that JSON can hold, and back.

Kept are the nodes, the example value of each, as far as shapes, strides and shared memory go, and
the marks of passes. Functions are kept by the name under which torch has them, and found again only
there: reading a file calls nothing, whatever it says. Graphs that hold tensors of their own, sizes
that are symbols or functions of anyone else are not kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import _get_qualified_name

from lsync_compile.graph.deep_cache import JOIN_KEY
from lsync_compile.graph.dependency import STAGE_KEY, Stage

_ROOTS = {"torch": torch, "_operator": operator, "operator": operator}
_PLAIN = (bool, int, float, str, type(None))
# Values of torch's that are written as their name, such as torch.float16.
_NAMED = (torch.dtype, torch.memory_format, torch.layout)
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "size": torch.Size,
}
# What dynamo says of inputs.
_TYPES = {"": None, "tensor": Tensor, "parameter": nn.Parameter}
# What comes of a damaged file: of Python's, of torch.fx's checks and of its compiled code.
_READING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class SavingError(Exception):
    """A graph cannot be written down, or what was written is not a graph: in one line, why."""


def to_plain(gm: GraphModule) -> dict[str, Any]:
    """A graph as dicts, lists, texts and numbers.

    Raises:
        SavingError: it holds what cannot be written down.
    """
    memory = _Memory()
    return {"nodes": [_node(node, memory) for node in gm.graph.nodes], "memory": memory.sizes}


def from_plain(kept: Any) -> GraphModule:
    """The graph that :func:`to_plain` wrote; its example values are fake tensors of one mode.

    Raises:
        SavingError: it was damaged, or this torch does not have what it names.
    """
    graph = Graph()
    nodes: dict[str, Node] = {}
    try:
        mode = FakeTensorMode()
        memory = [_Allocated(mode, *size) for size in kept["memory"]]
        for each in kept["nodes"]:
            node = nodes[each["name"]] = graph.create_node(
                each["op"],
                _target(each["op"], each["target"]),
                _argument(each["args"], nodes),
                _argument(each["kwargs"], nodes),
                each["name"],
                _TYPES[each["type"]],
            )
            if "value" in each:
                node.meta["example_value"] = _value(each["value"], memory)
            node.meta.update(_marks(each))
        graph.lint()
        return GraphModule(nn.Module(), graph)
    except _READING_ERRORS as error:
        raise SavingError(f"no graph: {type(error).__name__}: {error}") from error


def _node(node: Node, memory: _Memory) -> dict[str, Any]:
    if node.op in ("get_attr", "call_module"):
        raise SavingError(f"{node.name} is held by the graph itself")
    kept: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "target": _name(node.target) if node.op == "call_function" else node.target,
        "args": _plain(tuple(node.args)),
        "kwargs": _plain(dict(node.kwargs)),
        "type": _type_name(node),
    }
    if "example_value" in node.meta:
        kept["value"] = _plain(node.meta["example_value"], memory)
    if JOIN_KEY in node.meta:
        kept["join"] = node.meta[JOIN_KEY]
    if STAGE_KEY in node.meta:
        kept["stage"] = node.meta[STAGE_KEY].name
    return kept


def _type_name(node: Node) -> str:
    """Of dynamo's annotation, which is part of the graph's text, and so of the keys of caches."""
    for name, kind in _TYPES.items():
        if node.type is kind:
            return name
    raise SavingError(f"{node.name} is annotated with {node.type}")


def _marks(kept: dict[str, Any]) -> dict[str, Any]:
    marks: dict[str, Any] = {}
    if "join" in kept:
        marks[JOIN_KEY] = int(kept["join"])
    if "stage" in kept:
        marks[STAGE_KEY] = Stage[kept["stage"]]
    return marks


# Functions


def _name(function: Any) -> str:
    """The name under which torch or ``operator`` has a function, and nothing else has it."""
    if isinstance(function, torch._ops.OpOverload):
        return f"torch.ops.{function}"
    name = _get_qualified_name(function)
    if _found(name) is not function:
        raise SavingError(f"{name} is not torch's")
    return name


def _target(op: str, name: str) -> Callable[..., Any] | str:
    if op in ("placeholder", "call_method", "output"):
        # A graph's code is made of text: no name may be more than a name.
        if not name.isidentifier() or name.startswith("__"):
            raise SavingError(f"{name!r} is no name")
        return name
    function: Callable[..., Any] = _found(name)
    if not callable(function):
        raise SavingError(f"{name} is no function")
    # A function that someone has put in torch's place has kept its own name.
    if not isinstance(function, torch._ops.OpOverload) and _get_qualified_name(function) != name:
        raise SavingError(f"{name} has been replaced")
    return function


def _found(name: str) -> Any:
    root, *parts = name.split(".")
    found: Any = _ROOTS.get(root)
    for part in parts:
        found = getattr(found, part, None)
    return found


# Arguments and values


def _plain(value: Any, memory: _Memory | None = None) -> Any:
    """Plain values are themselves; all else is a list that begins with what it is."""
    if isinstance(value, IntEnum) or not isinstance(value, _PLAIN):
        return _tagged(value, memory)
    return value


def _tagged(value: Any, memory: _Memory | None) -> list[Any]:
    if isinstance(value, Node):
        return ["node", value.name]
    if isinstance(value, Tensor) and memory is not None:
        return ["tensor", *memory.place(value)]
    if isinstance(value, slice):
        return ["slice", *(_plain(part) for part in (value.start, value.stop, value.step))]
    if isinstance(value, torch.Size):
        return ["size", *(_plain(part) for part in value)]
    if type(value) is tuple:
        return ["tuple", *(_plain(part, memory) for part in value)]
    if isinstance(value, list):
        return ["list", *(_plain(part, memory) for part in value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return ["dict", {key: _plain(part, memory) for key, part in value.items()}]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, _NAMED):
        return ["torch", str(value).removeprefix("torch.")]
    if value is ...:
        return ["..."]
    raise SavingError(f"a value of {type(value).__name__}")


def _argument(kept: Any, nodes: dict[str, Node]) -> Any:
    return _back(kept, lambda name: nodes[name], _no_tensor)


def _value(kept: Any, memory: list[_Allocated]) -> Any:
    return _back(kept, _no_node, lambda index, *where: memory[index].tensor(*where))


def _back(kept: Any, node: Callable[[str], Node], tensor: Callable[..., Tensor]) -> Any:
    if not isinstance(kept, list):
        return kept
    kind, *rest = kept
    if kind == "node":
        return node(*rest)
    if kind == "tensor":
        return tensor(*rest)
    if kind == "dict":
        return {key: _back(part, node, tensor) for key, part in rest[0].items()}
    if kind == "device":
        return torch.device(rest[0])
    if kind == "torch":
        value = getattr(torch, rest[0])
        if not isinstance(value, _NAMED):
            raise SavingError(f"torch.{rest[0]} is no value")
        return value
    if kind == "...":
        return ...
    parts = [_back(part, node, tensor) for part in rest]
    return slice(*parts) if kind == "slice" else _SEQUENCES[kind](parts)


def _no_node(name: str) -> Node:
    raise SavingError(f"{name}: an example value that is a node")


def _no_tensor(*where: Any) -> Tensor:
    raise SavingError("an argument that is a tensor")


# Example values: which of them lie in the same memory matters to passes and to the planner.


class _Memory:
    """Numbers the storages of example values.

    Attributes:
        sizes: (bytes, device) of each.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[int, str]] = []
        self._numbers: dict[int, int] = {}

    def place(self, value: Tensor) -> list[Any]:
        """Storage, offset, shape, strides, dtype and whether it is a parameter."""
        if value.layout is not torch.strided or value.is_quantized:
            raise SavingError("a tensor that is not strided")
        numbers = [value.storage_offset(), *value.shape, *value.stride()]
        if not all(type(number) is int for number in numbers):
            raise SavingError("sizes that are symbols")
        storage = value.untyped_storage()
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = len(self.sizes)
            self.sizes.append((int(storage.nbytes()), str(value.device)))
        return [
            self._numbers[storage._cdata],
            value.storage_offset(),
            list(value.shape),
            list(value.stride()),
            str(value.dtype).removeprefix("torch."),
            isinstance(value, nn.Parameter),
            value.requires_grad,
        ]


class _Allocated:
    """A storage without memory behind it, and the tensors that lie in it."""

    def __init__(self, mode: FakeTensorMode, size: int, device: str) -> None:
        self._mode = mode
        self._device = torch.device(device)
        self._storage = torch.empty(size, dtype=torch.uint8, device="meta").untyped_storage()

    def tensor(
        self,
        offset: int,
        shape: list[int],
        strides: list[int],
        dtype: str,
        parameter: bool,
        requires_grad: bool,
    ) -> Tensor:
        plain = torch.empty(0, dtype=getattr(torch, dtype), device="meta")
        plain.set_(self._storage, offset, shape, strides)
        made = FakeTensor(self._mode, plain.requires_grad_(requires_grad), self._device)
        if parameter:
            made._is_param = True  # what makes it an nn.Parameter, which would copy it first
        return made
