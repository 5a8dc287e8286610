"""Deep features and CUDA graphs that share a pool: no replay may touch what is kept."""

from __future__ import annotations

import torch
from fake_cuda import FakeCuda
from torch import Tensor

from lsync_compile.lowering.cuda_graph import CapturedCall, Inputs
from lsync_compile.lowering.deep_cache import PREDICTORS, schedule
from lsync_compile.options import Options
from lsync_compile.report import CaptureRecord
from lsync_compile.runtime.cache_schedule import CacheSchedule
from lsync_compile.runtime.context import step_context
from lsync_compile.runtime.deep_cache import CachePolicy, DeepCacheUNet
from lsync_compile.runtime.memory import BatchAwareMemoryPool

LAYOUT = torch.empty(4, 3)


def full(sample: Tensor) -> tuple[Tensor, Tensor]:
    features = (sample * 2).sin()
    return sample + features, features


def shallow(sample: Tensor, features: Tensor) -> tuple[Tensor]:
    return (sample + features,)


def run(unet: DeepCacheUNet, steps: int = 7) -> list[Tensor]:
    results = []
    for step in range(steps):
        with step_context("run", 0, step, steps, "reuse"):
            results += unet(torch.full((4, 3), 0.3 * step))
    return results


def test_kept_features_survive_the_replays_of_both_graphs() -> None:
    cuda = FakeCuda()
    pool = BatchAwareMemoryPool(torch.device("cpu"), cuda)
    records = [CaptureRecord(), CaptureRecord()]
    captured = [
        CapturedCall(full, Inputs(("sample",), (), (0,)), pool, records[0], cuda=cuda),
        CapturedCall(
            shallow,
            Inputs(("sample", "cached"), (), (0, 1), frozenset({1})),
            pool,
            records[1],
            cuda=cuda,
        ),
    ]
    for order in PREDICTORS.values():
        policy = CachePolicy(CacheSchedule(3), order)

        def unet(*calls: object, policy: CachePolicy = policy) -> DeepCacheUNet:
            return DeepCacheUNet(*calls, LAYOUT, lambda steps: policy, lambda event: None)

        assert all(map(torch.equal, run(unet(*captured)), run(unet(full, shallow))))
    assert [record.replays for record in records] == [9, 12]
    assert [record.captures for record in records] == [1, 1]
    assert [record.state for record in records] == ["captured", "captured"]


def test_the_schedule_is_the_options() -> None:
    options = Options(deep_cache_interval=4, deep_cache_head=2, deep_cache_tail=1)
    assert schedule(options).computed(12) == (0, 1, 5, 9, 11)
    listed = Options(deep_cache_steps=[7, 3, 3], deep_cache_interval=1)
    assert schedule(listed).computed(12) == (0, 3, 7)
