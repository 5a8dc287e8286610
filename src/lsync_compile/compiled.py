"""Compiled objects and the handle to them: what the user holds in hand after compiling."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lsync_compile.errors import OptionError
from lsync_compile.integrations import adapter_for
from lsync_compile.options import Options
from lsync_compile.report import Report, Session
from lsync_compile.runtime.calibration import load_calibrations
from lsync_compile.runtime.running import running
from lsync_compile.runtime.step_tracker import tracking

if TYPE_CHECKING:
    from lsync_compile.explain import Explanation
    from lsync_compile.targets import CompiledCall

# Without a GPU, torch 2.11 crashes in whatever thread traces after the first that ever did has
# ended. Stages trace in threads that end, so the first is the one that imports this.
with FakeTensorMode():
    pass

log = logging.getLogger(__name__)
_LINK = "_lsync_link"
_RUNS = frozenset({"synthesize"})  # ways to run a pipeline beside calling it
_OWN = frozenset({"_lsync_handle", "_lsync_run", "_is_torch_compile"})
ROLES = ("unet", "vae.encoder", "vae.decoder")


def is_pipeline(obj: object) -> bool:
    """Whether lsync treats an object as a pipeline: callable, with unet, vae and scheduler."""
    return (
        not isinstance(obj, nn.Module)
        and not inspect.isclass(obj)
        and callable(obj)
        and all(hasattr(obj, name) for name in ("unet", "vae", "scheduler"))
    )


class Handle:
    """``compiled.lsync``: what was done to a module or function, and the way back.

    Args:
        original: the object as it was given.
        session: its records.
    """

    def __init__(self, original: Any, session: Session) -> None:
        self._original = original
        self._session = session

    @property
    def options(self) -> Options:
        """The checked options in force."""
        return self._session.options

    def report(self) -> Report:
        """A snapshot of what was compiled, what was applied and how often it ran."""
        return self._session.report()

    def note(self, text: str) -> bool:
        """Add a line to the report; False where it stands there already."""
        return self._session.note(text)

    def undo(self) -> Any:
        """The object as it was before compiling."""
        return self._original

    def explain(self, example_inputs: Any = None) -> Explanation:
        """What lsync does with this module, see :func:`lsync_compile.explain.explain`."""
        from lsync_compile.explain import explain_with

        return explain_with(self._original, example_inputs, self.options)


class PipelineHandle(Handle):
    """The handle of a pipeline; keeps its modules compiled while it is in force."""

    def __init__(self, pipeline: Any, session: Session, *, dynamic: bool, fullgraph: bool) -> None:
        super().__init__(pipeline, session)
        self.dynamic = dynamic
        self.fullgraph = fullgraph
        self._calls: dict[str, CompiledCall] = {}
        self._adapter = adapter_for(pipeline)
        self._lock = threading.Lock()
        self._active = True

    def undo(self) -> Any:
        """The plain pipeline, its modules as they were before; the proxy then runs it plain."""
        with self._lock:
            for call in self._calls.values():
                call.detach()
            self._calls.clear()
            self._active = False
        self._session.memory.release()
        vars(self._original).pop(_LINK, None)
        return self._original

    def explain(self, example_inputs: Any = None) -> Explanation:
        """What lsync does with each module, by the shapes of its first call.

        Args:
            example_inputs: as in :func:`lsync_compile.explain.explain`; by default the shapes that
                each compiled module was first called with.

        Raises:
            OptionError: without inputs, before the pipeline has run.
        """
        from lsync_compile.explain import explain_with, zeros_like_seen

        if example_inputs is None:
            example_inputs = {
                role: zeros_like_seen(call.seen)
                for role, call in self._calls.items()
                if call.seen is not None
            }
            if not example_inputs:
                raise OptionError("explain() needs example_inputs until the pipeline has run once")
        unet = self._calls.get("unet")
        terms = None if unet is None else unet.seen_terms
        return explain_with(self._original, example_inputs, self.options, terms)

    def settle(self) -> None:
        """Compile modules that are not yet, or were exchanged since (``pipe.unet = other``).

        Raises:
            OptionError: for a module that is compiled or wrapped by someone else.
        """
        from lsync_compile.targets import CompiledCall, check_deepcache, check_free

        with self._lock:
            if not self._active:
                return
            modules = self._modules()
            check_deepcache(modules["unet"])
            stale = {
                role: module
                for role, module in modules.items()
                if role not in self._calls or self._calls[role].module is not module
            }
            for role, module in stale.items():
                check_free(module, role)
            self._load_calibrations(modules["unet"], anew="unet" in stale)
            for role, module in stale.items():
                if role in self._calls:
                    self._calls[role].detach()
                call = CompiledCall(
                    module,
                    self._session,
                    role,
                    owner=self,
                    dynamic=self.dynamic,
                    fullgraph=self.fullgraph,
                )
                call.attach()
                self._calls[role] = call

    @contextmanager
    def running(self) -> Iterator[None]:
        """Prepare and count a run of the pipeline, which the block is.

        Raises:
            OptionError: see :meth:`settle`.
        """
        self.settle()
        session, adapter, pipeline = self._session, self._adapter, self._original
        session.count_run()
        if adapter is None or not self._active:
            with running(session):
                yield
            return
        for line in adapter.without_effect(session.options):
            if session.note(line):
                log.warning("%s", line)
        followed = tracking(adapter.tracker(pipeline, session))
        with running(session), followed, adapter.around(pipeline, session):
            yield

    def _load_calibrations(self, unet: nn.Module, *, anew: bool) -> None:
        """Read what was measured for this UNet, where the options ask for it.

        Raises:
            OptionError: where nothing was.
        """
        options, session = self.options, self._session
        if not options.deep_cache or options.deep_cache_schedule != "calibrated":
            return
        if anew or not session.calibrations:
            session.calibrations = load_calibrations(unet)
        if not session.calibrations:
            raise OptionError(
                "option deep_cache_schedule='calibrated': this checkpoint has no calibration yet; "
                "run `lsync calibrate CLIP` first"
            )

    def matches(self, options: Options, *, dynamic: bool, fullgraph: bool) -> bool:
        """Whether what is compiled is right for these arguments; takes over the other options."""
        if not self._active or (dynamic, fullgraph) != (self.dynamic, self.fullgraph):
            return False
        if options.needs_rebuild(self.options):
            return False
        self._session.options = options
        return True

    def _modules(self) -> dict[str, nn.Module]:
        roles = ROLES if self.options.compile_vae else ROLES[:1]
        found = {role: attribute_at(self._original, role) for role in roles}
        if not isinstance(found["unet"], nn.Module):
            raise OptionError(f"the pipeline's unet is a {type(found['unet']).__name__}, no module")
        for role in roles[1:]:
            if not isinstance(found[role], nn.Module):
                self._session.note(f"the pipeline has no {role} to compile")
        return {role: module for role, module in found.items() if isinstance(module, nn.Module)}


class CompiledPipeline:
    """A pipeline whose UNet and VAE run compiled; in all else the pipeline itself.

    Attributes are read from and set on the wrapped pipeline, ``isinstance`` sees its class, ``to``
    moves it in place. Pickling or copying gives a plain pipeline.

    Attributes:
        lsync: the handle: ``report()``, ``options``, ``explain()``, ``undo()``.
    """

    _lsync_handle: PipelineHandle
    _lsync_run: Callable[..., Any]

    def __init__(self, handle: PipelineHandle) -> None:
        object.__setattr__(self, "_lsync_handle", handle)
        # Host code (face detection, schedulers) is none of dynamo's business; the compiled
        # modules inside switch it on again.
        run = torch.compiler.disable(handle._original.__call__, recursive=True)
        object.__setattr__(self, "_lsync_run", run)

    @property
    def lsync(self) -> PipelineHandle:
        return self._lsync_handle

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._lsync_handle._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline; arguments and result are its own."""
        with self._lsync_handle.running():
            return self._lsync_run(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> CompiledPipeline:
        """Move the pipeline in place, as its own ``to`` does, and return this object."""
        self._lsync_handle._original.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._lsync_handle._original, name)
        return self._counted(value) if name in _RUNS else value

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that runs the pipeline, prepared and counted as a call is."""

        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._lsync_handle.running():
                return method(*args, **kwargs)

        return run

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._lsync_handle._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._lsync_handle._original, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._lsync_handle._original), "lsync"})

    def __repr__(self) -> str:
        return f"CompiledPipeline({self._lsync_handle._original!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._lsync_handle._original.__reduce_ex__(protocol)


class _Link:
    """Leads from a pipeline to its proxy; copies of the pipeline do not have it."""

    def __init__(self, proxy: CompiledPipeline) -> None:
        self.proxy = proxy

    def __reduce__(self) -> Any:
        return _no_link, ()


def _proxy_of(pipeline: Any) -> CompiledPipeline | None:
    """The proxy that a pipeline has, or is."""
    if type(pipeline) is CompiledPipeline:
        proxy: CompiledPipeline = pipeline
        return proxy
    link = getattr(pipeline, _LINK, None)
    return link.proxy if isinstance(link, _Link) else None


def _no_link() -> None:
    return None


def compile_pipeline(
    pipeline: Any, options: Options, *, dynamic: bool, fullgraph: bool
) -> CompiledPipeline:
    """Compile a pipeline's modules in place and wrap it.

    A pipeline is never compiled twice. With the same options, the object that exists is
    returned; other options replace the compiled modules and start a new report, and the object
    stays the same.

    Raises:
        OptionError: see :meth:`PipelineHandle.settle`.
    """
    proxy = _proxy_of(pipeline)
    if proxy is not None:
        handle = proxy._lsync_handle
        if handle.matches(options, dynamic=dynamic, fullgraph=fullgraph):
            return proxy
        pipeline = handle.undo()
    session = Session(type(pipeline).__name__, options)
    handle = PipelineHandle(pipeline, session, dynamic=dynamic, fullgraph=fullgraph)
    handle.settle()
    if proxy is None:
        proxy = CompiledPipeline(handle)
    else:
        proxy._lsync_handle = handle
    vars(pipeline)[_LINK] = _Link(proxy)
    return proxy


def compile_callable(obj: Any, options: Options, *, dynamic: bool | None, fullgraph: bool) -> Any:
    """Compile a module or function with ``torch.compile`` and put a handle on the result."""
    from lsync_compile.backend import GraphCompiler

    is_module = isinstance(obj, nn.Module)
    known = getattr(obj, "lsync", None)
    if isinstance(known, Handle):
        obj = known.undo()
    name = type(obj).__name__ if is_module else getattr(obj, "__name__", "function")
    session = Session(name, options)
    compiler = GraphCompiler(session, "module" if is_module else "function")
    compiled = torch.compile(obj, backend=compiler, dynamic=dynamic, fullgraph=fullgraph)
    # Past OptimizedModule.__setattr__, which would set it on the module inside.
    object.__setattr__(compiled, "lsync", Handle(obj, session))
    return compiled


def attribute_at(obj: Any, path: str) -> Any:
    """``obj.a.b`` for ``"a.b"``; None where a part is missing."""
    for name in path.split("."):
        obj = getattr(obj, name, None)
    return obj
