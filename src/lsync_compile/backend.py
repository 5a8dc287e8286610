"""The ``"lsync"`` backend: a captured graph goes through the passes to a lowering.

``torch.compile(model, backend="lsync")`` finds :func:`lsync` through the package's entry point.
Importing this module also installs the hook for pipeline objects (:mod:`lsync_compile.hook`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._guards import CompileContext
from torch.fx import GraphModule

from lsync_compile.errors import CompileError
from lsync_compile.graph.copying import copy_graph
from lsync_compile.graph.deep_cache import CACHED, DeepCut, mark_joins
from lsync_compile.graph.purity import wants_gradient
from lsync_compile.graph.staging import Staging, cut, why_not
from lsync_compile.kept.call import KeptPasses, Recording
from lsync_compile.kept.state import UnknownError
from lsync_compile.lowering import get_lowering
from lsync_compile.lowering.base import GraphFunction
from lsync_compile.lowering.cuda_graph import capturing
from lsync_compile.lowering.deep_cache import deep_cache_unet, deep_cut, wanted
from lsync_compile.lowering.staged import (
    MainResults,
    empty_like,
    enabled_stages,
    main_inputs,
    main_results,
    stage_records,
    staged_call,
)
from lsync_compile.options import resolve_options
from lsync_compile.passes.manager import PassManager
from lsync_compile.progress import Compiling, announced, typical_seconds
from lsync_compile.report import GraphRecord, Kind, Session, format_pass
from lsync_compile.runtime.context import Terms
from lsync_compile.runtime.deep_cache import DeepCacheUNet
from lsync_compile.runtime.running import options_of
from lsync_compile.runtime.staged import StagedCall

log = logging.getLogger(__name__)

# What a pass may raise on a graph unlike those it was written for. The untouched graph is still
# right, so none of them may cost the user the run.
PASS_ERRORS = (
    RuntimeError,  # PassError, Graph.lint, fake-tensor propagation
    NotImplementedError,  # an operator without a fake implementation
    AssertionError,  # torch.fx's own checks
    LookupError,  # a node's metadata or argument that is not there
    AttributeError,  # an argument that is a number where a node was expected
    TypeError,  # an operator called with other arguments than foreseen
    ValueError,
)
# What comes out of Inductor. It wraps most failures in InductorError; the rest escape while it
# traces (before the wrapping) or starts its tools.
LOWERING_ERRORS = (
    TorchDynamoException,  # InductorError, TritonMissing, GPUTooOldForTriton
    RuntimeError,  # AOTAutograd's tracing, InvalidCxxCompiler, CppCompileError, device errors
    NotImplementedError,  # an operator without a lowering or a fake implementation
    AssertionError,  # torch states its assumptions with assert
    ImportError,  # triton or a compiler module missing
    OSError,  # no compiler to start, a full or unwritable cache folder
)


class GraphCompiler:
    """The backend callable of one target: compiles each graph of each shape that dynamo hands it.

    Args:
        session: where records and options live.
        target: role of the graphs, see :class:`~lsync_compile.passes.spec.PassContext`.
        variant: 0 for the first shapes of a target; other shapes are recorded as variants of them.
        terms: what holds for all calls of its graphs.
        recording: takes down what it compiles, for other processes.
    """

    __name__ = "lsync"

    def __init__(
        self,
        session: Session,
        target: str,
        variant: int = 0,
        terms: Terms | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.session = session
        self.target = target
        self.terms = terms or Terms()
        self._variant = variant
        self._recording = recording
        self._seen: dict[int, set[str]] = {}
        self._keeping: WeakSet[StagedCall | DeepCacheUNet] = WeakSet()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> GraphFunction:
        """What runs in the graph's place. Called by dynamo, under its lock.

        Raises:
            CompileError: where the graph cannot be compiled and the option ``strict`` is set.
        """
        record = self._open_record(gm, example_inputs)
        untouched = copy_graph(gm)
        try:
            call = self._compile(gm, example_inputs, record)
        except Failure as failure:
            call = self._fall_back(untouched, record, failure)
        self.session.add_graph(record)
        log.info("%s: %d -> %d nodes", record.name, record.nodes_in, record.nodes_out)
        return self._counted(call, record)

    def restore(
        self, gm: GraphModule, example_inputs: Sequence[Any], passes: KeptPasses
    ) -> GraphFunction:
        """What runs a graph that the passes have rewritten in an earlier process.

        Raises:
            UnknownError: it cannot be compiled; nothing is recorded then.
        """
        record = self._open_record(gm, example_inputs)
        record.kept, record.passes = True, passes.records
        record.nodes_in, record.nodes_out = passes.nodes_in, passes.nodes_out
        try:
            call = self._lower_rewritten(gm, example_inputs, record)
        except Failure as failure:
            self._seen.clear()
            raise UnknownError(f"{failure.stage}: {failure.error}") from failure.error
        self.session.add_graph(record)
        return self._counted(call, record)

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset()``: what was compiled is gone."""
        self._seen.clear()
        self.release()

    def release(self) -> None:
        """Drop what its graphs keep between calls. Dynamo may hold the graphs longer than we."""
        for call in self._keeping:
            call.forget()

    def _compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], record: GraphRecord
    ) -> GraphFunction:
        self._rewrite(gm, record)
        if self._recording is not None:
            self._recording.graph(gm, example_inputs, record)
        return self._lower_rewritten(gm, example_inputs, record)

    def _lower_rewritten(
        self, gm: GraphModule, example_inputs: Sequence[Any], record: GraphRecord
    ) -> GraphFunction:
        """Lower a graph in as many parts as the options and the run ask for."""
        staging = self._stage(gm, record)
        if staging is None:
            return self._lower_main(gm, example_inputs, record)
        inputs = main_inputs(staging, example_inputs)
        results = main_results(staging, example_inputs)
        main = self._lower_main(staging.main.gm, inputs, record, results)
        count = self.session.count_stage
        call = staged_call(staging, main, record.stages, count)
        self._keeping.add(call)
        return call

    def _lower_main(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        record: GraphRecord,
        results: MainResults = MainResults(),  # noqa: B008  frozen
    ) -> GraphFunction:
        """Lower what runs in each step: whole, or in two for steps that reuse deep features."""
        made = self._deep_cut(gm, record)
        if made is None:
            return self._lower(gm, example_inputs, record, results)
        full = self._lower(made.full, example_inputs, record, results)
        assert record.deep_cache is not None  # made with the cut
        part = replace(record, name=f"{record.name}.shallow", lowering_seconds=0.0, capture=None)
        inputs = [*example_inputs, empty_like(made.features, example_inputs)]
        results = replace(results, kept=results.kept | {CACHED})
        shallow = self._lower(made.shallow, inputs, part, results)
        record.lowering_seconds += part.lowering_seconds
        record.deep_cache.capture = part.capture
        call = deep_cache_unet(made, full, shallow, self.session, record)
        self._keeping.add(call)
        return call

    def _deep_cut(self, gm: GraphModule, record: GraphRecord) -> DeepCut | None:
        """Cut a UNet where its deep features may be reused; None where that is not wanted."""
        if not wanted(options_of(self.session), self.target):
            return None
        try:
            return deep_cut(gm, options_of(self.session), self.terms, record)
        except PASS_ERRORS as error:
            raise Failure("deep cache", error) from error

    def _stage(self, gm: GraphModule, record: GraphRecord) -> Staging | None:
        """Cut off what need not run in each call; None where nothing is to be gained."""
        stages = enabled_stages(options_of(self.session), self.target, self.terms)
        if not stages:
            return None
        try:
            record.unstaged = (
                "a gradient is wanted" if wants_gradient(gm.graph) else why_not(gm.graph)
            )
            staging = None if record.unstaged else cut(gm, stages, unet=self.target == "unet")
        except PASS_ERRORS as error:
            raise Failure("staging", error) from error
        if staging is not None:
            record.stages = stage_records(staging)
        return staging

    def _lower(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        record: GraphRecord,
        results: MainResults = MainResults(),  # noqa: B008  frozen
    ) -> GraphFunction:
        options = options_of(self.session)
        capture = capturing(
            gm, example_inputs, self.session, record, kept=results.kept, stable=results.stable
        )
        started = time.perf_counter()
        try:
            with announced(_news(gm, example_inputs, record, options.lowering)):
                lowered = get_lowering(options.lowering)(gm, example_inputs, options)
        except LOWERING_ERRORS as error:
            raise Failure(f"lowering {options.lowering!r}", error) from error
        record.lowering_seconds = time.perf_counter() - started
        record.lowering = options.lowering + (f" ({lowered.note})" if lowered.note else "")
        record.cache_hit = lowered.cache_hit
        return capture(lowered.call)

    def _rewrite(self, gm: GraphModule, record: GraphRecord) -> None:
        started = time.perf_counter()
        try:
            if wanted(options_of(self.session), self.target):
                mark_joins(gm.graph)
            manager = PassManager(options_of(self.session))
            for problem in manager.problems:
                self.session.note(problem)
            record.passes = manager.run(
                gm, self.target, record.name, self.terms.vouched, self.terms.region
            )
        except PASS_ERRORS as error:
            raise Failure("passes", error) from error
        record.pass_seconds = time.perf_counter() - started
        record.nodes_out = len(gm.graph.nodes)
        for done in record.passes:
            log.debug("%s: pass %s", record.name, format_pass(done))
            if done.outcome == "failed":
                text = f"pass {done.name!r} of {done.distribution} failed: {done.reason}"
                if self.session.note(f"{text}; the graph is as without it"):
                    log.warning("%s; update it, or switch it off with %s=False", text, done.name)

    def _fall_back(
        self, untouched: GraphModule, record: GraphRecord, failure: Failure
    ) -> GraphFunction:
        cause = f"{failure.stage}: {type(failure.error).__name__}: {_first_line(failure.error)}"
        others = [f"{p.name!r} of {p.distribution}" for p in record.passes if p.distribution]
        if others:
            cause += f" (it went through {', '.join(others)}; plugins=False leaves them out)"
        if options_of(self.session).strict:
            raise CompileError(f"graph {record.name}: {cause}") from failure.error
        record.lowering, record.fallback = "eager", cause
        record.nodes_out, record.stages, record.deep_cache = record.nodes_in, [], None
        if self.session.note(f"{self.target} runs eagerly; {cause}"):
            log.warning("%s runs eagerly, not compiled: %s", record.name, cause)
        log.debug("%s", record.name, exc_info=failure.error)
        return untouched.forward

    def _open_record(self, gm: GraphModule, example_inputs: Sequence[Any]) -> GraphRecord:
        seen = self._seen.setdefault(_frame_id(), set())
        frame = list(self._seen).index(_frame_id())
        signature = _signature(example_inputs)
        kind: Kind = "first" if not seen and self._variant == 0 else "variant"
        if signature in seen:
            kind = "recompile"
        seen.add(signature)
        return GraphRecord(
            name=f"{self.target}.{frame}.{self.session.count_graphs(self.target)}",
            target=self.target,
            frame=frame,
            kind=kind,
            inputs=_data_inputs(gm, example_inputs),
            nodes_in=len(gm.graph.nodes),
        )

    def _counted(self, call: GraphFunction, record: GraphRecord) -> GraphFunction:
        count = self.session.count_call
        seen = None if self._recording is None else self._recording.results

        def run(*args: Any) -> Any:
            count(record)
            results = call(*args)
            if seen is not None:
                seen(results)
            return results

        return run


def lsync(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> GraphFunction:
    """The backend as torch calls it, for a module or function compiled with ``torch.compile``.

    Nothing here knows a denoising step, so everything is exact. The record of each graph goes to
    the log; ``lsync_compile.compile(module)`` gives the same with a report on the result.

    Raises:
        OptionError: for wrong options (torch wraps it in ``BackendCompilerFailed``).
    """
    resolved = resolve_options(mode, options, default_preset="exact", **more)
    return GraphCompiler(Session("module", resolved), "module")(gm, example_inputs)


class Failure(Exception):  # noqa: N818  an outcome, never seen by users
    """Carries the cause and the stage to :meth:`GraphCompiler._fall_back`."""

    def __init__(self, stage: str, error: Exception) -> None:
        super().__init__(stage)
        self.stage = stage
        self.error = error


def _frame_id() -> int:
    """Which Python frame is being compiled; stays the same when it is compiled again."""
    compile_id = CompileContext.current_compile_id()
    if compile_id is None or compile_id.frame_id is None:
        return 0
    return compile_id.frame_id


def _news(
    gm: GraphModule, example_inputs: Sequence[Any], record: GraphRecord, lowering: str
) -> Compiling:
    """What the lowering is about to do, for people who wait for it."""
    operations = sum(node.op.startswith("call") for node in gm.graph.nodes)
    tensors = (value for value in example_inputs if isinstance(value, torch.Tensor))
    device = next((tensor.device.type for tensor in tensors if tensor.dim()), "cpu")
    seconds = typical_seconds(lowering, device, operations)
    return Compiling(record.target, record.inputs, operations, seconds)


def _signature(example_inputs: Sequence[Any]) -> str:
    """What a graph is specialised to: inputs by shape, dtype and device, and the gradient mode."""
    mode = f"grad {torch.is_grad_enabled()}, inference {torch.is_inference_mode_enabled()}"
    return ", ".join([mode, *(_describe(value) for value in example_inputs)])


def _data_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> str:
    """Shapes of the inputs that are no parameters or buffers, for people."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return ", ".join(
        _describe(value)
        for node, value in zip(placeholders, example_inputs, strict=True)
        if not isinstance(value, nn.Parameter) and "_buffers_" not in node.name
    )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = "x".join(str(size) for size in value.shape) or "scalar"
        return f"{shape} {str(value.dtype).removeprefix('torch.')} {value.device}"
    return f"{type(value).__name__} {value}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


from lsync_compile import hook  # noqa: E402  after lsync, which the hook looks for

hook.install()
