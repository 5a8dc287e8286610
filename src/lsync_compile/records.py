"""What is recorded of a compiled object and its graphs: plain data for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["first", "variant", "recompile"]
Outcome = Literal["applied", "no match", "off", "not for this graph", "vetoed", "failed"]


@dataclass
class PassRecord:
    """One pass on one graph.

    Attributes:
        outcome: "applied" where it rewrote something; else why it did not.
        matches: places that it rewrote.
        reason: the option or the veto that kept it from running, or how it failed.
        seconds: wall time of matching and rewriting.
        distribution: whose pass it is, with the version; empty for the package's own.
    """

    name: str
    phase: str
    outcome: Outcome
    matches: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    reason: str = ""
    distribution: str = ""


@dataclass
class CaptureRecord:
    """What became of a graph as a CUDA graph, and the memory it takes.

    Attributes:
        state: "waiting" for its first call, "captured", or "refused": it runs as it was lowered.
        reason: why it is refused.
        captures: recordings; another one follows when weights have moved.
        replays: calls that were one launch.
        planned_bytes: scratch of one run as planned from the graph.
        summed_bytes: the same if no memory were used twice.
        static_bytes: the inputs that are copied to addresses of their own.
        pool_bytes: scratch that the graph and the others of its pool took from the device,
            measured after its last recording.
        seconds: warming up and recording.
    """

    state: Literal["waiting", "captured", "refused"] = "waiting"
    reason: str = ""
    captures: int = 0
    replays: int = 0
    planned_bytes: int = 0
    summed_bytes: int = 0
    static_bytes: int = 0
    pool_bytes: int = 0
    seconds: float = 0.0


@dataclass
class StageRecord:
    """A part of a graph that is computed only when its values are new.

    Attributes:
        name: "weights", "timestep" or "chunk": what its values depend on.
        operations: nodes that run there and not in each step.
        results: tensors that it hands over.
        bytes: memory that they take; for the timestep, of each timestep kept.
        computed: how often it ran.
        reused: how often its last results were taken instead.
    """

    name: str
    operations: int
    results: int
    bytes: int
    computed: int = 0
    reused: int = 0


@dataclass
class TimeRecord:
    """Wall time of one kind of work in all runs, such as "decode" or "detect".

    Attributes:
        calls: how often it was done.
        seconds: wall time of it on the host, summed; work that overlaps counts in each.
    """

    calls: int = 0
    seconds: float = 0.0


@dataclass
class DeepCacheRecord:
    """A UNet that takes deep features as known in some steps.

    Attributes:
        branch: the skip join at which they enter, from the outside.
        reason: why the graph stays whole; empty where it is cut.
        operations: nodes of the full graph.
        shallow_operations: nodes of the shallow graph.
        bytes: memory that the features of one step take.
        computed: calls that computed them.
        reused: calls that did not.
        unlike: calls that computed them only because they had changed too much.
        capture: the shallow graph's CUDA graph; the full one's is the graph's own.
    """

    branch: int
    reason: str = ""
    operations: int = 0
    shallow_operations: int = 0
    bytes: int = 0
    computed: int = 0
    reused: int = 0
    unlike: int = 0
    capture: CaptureRecord | None = None


@dataclass
class GraphRecord:
    """One captured graph of one shape.

    Attributes:
        name: ``target.frame.number``, unique in its session.
        target: "unet", "vae.encoder", "vae.decoder", "module" or "function".
        frame: which Python frame of the target, from 0; another than 0 follows a graph break.
        kind: the first of its frame, a variant for inputs of other shapes, dtypes or devices or
            another gradient mode, or a recompile for what was compiled before.
        nodes_in: nodes captured.
        nodes_out: nodes after the passes.
        lowering: what runs it; "eager" with ``fallback`` set means the untouched graph.
        fallback: why it is not compiled; empty where it is.
        cache_hit: whether Inductor found it in its cache.
        kept: whether it was captured by an earlier process, whose passes ``passes`` are.
        calls: how often it ran.
        stages: parts that do not run in each call.
        unstaged: why there are none; empty where there are, or nothing is to be gained.
        capture: its CUDA graph; None on devices without, or with the option off.
        deep_cache: what is reused of it from step to step; None with the option off.
    """

    name: str
    target: str
    frame: int
    kind: Kind
    inputs: str
    nodes_in: int
    nodes_out: int = 0
    passes: list[PassRecord] = field(default_factory=list)
    lowering: str = ""
    pass_seconds: float = 0.0
    lowering_seconds: float = 0.0
    cache_hit: bool = False
    kept: bool = False
    fallback: str = ""
    calls: int = 0
    stages: list[StageRecord] = field(default_factory=list)
    unstaged: str = ""
    capture: CaptureRecord | None = None
    deep_cache: DeepCacheRecord | None = None
