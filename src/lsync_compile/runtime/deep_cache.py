"""Runs a UNet's deep layers in some steps of a chunk and takes their features as known in others.

What a UNet computes in its depth changes slowly from step to step (DeepCache, Ma et al. 2023,
arXiv:2312.00858). :mod:`lsync_compile.graph.deep_cache` makes two graphs of one; here is the guard
that chooses between them, on the host and from the step context alone, and what is kept between
steps. Features that are not computed are the last ones, or extrapolated from the last two or three
(Liu et al. 2025, "From Reusing to Forecasting", arXiv:2503.06923).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lsync_compile.runtime.cache_schedule import CacheSchedule, may_reuse
from lsync_compile.runtime.context import StepContext, current
from lsync_compile.runtime.staged import as_planned
from lsync_compile.scoped import scoped

CHUNKS = 4  # chunks under way at the same time whose features are kept

Event = Literal["computed", "reused", "unlike"]
Observer = Callable[[StepContext, Tensor], None]


@dataclass(frozen=True)
class CachePolicy:
    """How features are reused; taken anew in each call, so that it may change without compiling.

    Attributes:
        schedule: which steps compute.
        order: of the polynomial through the last computed features: 0 takes the last as they are.
        blend: share of the prediction that is mixed into computed features before they are kept.
        similarity: a step computes where the last two computed features have a smaller cosine;
            0 does not look. The host waits for the device to know it.
    """

    schedule: CacheSchedule
    order: int = 0
    blend: float = 0.0
    similarity: float = 0.0


@dataclass
class _Kept:
    """What one chunk has left behind, the newest last."""

    steps: list[int] = field(default_factory=list)
    positions: list[float] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    alike: Tensor | None = None  # cosine of the last two computed features, on their device

    @property
    def step(self) -> int | None:
        return self.steps[-1] if self.steps else None


class DeepCacheUNet:
    """A UNet's graph that skips its deep layers where the step context and a policy allow it.

    Features belong to one chunk of one run. They are dropped with its last step, when the chunk is
    begun anew, and when a call fails; without a context they are neither used nor kept.

    Args:
        full: the whole graph; returns its results and, last, the deep features.
        shallow: the outermost layers; takes the same inputs and, last, deep features.
        layout: example value of the features: the shallow graph is compiled for its strides.
        policy: the policy for chunks of so many steps.
        count: told what each call did; "unlike" comes before "computed" where the features'
            similarity asked for it.
    """

    def __init__(
        self,
        full: Callable[..., Sequence[Any]],
        shallow: Callable[..., Sequence[Any]],
        layout: Tensor,
        policy: Callable[[int], CachePolicy],
        count: Callable[[Event], None],
    ) -> None:
        self._full = full
        self._shallow = shallow
        self._layout = layout
        self._policy = policy
        self._count = count
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """The captured graph's results for its inputs in order."""
        context = current()
        if context is None:
            self._count("computed")
            return tuple(self._full(*args)[:-1])
        policy = self._policy(context.steps)
        with self._lock:  # taken out: a call that fails leaves nothing
            kept = self._kept.pop((context.run, context.chunk), None) or _Kept()
        if kept.step is not None and kept.step >= context.step:  # the chunk is begun anew
            kept = _Kept()
        if self._may_reuse(kept, context, policy):
            self._count("reused")
            features = _predict(kept, _position(context), policy.order)
            results = tuple(self._shallow(*args, as_planned(features, self._layout)))
        else:
            self._count("computed")
            *computed, features = self._full(*args)
            results = tuple(computed)
            _observed(context, features)
            _keep(kept, context, as_planned(features, self._layout), policy)
        if context.step < context.steps - 1:
            with self._lock:
                self._kept[context.run, context.chunk] = kept
                while len(self._kept) > CHUNKS:
                    self._kept.popitem(last=False)
        return results

    def forget(self) -> None:
        """Drop all features; chunks under way compute their next step."""
        with self._lock:
            self._kept.clear()

    def _may_reuse(self, kept: _Kept, context: StepContext, policy: CachePolicy) -> bool:
        if not may_reuse(context, policy.schedule, kept.step):
            return False
        if policy.similarity and kept.alike is not None and kept.alike.item() < policy.similarity:
            self._count("unlike")
            return False
        return True


def _keep(kept: _Kept, context: StepContext, features: Tensor, policy: CachePolicy) -> None:
    """Note computed features, and drop those that no prediction needs."""
    position = _position(context)
    if policy.similarity and kept.features:
        kept.alike = _cosine(features, kept.features[-1])
    if policy.blend and kept.features:
        features = torch.lerp(features, _predict(kept, position, policy.order), policy.blend)
    kept.steps.append(context.step)
    kept.positions.append(position)
    kept.features.append(features)
    for history in (kept.steps, kept.positions, kept.features):
        del history[: -(policy.order + 1)]


def _position(context: StepContext) -> float:
    """Where a step lies on the way, for extrapolation."""
    return float(context.step) if context.timestep is None else context.timestep


def _predict(kept: _Kept, position: float, order: int) -> Tensor:
    """From the last ``order + 1`` features, or as many as there are."""
    return extrapolate(kept.positions[-order - 1 :], kept.features[-order - 1 :], position)


def extrapolate(places: Sequence[float], features: Sequence[Tensor], position: float) -> Tensor:
    """Lagrange's polynomial through features at these places, somewhere else.

    The one feature that there is comes back itself.
    """
    if len(features) == 1:
        return features[0]
    if len(features) == 2:
        weight = (position - places[0]) / (places[1] - places[0])
        return torch.lerp(features[0], features[1], weight)
    predicted = torch.zeros_like(features[0])
    for index, (place, feature) in enumerate(zip(places, features, strict=True)):
        weight = 1.0
        for other in (*places[:index], *places[index + 1 :]):
            weight *= (position - other) / (place - other)
        predicted.add_(feature, alpha=weight)
    return predicted


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of the angle between two tensors, in float32, as a tensor without dimensions."""
    one, other = one.float(), other.float()
    return (one * other).sum() / (one.square().sum() * other.square().sum()).sqrt()


_observer: ContextVar[Observer | None] = ContextVar("lsync_feature_observer", default=None)


def observing(observer: Observer) -> AbstractContextManager[Any]:
    """Show all deep features that are computed in the block, with their step; not to be changed."""
    return scoped(_observer, observer)


def _observed(context: StepContext, features: Tensor) -> None:
    observer = _observer.get()
    if observer is not None:
        observer(context, features)
