"""One module of a pipeline, compiled in place and undoable.

``Module.compile`` compiles the code object of the class's ``forward``, which all instances share,
and all shapes: dynamo stops at eight graphs for a code object, and searches the guards of all of
them at each call. Here each shape of each module gets a code object of its own. Any number of
shapes compiles, the limit keeps its purpose (a guard that fails again and again), and the graphs go
when the module is undone.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError
from torch.utils._pytree import tree_leaves, tree_map

from lsync_compile import compile_cache
from lsync_compile.backend import GraphCompiler
from lsync_compile.errors import CompileError, LsyncError, OptionError
from lsync_compile.kept.call import KeptCall, Question, Recorded, Recording, find
from lsync_compile.kept.state import UnknownError
from lsync_compile.passes.manager import PassManager
from lsync_compile.report import Session
from lsync_compile.runtime.context import Terms, current_terms
from lsync_compile.runtime.running import options_of, runs_plain
from lsync_compile.runtime.step_tracker import placed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorShape:
    """Enough of a tensor to make another like it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class CompiledCall:
    """Stands in ``module._compiled_call_impl`` and runs the module compiled.

    Args:
        module: compiled in place by :meth:`attach`.
        session: gathers its records.
        role: what the module is in its pipeline, such as "unet".
        owner: the handle that can undo it; without it, the module is free for others.
        dynamic: as in ``torch.compile``.
        fullgraph: as in ``torch.compile``.

    Attributes:
        seen: (args, kwargs) of the first call with :class:`TensorShape` for each tensor, or None.
        seen_terms: what that call said of itself.
    """

    def __init__(
        self,
        module: nn.Module,
        session: Session,
        role: str,
        *,
        owner: object,
        dynamic: bool,
        fullgraph: bool,
    ) -> None:
        self.module = module
        self.owner = ref(owner)
        self.session = session
        self.role = role
        self.seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.seen_terms: Terms | None = None
        self._dynamic = dynamic
        self._fullgraph = fullgraph
        self._plain = False
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._compilers: list[GraphCompiler] = []

    def attach(self) -> None:
        self.module._compiled_call_impl = self

    def detach(self) -> None:
        """Give the module its plain call back, unless someone else's stands there by now.

        What its graphs kept between calls is dropped.
        """
        for compiler in self._compilers:
            compiler.release()
        if self.module._compiled_call_impl is self:
            self.module._compiled_call_impl = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module.

        Raises:
            CompileError: with the option ``strict``, where a graph cannot be compiled.
        """
        in_larger_graph = torch.compiler.is_dynamo_compiling()
        if self._plain or in_larger_graph or runs_plain():
            return self.module._call_impl(*args, **kwargs)
        with placed(self.role, args, kwargs):
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.seen is None:
            self.seen = tree_map(_shape_of, (args, kwargs))
            self.seen_terms = current_terms()
        try:
            return self._for_shapes(args, kwargs)(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, LsyncError):
                raise error.inner_exception from None
            raise
        except InternalTorchDynamoError as error:  # the capture itself broke: no graph to keep
            cause = f"capture: {str(error).strip().splitlines()[0]}"
            if options_of(self.session).strict or self._fullgraph:
                raise CompileError(f"{self.role}: {cause}") from error
            self._plain = True
            if self.session.note(f"{self.role} runs plain; {cause}"):
                log.warning("%s runs plain, not compiled: %s", self.role, cause)
            return self.module._call_impl(*args, **kwargs)

    def _for_shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """What is compiled for inputs like these in a place like this.

        One for all shapes with ``dynamic``. The terms and the options that graphs are made by are
        part of the key: a graph is never run where they do not hold.
        """
        leaves = () if self._dynamic else tree_leaves((args, kwargs))
        shapes = tuple(
            (leaf.shape, leaf.dtype, leaf.device)
            for leaf in leaves
            if isinstance(leaf, torch.Tensor)
        )
        terms = current_terms()
        key = (terms, shapes, options_of(self.session).rebuild_key)
        if key not in self._compiled:
            self._compiled[key] = self._made(terms, (args, kwargs))
        return self._compiled[key]

    def _made(self, terms: Terms, arguments: Any) -> Callable[..., Any]:
        """Compiled from the graph of an earlier process, or else by dynamo."""
        question = self._question(terms, arguments)
        kept = None if question is None else find(question)
        if question is not None and kept is not None:
            try:
                return KeptCall(
                    question,
                    kept,
                    self._compiler(terms).restore,
                    lambda: self._captured_anew(terms),
                )
            except UnknownError as error:
                log.info("%s is captured again: %s", self.role, error)
        return self._captured(terms, question)

    def _captured(self, terms: Terms, question: Question | None = None) -> Callable[..., Any]:
        """Compiled by dynamo, and taken down where a question is to be answered."""
        recording = None if question is None else Recording(question)
        compiled = torch.compile(
            own_call(self.module),
            backend=self._compiler(terms, recording),
            dynamic=self._dynamic,
            fullgraph=self._fullgraph,
        )
        return compiled if recording is None else Recorded(compiled, recording)

    def _captured_anew(self, terms: Terms) -> Callable[..., Any]:
        self.session.note(
            f"{self.role}: the graph of an earlier process is not right for all calls, because "
            "the module, or torch's settings, changed: captured again"
        )
        return self._captured(terms)

    def _compiler(self, terms: Terms, recording: Recording | None = None) -> GraphCompiler:
        made = GraphCompiler(self.session, self.role, len(self._compiled), terms, recording)
        self._compilers.append(made)
        return made

    def _question(self, terms: Terms, arguments: Any) -> Question | None:
        """What to look for on disk; None where that is switched off or cannot be said."""
        options = options_of(self.session)
        off = not options.keep_captures or options.dump_dir is not None
        if off or self._dynamic or compile_cache.folder() is None:
            return None
        said = sorted(terms.vouched), terms.chunks, terms.timesteps, terms.region
        made_by = self.role, *said, PassManager(options).uuid()
        try:
            return Question(self.module, arguments, made_by)
        except UnknownError as error:
            log.info("%s is captured in each process: %s", self.role, error)
            return None


def check_free(module: nn.Module, role: str) -> None:
    """Refuse a module that already runs compiled, or with its ``forward`` exchanged.

    Raises:
        OptionError: saying what to undo.
    """
    if isinstance(module, torch._dynamo.OptimizedModule):
        raise OptionError(f"{role} is compiled already by torch.compile: give the plain module")
    call = module._compiled_call_impl
    if isinstance(call, CompiledCall):
        if call.owner() is None:
            return
        raise OptionError(
            f"{role} is compiled already as part of another pipeline: call .lsync.undo() on that"
        )
    if call is not None:
        raise OptionError(
            f"{role} is compiled already by another backend: "
            f"set {role}._compiled_call_impl = None first"
        )


def check_deepcache(unet: nn.Module) -> None:
    """Refuse a UNet that the DeepCache package has wrapped.

    Its helper exchanges the ``forward`` of the UNet and of each block for closures that read the
    timestep back from the device and keep features in Python dicts: compiled, they would be frozen.

    Raises:
        OptionError: saying how to switch it off.
    """
    forward = vars(unet).get("forward")
    origin = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    if "DeepCache" in origin:
        raise OptionError(
            "DeepCacheSDHelper is enabled on this pipeline's unet: "
            "call helper.disable() before compiling or running it with lsync; in its place, "
            "lsync's option deep_cache reuses deep features"
        )


def own_call(module: nn.Module) -> types.MethodType:
    """The module's ``__call__`` with hooks, as a method whose code object is nobody else's."""
    code = _call.__code__.replace(co_name=_call.__code__.co_name)  # equal, but a new object
    return types.MethodType(types.FunctionType(code, globals(), _call.__name__), module)


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._call_impl(*args, **kwargs)


def _shape_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorShape(tuple(value.shape), value.dtype, value.device)
    return value
