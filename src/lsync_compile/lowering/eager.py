"""Runs the graph as it stands, operation by operation.

Each node calls what the plain module would have called, in the same order on the same tensors, so
a graph whose passes are bitwise exact gives the plain module's bits. It is the reference that
passes are judged by, and what remains where compiling fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from lsync_compile.lowering.base import Lowered
from lsync_compile.options import Options


def lower(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Lowered:
    """The graph's own generated Python; parameters arrive as placeholders like all inputs."""
    return Lowered(gm.forward)
