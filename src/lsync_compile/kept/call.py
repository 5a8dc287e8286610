"""A module's call of one shape, by a graph that an earlier process has captured.

The first time, dynamo captures, and a :class:`Recording` takes down what it finds: the graph after
the passes, which parameter or argument each of its inputs is, and how the module's result is made
of its results. The next process reads that and lowers the graph again, which finds its code in
Inductor's cache. Its :class:`KeptCall` compares all that the capture has read before each call, and
where anything has changed, dynamo captures after all.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import compile_lock
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from lsync_compile import compile_cache
from lsync_compile.graph.saved import SavingError, from_plain, to_plain
from lsync_compile.kept.state import (
    UnknownError,
    Watch,
    describe,
    modes,
    named_tensors,
    tensor_kind,
)
from lsync_compile.kept.structure import CONSTANTS, Rebuild, structure
from lsync_compile.lowering.base import GraphFunction
from lsync_compile.records import GraphRecord, PassRecord

log = logging.getLogger(__name__)

KIND = "captures"
_TENSOR = object()  # in the place of an argument that is one


class Question:
    """What is to be called: a module with arguments like these, compiled so.

    Args:
        module: the module.
        arguments: ``(args, kwargs)`` of a call.
        made_by: all that decides what is done to the graph beside the graph: passes, options.

    Attributes:
        name: of the file.
        leaves: the tensors and constants among the arguments.

    Raises:
        UnknownError: the answer cannot be kept, or not be found.
    """

    def __init__(self, module: nn.Module, arguments: Any, made_by: Sequence[object]) -> None:
        self.module = module
        self.leaves, self.spec = tree_flatten(arguments)
        self.kinds = [_kind(leaf) for leaf in self.leaves]
        self.modes = modes()
        self.name = compile_cache.digest(
            [
                *made_by,
                platform.python_version(),
                platform.machine(),
                _device_names(),
                self.modes,
                str(self.spec),
                self.kinds,
                *describe(module),
            ]
        )


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tensor_kind(leaf)
    if type(leaf) not in CONSTANTS:
        raise UnknownError(f"an argument that is a {type(leaf).__name__}")
    return type(leaf).__name__, leaf


def _device_names() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


class Recording:
    """Takes down what becomes of a module's first call, and keeps it on disk if it is whole.

    :meth:`graph` and :meth:`results` are called by the compiler, :meth:`keep` when the call is
    done, :meth:`close` when it has ended in any way. Where there is anything that another process
    could not repeat, nothing is kept.
    """

    def __init__(self, question: Question) -> None:
        self._question = question
        self._watch = Watch(question.module)
        self._graphs: list[dict[str, Any]] = []
        self._record: GraphRecord | None = None
        self._results: Sequence[Tensor] | None = None
        self._problem = ""
        self._done = False

    def graph(self, gm: GraphModule, inputs: Sequence[Any], record: GraphRecord) -> None:
        """A graph as the passes have left it."""
        try:
            places = _Places(self._question)
            self._graphs.append(
                {
                    "graph": to_plain(gm),
                    "inputs": [places.of(value) for value in inputs],
                    "nodes_in": record.nodes_in,
                    "nodes_out": record.nodes_out,
                    "passes": [dataclasses.asdict(each) for each in record.passes],
                }
            )
        except (SavingError, UnknownError) as error:
            self._problem = str(error)
        self._record = record

    def results(self, results: Sequence[Tensor]) -> None:
        """What the graph returned when it ran."""
        if not self._done:
            self._results = list(results)

    def keep(self, value: Any) -> None:
        """Write it all down; ``value`` is what the module returned."""
        try:
            kept = self._whole(value)
        except UnknownError as error:
            log.info("the capture is not kept: %s", error)
        else:
            compile_cache.write(KIND, self._question.name, kept)

    def close(self) -> None:
        """Let go of the call's arguments and results: the compiler holds this as long as itself."""
        self._done, self._results = True, None
        self._graphs.clear()
        self._question.leaves.clear()

    def _whole(self, value: Any) -> dict[str, Any]:
        if self._problem:
            raise UnknownError(self._problem)
        if len(self._graphs) != 1 or self._record is None or self._results is None:
            raise UnknownError(f"the module is {len(self._graphs)} graphs")
        if self._record.fallback:
            raise UnknownError("it is not compiled")
        if not self._watch.unchanged():
            raise UnknownError("the module changes itself when it is called")
        return {**self._graphs[0], "result": structure(value, self._results)}


class _Places:
    """Where a graph's inputs come from, by identity."""

    def __init__(self, question: Question) -> None:
        self._places: dict[int, list[Any]] = {
            id(tensor): ["tensor", path] for path, tensor in named_tensors(question.module).items()
        }
        for index, leaf in enumerate(question.leaves):
            if isinstance(leaf, Tensor):
                if id(leaf) in self._places:
                    raise UnknownError("an argument that is passed twice, or is a weight")
                self._places[id(leaf)] = ["argument", index]

    def of(self, value: Any) -> list[Any]:
        place = self._places.get(id(value))
        if place is None:
            raise UnknownError("an input that is neither a weight nor an argument")
        return place


class Recorded:
    """A compiled call whose first run is taken down."""

    def __init__(self, compiled: Callable[..., Any], recording: Recording) -> None:
        self._compiled = compiled
        self._recording: Recording | None = recording

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recording, self._recording = self._recording, None
        if recording is None:
            return self._compiled(*args, **kwargs)
        try:
            value = self._compiled(*args, **kwargs)
            recording.keep(value)
            return value
        finally:
            recording.close()


class KeptCall:
    """Runs a module by a graph that was kept.

    Args:
        question: what the graph was found for.
        kept: what was read.
        compile_graph: makes a function of a rewritten graph, its inputs and what the passes did.
        otherwise: makes what runs the module in calls that the graph is not right for.

    Raises:
        UnknownError: what was read is damaged, or cannot be compiled.
    """

    def __init__(
        self,
        question: Question,
        kept: Any,
        compile_graph: Callable[[GraphModule, list[Any], KeptPasses], GraphFunction],
        otherwise: Callable[[], Callable[..., Any]],
    ) -> None:
        self._spec, self._modes = question.spec, question.modes
        self._constants = [_TENSOR if isinstance(x, Tensor) else x for x in question.leaves]
        self._make_otherwise = otherwise
        self._other: Callable[..., Any] | None = None
        self._watch = Watch(question.module)
        try:
            gm = from_plain(kept["graph"])
            passes = KeptPasses(
                [PassRecord(**each) for each in kept["passes"]],
                int(kept["nodes_in"]),
                int(kept["nodes_out"]),
            )
            self._rebuild = Rebuild(kept["result"], _count_results(gm))
            self._sources = [_source(question.module, *place) for place in kept["inputs"]]
            inputs = self._inputs(question.leaves)
            _check_inputs(gm, inputs)
        except (SavingError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UnknownError(f"a damaged file: {error}") from error
        self._kinds = [_quick_kind(value) for value in inputs]
        with compile_lock:  # dynamo's, as all compiling is done one graph after the other
            self._function = compile_graph(gm, inputs, passes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; by the graph where all is as it was when it was captured."""
        leaves, spec = tree_flatten((args, kwargs))
        inputs = self._checked(leaves, spec)
        if inputs is not None:
            return self._rebuild(self._function(*inputs))
        if self._other is None:
            self._other = self._make_otherwise()
        return self._other(*args, **kwargs)

    def _checked(self, leaves: list[Any], spec: Any) -> list[Any] | None:
        """The graph's inputs; None where it is not right for this call."""
        try:
            same = spec == self._spec and modes() == self._modes
        except UnknownError:
            return None
        if not same or not all(map(_same, leaves, self._constants)) or not self._watch.unchanged():
            return None
        inputs = self._inputs(leaves)
        return inputs if [_quick_kind(value) for value in inputs] == self._kinds else None

    def _inputs(self, leaves: list[Any]) -> list[Any]:
        return [leaves[key] if slots is None else slots[key] for slots, key in self._sources]


@dataclasses.dataclass(frozen=True)
class KeptPasses:
    """What the passes did when the graph was captured.

    Attributes:
        records: one for each pass.
        nodes_in: nodes captured.
        nodes_out: nodes after the passes.
    """

    records: list[PassRecord]
    nodes_in: int
    nodes_out: int


def _source(module: nn.Module, kind: str, place: Any) -> tuple[Any, Any]:
    """Where an input is found in each call: in a child's tensors by name, or among the leaves."""
    if kind == "argument":
        return None, int(place)
    path, _, name = place.rpartition(".")
    child = module.get_submodule(path)
    return (child._parameters if name in child._parameters else child._buffers), name


def _count_results(gm: GraphModule) -> int:
    results = gm.graph.output_node().args[0]
    return len(results) if isinstance(results, (tuple, list)) else 0


def _check_inputs(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Whether these are what the graph was captured with.

    Raises:
        ValueError: they are more or fewer, or of other kinds.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        if tensor_kind(node.meta["example_value"])[1:] != tensor_kind(value)[1:]:
            raise ValueError(f"{node.name} is another")


def _quick_kind(value: Any) -> Any:
    """:func:`tensor_kind` for a thousand tensors a call."""
    return type(value), value.dtype, value.shape, value.stride(), value.device, value.requires_grad


def _same(leaf: Any, then: Any) -> bool:
    """Whether an argument is the same constant; tensors are compared with the graph's inputs."""
    if then is _TENSOR:
        return isinstance(leaf, Tensor)
    return type(leaf) is type(then) and bool(leaf == then)


def find(question: Question) -> Any:
    """What was kept for a question; None where nothing was."""
    return compile_cache.read(KIND, question.name)
