"""The guard between a full and a shallow graph, and what is kept between steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from lsync_compile.runtime import deep_cache
from lsync_compile.runtime.cache_schedule import CacheSchedule
from lsync_compile.runtime.context import step_context
from lsync_compile.runtime.deep_cache import CachePolicy, DeepCacheUNet, observing

LAYOUT = torch.empty(3, 2).t()


class Network:
    """``sample + features``; the features are a function of the step that tests choose."""

    def __init__(self, **policy: Any) -> None:
        self.policy = CachePolicy(policy.pop("schedule", CacheSchedule(3)), **policy)
        self.counts: Counter[str] = Counter()
        self.features: Any = lambda step: torch.full((2, 3), float(step) + 1)
        self.seen: list[Tensor] = []  # what the shallow graph was given
        self.error: Exception | None = None
        self.step = 0
        self.unet = DeepCacheUNet(
            self._full, self._shallow, LAYOUT, lambda steps: self.policy, self._count
        )

    def _count(self, event: str) -> None:
        self.counts[event] += 1

    def _full(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        if self.error is not None:
            raise self.error
        features = self.features(self.step)
        return sample + features, features

    def _shallow(self, sample: Tensor, features: Tensor) -> tuple[Tensor]:
        if self.error is not None:
            raise self.error
        assert features.stride() == LAYOUT.stride()
        self.seen.append(features.clone())
        return (sample + features,)

    def __call__(
        self, step: int, steps: int = 8, run: str = "run", chunk: int = 0, mode: Any = "reuse"
    ) -> float:
        """Run a step; the features it used."""
        self.step = step
        with step_context(run, chunk, step, steps, mode):
            (result,) = self.unet(torch.zeros(2, 3))
        assert bool((result == result[0, 0]).all())
        return result[0, 0].item()

    def chunk(self, steps: int = 8, **where: Any) -> list[float]:
        return [self(step, steps, **where) for step in range(steps)]


def test_features_of_the_last_computed_step_are_reused() -> None:
    network = Network()
    assert network.chunk() == [1, 1, 1, 4, 4, 4, 7, 7]
    assert network.counts == {"computed": 3, "reused": 5}


def test_without_a_context_or_leave_all_is_computed_and_nothing_kept() -> None:
    network = Network()
    network.unet(torch.zeros(2, 3))
    assert not network.unet._kept
    assert network.chunk(mode="recompute") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "reused" not in network.counts


def test_nothing_outlives_its_chunk() -> None:
    network = Network()
    alone = network.chunk(chunk=1)
    assert not network.unet._kept  # dropped with the last step
    for step in range(5):
        network(step, chunk=0)
    assert network.chunk(chunk=1) == alone  # whatever chunk 0 has left
    assert network(5, run="other") == 6  # another run's chunk 0 is another chunk


def test_a_chunk_begun_anew_starts_without_features() -> None:
    network = Network(order=1)
    expected = network.chunk()
    for step in range(5):
        network(step)
    assert network.chunk() == expected


@pytest.mark.parametrize("failing", [1, 3])  # one that reuses, one that computes
def test_an_error_leaves_nothing(failing: int) -> None:
    network = Network()
    for step in range(failing):
        network(step)
    network.error = ValueError("broken")
    with pytest.raises(ValueError, match="broken"):
        network(failing)
    assert not network.unet._kept
    network.error = None
    assert network(failing + 1) == failing + 2  # computed, though the schedule says reuse


def test_chunks_under_way_at_once_have_features_of_their_own() -> None:
    network = Network()
    results = [[network(step, run=run) for run in "ab"] for step in range(4)]
    assert results == [[1, 1], [1, 1], [1, 1], [4, 4]]
    network = Network(schedule=CacheSchedule(8))
    for chunk in range(deep_cache.CHUNKS + 3):  # abandoned after a step
        network(0, chunk=chunk)
    assert len(network.unet._kept) == deep_cache.CHUNKS


def test_a_missed_step_is_made_up_for() -> None:
    network = Network()
    assert [network(step) for step in (0, 1, 4, 5)] == [1, 1, 5, 5]


@pytest.mark.parametrize(
    ("order", "function"),
    [(1, lambda step: 3 * step + 1), (2, lambda step: step * step - step + 2)],
)
def test_a_polynomial_of_the_order_is_predicted_exactly(order: int, function: Any) -> None:
    network = Network(schedule=CacheSchedule(3, head=order + 1), order=order)
    network.features = lambda step: torch.full((2, 3), float(function(step)))
    assert network.chunk() == pytest.approx([function(step) for step in range(8)])
    assert network.counts["reused"] > 0
    assert all(len(kept.features) <= order + 1 for kept in network.unet._kept.values())


def test_the_prediction_follows_the_timesteps_where_they_are_known() -> None:
    network = Network(schedule=CacheSchedule(listed=(0, 1)), order=1)
    network.features = lambda step: torch.full((2, 3), float(1000 - 100 * step**2))
    results = []
    for step in range(4):
        network.step = step
        with step_context("run", 0, step, 4, "reuse", timestep=float(1000 - 100 * step**2)):
            results.append(network.unet(torch.zeros(2, 3))[0][0, 0].item())
    assert results == pytest.approx([1000, 900, 600, 100])


def test_blending_smooths_what_is_kept_and_not_the_result() -> None:
    network = Network(blend=0.3)
    assert network.chunk() == pytest.approx([1, 1, 1, 4, 3.1, 3.1, 7, 0.7 * 7 + 0.3 * 3.1])


def test_unlike_features_are_computed_sooner() -> None:
    network = Network(schedule=CacheSchedule(3), similarity=0.8)
    sign = {0: 1.0, 3: 2.0, 6: -2.0}  # a factor leaves the angle, another sign turns it
    network.features = lambda step: torch.full((2, 3), sign.get(step, -3.0))
    assert network.chunk(steps=9) == [1, 1, 1, 2, 2, 2, -2, -3, -3]
    assert network.counts == {"computed": 4, "reused": 5, "unlike": 1}


def test_observers_see_computed_features_of_their_block_only() -> None:
    network, seen = Network(), []
    with observing(lambda context, features: seen.append((context.step, features[0, 0].item()))):
        network.chunk()
    network.chunk()
    assert seen == [(0, 1.0), (3, 4.0), (6, 7.0)]


def test_forgetting_drops_all() -> None:
    network = Network()
    network(0)
    network.unet.forget()
    assert network(1) == 2
