"""How ``torch.compile(pipeline, backend="lsync")`` reaches a pipeline object.

torch hands a backend graphs, never the object that was compiled; for a pipeline, which is no
module, it would trace the whole ``__call__`` with its host code. The backend's module is imported
inside ``torch.compile`` before the object is looked at, so importing it is early enough to
wrap the one method that torch then calls with the object, once. Everything that is no pipeline or
asks for another backend goes on untouched.
"""

from __future__ import annotations

import functools
import logging
import types
from typing import Any

import torch
from torch import nn

from lsync_compile.compiled import (
    CompiledPipeline,
    compile_callable,
    compile_pipeline,
    is_pipeline,
)
from lsync_compile.errors import OptionError
from lsync_compile.options import resolve_options

__all__ = ["CompiledPipeline", "compile", "install", "installed"]

log = logging.getLogger(__name__)
_MARK = "_lsync_wraps"


def install() -> bool:
    """Wrap torch's method, once; False with a warning where this version of torch has none.

    Without the hook, ``lsync_compile.compile(pipeline)`` does the same.
    """
    context = _context_class()
    if context is None:
        log.warning(
            "torch %s has no hook for pipeline objects: use lsync_compile.compile(pipeline) "
            "instead of torch.compile(pipeline, backend='lsync')",
            torch.__version__,
        )
        return False
    original = context.__call__
    if hasattr(original, _MARK):
        return True

    @functools.wraps(original)
    def call(self: Any, fn: Any) -> Any:
        if not _is_lsync(self) or not is_pipeline(fn):
            return original(self, fn)
        backend = _backend_of(self)
        options = resolve_options(backend.kwargs.get("mode"), backend.kwargs.get("options"))
        dynamic, fullgraph = getattr(self, "_dynamic", None), getattr(self, "fullgraph", False)
        return compile_pipeline(fn, options, dynamic=bool(dynamic), fullgraph=fullgraph)

    setattr(call, _MARK, original)
    context.__call__ = call
    return True


def installed() -> bool:
    """Whether ``torch.compile(pipeline, backend="lsync")`` works in this process."""
    context = _context_class()
    return context is not None and hasattr(context.__call__, _MARK)


def compile(
    obj: Any,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> Any:
    """Compile a pipeline, a module or a function with lsync.

    Args:
        obj: a pipeline (callable, with ``unet``, ``vae`` and ``scheduler``), an ``nn.Module`` or a
            function.
        mode: a preset's name; the same as the option ``preset``.
        dynamic: as in ``torch.compile``; a pipeline is specialised by shape unless it is True.
        fullgraph: as in ``torch.compile``: a graph break is an error.
        **options: see :class:`lsync_compile.Options`.

    Returns:
        For a pipeline a :class:`CompiledPipeline`, for the others what ``torch.compile`` returns;
        each with a handle ``.lsync``: ``report()``, ``options``, ``explain()``, ``undo()``.

    Raises:
        OptionError: for a wrong option or an object that is none of the three.
    """
    if is_pipeline(obj):
        return compile_pipeline(
            obj, resolve_options(mode, options), dynamic=bool(dynamic), fullgraph=fullgraph
        )
    if not isinstance(obj, (nn.Module, types.FunctionType, types.MethodType)):
        raise OptionError(
            f"lsync_compile.compile takes a pipeline with unet, vae and scheduler, a module or a "
            f"function, not {type(obj).__name__}"
        )
    resolved = resolve_options(mode, options, default_preset="exact")
    return compile_callable(obj, resolved, dynamic=dynamic, fullgraph=fullgraph)


def _context_class() -> Any:
    """The class whose ``__call__(self, fn)`` receives what ``torch.compile`` was given."""
    from torch._dynamo import eval_frame

    context = getattr(eval_frame, "_TorchDynamoContext", None)
    return context if callable(getattr(context, "__call__", None)) else None  # noqa: B004


def _is_lsync(context: Any) -> bool:
    from lsync_compile.backend import lsync

    return getattr(_backend_of(context), "compiler_fn", None) is lsync


def _backend_of(context: Any) -> Any:
    """What ``torch.compile`` made of its arguments: mode and options are its ``kwargs``."""
    backend: Any = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend
