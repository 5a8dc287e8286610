"""Stages on streams of their own, and faces in batches, on a GPU.

Needs no video libraries: ``pytest --noconftest tests/gpu/test_stages.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lsync_compile.media.align_batch import BatchAligner
from lsync_compile.media.geometry import FaceAligner
from lsync_compile.models.conditions import Prepared
from lsync_compile.runtime.stages import PipelineParallelProcessor, Stage
from lsync_compile.runtime.timeline import Timeline
from lsync_compile.runtime.timesteps import ChangeMeter
from lsync_compile.runtime.transfers import event_now, uploaded

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch sees none", allow_module_level=True)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@dataclass
class Passing:
    number: int
    value: Tensor


def stages(weights: list[Tensor], generator: torch.Generator) -> list[Stage]:
    """Products that take the device longer than the host, scratch that is freed at once."""

    def multiply(weight: Tensor, passing: Passing) -> Passing:
        value = passing.value.to(CUDA, non_blocking=True)
        for _ in range(20):
            value = torch.tanh(value @ weight)
        passing.value = value
        return passing

    def draw(passing: Passing) -> Passing:
        noise = torch.randn(passing.value.shape, device=CUDA, generator=generator)
        passing.value = passing.value + noise
        return passing

    def fetch(passing: Passing) -> Passing:
        passing.value = passing.value.cpu()
        return passing

    return [
        Stage("encode", lambda passing: multiply(weights[0], passing), True),
        Stage("denoise", draw, True),
        Stage("decode", lambda passing: multiply(weights[1], passing), True),
        Stage("fetch", fetch, True),
    ]


def test_streams_give_the_bytes_of_one_stream() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(1024, 1024, device=CUDA) / 32 for _ in range(2)]
    inputs = [torch.randn(2048, 1024).pin_memory() for _ in range(24)]
    runs = []
    for parallel in (False, True):
        timeline = Timeline()
        processor = PipelineParallelProcessor(
            (Passing(number, value) for number, value in enumerate(inputs)),
            stages(weights, torch.Generator(CUDA).manual_seed(1)),
            CUDA,
            parallel=parallel,
            timeline=timeline,
        )
        runs.append([passing.value for passing in processor])
        spent = timeline.seconds()
        assert len(spent["decode"]) == 24
        assert all(0 < each < 5 for each in spent["decode"])
    for serial, overlapped in zip(*runs, strict=True):
        assert torch.equal(serial, overlapped)


def test_no_host_waits_for_the_device_between_stages() -> None:
    """A stage's thread goes on while the device is busy with what it was given."""
    weight = torch.randn(4096, 4096, device=CUDA) / 64
    launched = []

    def work(passing: Passing) -> Passing:
        for _ in range(200):
            passing.value = passing.value @ weight
        launched.append(torch.cuda.current_stream().query())
        return passing

    source = (Passing(number, torch.randn(4096, 4096, device=CUDA)) for number in range(4))
    for _ in PipelineParallelProcessor(source, [Stage("a", work, True)], CUDA, parallel=True):
        pass
    assert not all(launched)


def test_stages_on_one_stream_run_one_after_the_other() -> None:
    """And still give what they give apart."""
    torch.manual_seed(0)
    weights = [torch.randn(1024, 1024, device=CUDA) / 32 for _ in range(2)]
    inputs = [torch.randn(2048, 1024).pin_memory() for _ in range(8)]
    runs = []
    for stream in ("", "networks"):
        seen: set[int] = set()
        shared = [
            replace(each, work=functools.partial(noting_stream, each.work, seen), stream=stream)
            for each in stages(weights, generator())
        ]
        source = (Passing(number, value) for number, value in enumerate(inputs))
        done = PipelineParallelProcessor(source, shared, CUDA, parallel=True)
        runs.append([passing.value for passing in done])
        assert len(seen) == (1 if stream else len(shared))
    for apart, together in zip(*runs, strict=True):
        assert torch.equal(apart, together)


def generator() -> torch.Generator:
    return torch.Generator(CUDA).manual_seed(1)


def noting_stream(work: Callable[[Passing], Passing], seen: set[int], passing: Passing) -> Passing:
    seen.add(torch.cuda.current_stream().cuda_stream)
    return work(passing)


@pytest.mark.parametrize("resolution", [256, 512])
def test_batches_on_the_gpu_are_those_on_the_cpu(resolution: int) -> None:
    draw = np.random.default_rng(0)
    frames = [draw.integers(0, 256, (720, 640, 3), dtype=np.uint8) for _ in range(6)]
    aligner = FaceAligner(resolution)
    shape = 60 * np.array([[-1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    centre = np.array([320, 300])
    matrices = [aligner.matrix(shape + centre + draw.uniform(-60, 60, 2)) for _ in frames]
    faces = 2 * torch.rand(6, 3, resolution, resolution) - 1
    there, here = (BatchAligner(resolution, device) for device in (CUDA, torch.device("cpu")))
    error = (there.crop(frames, matrices).cpu().int() - here.crop(frames, matrices).int()).abs()
    # White noise: a coordinate's last bit moves a sample by more than rounding does elsewhere.
    assert error.max() <= 2
    assert (error > 0).float().mean() < 0.01
    pairs = zip(
        there.restore(frames, faces.to(CUDA), matrices),
        here.restore(frames, faces, matrices),
        strict=True,
    )
    for ours, theirs in pairs:
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_faces_are_compared_before_what_the_device_was_given_after_them() -> None:
    """Else the host would wait for the encoder before it gives the UNet any work."""
    meter, plain = ChangeMeter(), ChangeMeter()
    generator = torch.Generator().manual_seed(0)
    for chunk in range(5):
        pixels = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
        faces = Prepared(uploaded(pixels, CUDA), [], seen=event_now(CUDA))
        busy = chunk >= 2  # the first two load code and take memory, for which a device may wait
        torch.cuda._sleep(2_000_000_000 if busy else 1)  # about a second
        done = event_now(CUDA)
        change = meter(chunk, faces)
        assert not (busy and done.query())
        expected = plain(chunk, Prepared(pixels, []))
        assert (change is None) == (expected is None) == (chunk == 0)
        if change is not None and expected is not None:
            assert change.mean == pytest.approx(expected.mean, rel=1e-5)
            assert change.cut == expected.cut
    torch.cuda.synchronize()
