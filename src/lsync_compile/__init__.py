"""lsync-compile: a ``torch.compile`` backend and runtime for LatentSync."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsync_compile.hook import compile
    from lsync_compile.models.pipeline import LatentSyncPipeline
    from lsync_compile.options import Options

__version__ = "0.1.0"
__all__ = ["LatentSyncPipeline", "Options", "__version__", "compile"]

# Imported on first use: torch, diffusers and the media libraries take seconds.
_WHERE = {
    "LatentSyncPipeline": "lsync_compile.models.pipeline",
    "Options": "lsync_compile.options",
    "compile": "lsync_compile.hook",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
