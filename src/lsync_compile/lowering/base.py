"""What a lowering is, and where they are found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch.fx import GraphModule

from lsync_compile.options import Options

GraphFunction = Callable[..., Any]


@dataclass(frozen=True)
class Lowered:
    """A graph ready to run.

    Attributes:
        call: takes the graph's placeholders in order, parameters among them, and returns its
            outputs.
        cache_hit: whether it came from a cache of compiled code.
        note: anything unusual about how it was lowered; empty normally.
    """

    call: GraphFunction
    cache_hit: bool = False
    note: str = ""


Lowering = Callable[[GraphModule, Sequence[Any], Options], Lowered]

# Imported on use: Inductor alone takes seconds.
_LOWERINGS: dict[str, str] = {
    "eager": "lsync_compile.lowering.eager:lower",
    "inductor": "lsync_compile.lowering.inductor:lower",
}


def lowering_names() -> tuple[str, ...]:
    return tuple(_LOWERINGS)


def get_lowering(name: str) -> Lowering:
    """The lowering of that name: ``(graph module, example inputs, options) -> Lowered``.

    Raises:
        KeyError: for an unknown name; options are checked long before.
    """
    module, function = _LOWERINGS[name].split(":")
    lowering: Lowering = getattr(import_module(module), function)
    return lowering
