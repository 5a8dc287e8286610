"""From a rewritten graph to something that runs: a registry of lowerings by name."""

from __future__ import annotations

from lsync_compile.lowering.base import Lowered, Lowering, get_lowering, lowering_names

__all__ = ["Lowered", "Lowering", "get_lowering", "lowering_names"]
