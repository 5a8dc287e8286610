"""From what a graph returns to what the module returns: the structure that dynamo rebuilds."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsync_compile.kept.state import KNOWN, UnknownError

CONSTANTS = (bool, int, float, str, type(None))


def structure(value: Any, tensors: Sequence[Tensor]) -> Any:
    """How a module's result is made of the tensors that its graph returned, as plain values.

    Args:
        value: a tensor, a constant, or a tuple, list, dict or dataclass of them.
        tensors: results of the graph.

    Raises:
        UnknownError: it holds a tensor that is none of these, or an object of unknown code.
    """
    if isinstance(value, Tensor):
        places = [place for place, tensor in enumerate(tensors) if tensor is value]
        if len(places) != 1:
            raise UnknownError("a result that the graph does not return")
        return ["tensor", places[0]]
    if type(value) in CONSTANTS:
        return ["constant", value]
    if type(value) is list or type(value) is tuple:
        return [type(value).__name__, [structure(part, tensors) for part in value]]
    if type(value) is dict and all(type(key) is str for key in value):
        return ["dict", {key: structure(part, tensors) for key, part in value.items()}]
    cls = type(value)
    if dataclasses.is_dataclass(cls) and _class(cls.__module__, cls.__qualname__) is cls:
        fields = {
            field.name: structure(getattr(value, field.name), tensors)
            for field in dataclasses.fields(cls)
            if field.init
        }
        return ["class", cls.__module__, cls.__qualname__, fields]
    raise UnknownError(f"a result that is a {cls.__module__}.{cls.__qualname__}")


class Rebuild:
    """The way back.

    Args:
        kept: as :func:`structure` gave it.
        count: how many results the graph has.

    Raises:
        UnknownError: it was damaged, or names a class that is not there.
    """

    def __init__(self, kept: Any, count: int) -> None:
        self._kept = kept
        self._count = count
        self._classes: dict[tuple[str, str], type] = {}
        self._learn(kept)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """The module's result of these results of the graph."""
        return self._made(self._kept, tensors)

    def _learn(self, kept: Any) -> None:
        kind, *rest = kept
        inner: Iterable[Any]
        if kind in ("list", "tuple"):
            inner = rest[0]
        elif kind == "dict":
            inner = rest[0].values()
        elif kind == "class":
            cls = _class(rest[0], rest[1])
            if cls is None:
                raise UnknownError(f"{rest[0]}.{rest[1]} is no dataclass of known code")
            self._classes[rest[0], rest[1]] = cls
            inner = rest[2].values()
        elif (kind == "tensor" and rest[0] in range(self._count)) or (
            kind == "constant" and type(rest[0]) in CONSTANTS
        ):
            inner = ()
        else:
            raise UnknownError(f"a result that is {kept!r}")
        for part in inner:
            self._learn(part)

    def _made(self, kept: Any, tensors: Sequence[Tensor]) -> Any:
        kind, *rest = kept
        if kind == "tensor":
            return tensors[rest[0]]
        if kind == "constant":
            return rest[0]
        if kind == "dict":
            return {key: self._made(part, tensors) for key, part in rest[0].items()}
        if kind == "class":
            fields = {key: self._made(part, tensors) for key, part in rest[2].items()}
            return self._classes[rest[0], rest[1]](**fields)
        parts = [self._made(part, tensors) for part in rest[0]]
        return parts if kind == "list" else tuple(parts)


def _class(module: str, name: str) -> type | None:
    """A dataclass by name, of known code other than torch's."""
    if module.partition(".")[0] not in KNOWN or module.partition(".")[0] == torch.__name__:
        return None
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None
