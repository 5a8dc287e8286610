"""Other people's pipelines: what is known of each kind, and how the runtime reaches it."""

from __future__ import annotations

from typing import Any

from lsync_compile.integrations.adapter import Adapter
from lsync_compile.integrations.diffusers import DIFFUSERS, OTHER
from lsync_compile.integrations.upstream import UPSTREAM

__all__ = ["Adapter", "adapter_for"]

# The pipeline, and the networks of a benchmark, which are run by the same code.
_OURS = frozenset({"lsync_compile.models.pipeline", "lsync_compile.bench.engines"})


def adapter_for(pipeline: Any) -> Adapter | None:
    """What is known of a pipeline; None for ours, whose loop works with the runtime itself."""
    if any(kind.__module__ in _OURS for kind in type(pipeline).__mro__):
        return None
    return next(known for known in (UPSTREAM, DIFFUSERS, OTHER) if known.fits(pipeline))
