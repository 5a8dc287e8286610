"""CUDA graphs and static memory on a GPU.

Needs no video libraries: ``pytest --noconftest tests/gpu/test_cuda_graph.py``.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from captures import Attention, capture, make_unet, unet_inputs

import lsync_compile
from lsync_compile.kernels import geglu, group_norm_silu
from lsync_compile.kernels.launch import Kernel
from lsync_compile.lowering.cuda_graph import CapturedCall, Inputs
from lsync_compile.models.config import LATENTSYNC_UNET
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.report import CaptureRecord
from lsync_compile.runtime.memory import BatchAwareMemoryPool

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch sees none", allow_module_level=True)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    gc.collect()
    torch.cuda.empty_cache()  # raises where a recording was left open


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in their first configuration that fits: each one compiled takes a second."""
    every = Kernel.candidates
    monkeypatch.setattr(Kernel, "candidates", lambda self, arguments: every(self, arguments)[:1])


@pytest.fixture
def pool() -> BatchAwareMemoryPool:
    return BatchAwareMemoryPool(CUDA, torch.cuda)


class Captured(CapturedCall):
    """A captured call of a function of so many inputs, with its record."""

    def __init__(
        self,
        function: Any,
        pool: BatchAwareMemoryPool,
        inputs: int = 1,
        read: tuple[int, ...] = (),
        kept: tuple[int, ...] = (),
        planned: int = 0,
    ) -> None:
        self.record = CaptureRecord(planned_bytes=planned)
        copied = tuple(i for i in range(inputs) if i not in read)
        names = tuple(f"x{i}" for i in range(inputs))
        super().__init__(function, Inputs(names, read, copied, frozenset(kept)), pool, self.record)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=CUDA).to(dtype)


def device_allocations() -> int:
    return torch.cuda.memory_stats()["num_device_alloc"]


def allocator_requests() -> int:
    return torch.cuda.memory_stats()["allocation.all.allocated"]


def the_graph(compiled: Any) -> Any:
    """The one record of a compiled object, checked to be captured."""
    (graph,) = compiled.lsync.report().graphs
    assert not graph.fallback, graph.fallback
    assert graph.capture is not None
    assert graph.capture.state == "captured", graph.capture
    return graph


# The real UNet at small width, with two of its levels: one capture by dynamo takes seconds


def small_unet(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    inputs = {
        name: value.to(CUDA, dtype if value.is_floating_point() else value.dtype)
        for name, value in unet_inputs(frames=4, side=16).items()
    }
    return make_unet(layers=1, levels=2).to(CUDA, dtype), inputs


@pytest.mark.usefixtures("untuned")
def test_the_unet_step_replays_what_it_would_compute() -> None:
    """And neither waits for the device nor allocates from it, once recorded."""
    unet, inputs = small_unet(torch.float16)
    plain = lsync_compile.compile(unet, strict=True, lowering="eager", cuda_graphs=False)
    steps = [
        inputs | {"sample": inputs["sample"] * scale, "timestep": torch.tensor(t, device=CUDA)}
        for scale, t in ((1.0, 981), (0.5, 500), (0.1, 1))
    ]
    expected = [plain(**step).sample for step in steps]
    plain.lsync.undo()
    fast = lsync_compile.compile(unet, strict=True, lowering="eager")
    results = [fast(**step).sample for step in steps]  # all kept while others are replayed
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-3)
        print("largest difference", float((result - wanted).abs().max()))
    graph = the_graph(fast)
    assert (graph.capture.captures, graph.capture.replays) == (1, 3)
    print(fast.lsync.report())

    torch.cuda.synchronize()
    before, requests = device_allocations(), allocator_requests()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            fast(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert device_allocations() == before
    made = (allocator_requests() - requests) / 10
    print("requests to the caching allocator in a step:", made)
    assert made <= 40  # its result, and what is prepared outside the main graph


class FeedForward(nn.Module):
    """A convolution, a group norm and a feed-forward: what Inductor fuses and ops of ours."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.group_norm, self.norm = nn.GroupNorm(4, width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.group_norm(self.conv(sample)))
        tokens = (hidden * timestep.cos().to(sample.dtype)).flatten(2).transpose(1, 2)
        total = tokens + tokens.sin()
        value, gate = self.wide(self.norm(total)).chunk(2, dim=-1)
        return self.narrow(value * nn.functional.gelu(gate)) + total


@pytest.mark.usefixtures("untuned")
def test_inductors_code_is_captured() -> None:
    torch.manual_seed(0)
    module = FeedForward().to(CUDA, torch.float16).eval()
    inputs = draw(2, 32, 16, 16, dtype=torch.float16), torch.tensor(0.5, device=CUDA)
    expected = module(*inputs).float()
    fast = lsync_compile.compile(module, strict=True, lowering="inductor")
    fast(*inputs)
    result = fast(*inputs).float()
    error = (result - expected).norm() / expected.norm()
    assert error < 0.01, float(error)
    graph = the_graph(fast)
    assert graph.capture.replays == 2
    applied = {record.name for record in graph.passes if record.outcome == "applied"}
    assert {"fuse_group_norm_silu", "fuse_add_layer_norm", "fuse_geglu"} <= applied


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32: cuDNN may choose one of its kernels here and another there."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("hoisted", [False, True])
@pytest.mark.usefixtures("exact_products")
def test_moved_weights_are_recorded_anew_and_new_values_are_seen(*, hoisted: bool) -> None:
    """What is made of a weight beforehand may be made anew where it was: nothing has moved then."""
    module = Attention(width=8).to(CUDA).eval()
    inputs = draw(2, 8, 16, 16), torch.tensor(3, device=CUDA)
    fast = lsync_compile.compile(module, strict=True, lowering="eager", hoist_weights=hoisted)
    torch.testing.assert_close(fast(*inputs), module(*inputs))
    module.conv.weight.mul_(2)
    torch.testing.assert_close(fast(*inputs), module(*inputs))
    captures = the_graph(fast).capture.captures
    held = module.conv.weight.data
    module.conv.weight.data = held * 3  # elsewhere: the old memory is still taken
    torch.testing.assert_close(fast(*inputs), module(*inputs))
    anew = the_graph(fast).capture.captures - captures
    assert anew in ((0, 1) if hoisted else (1,))


@pytest.mark.usefixtures("untuned")
def test_memory_is_shared_by_shapes_and_given_back_by_undo() -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()

    class Pipeline:
        def __init__(self) -> None:
            self.unet, self.inputs = small_unet(torch.float16)
            self.vae, self.scheduler = None, None

        def __call__(self, **inputs: Tensor) -> Tensor:
            return self.unet(**inputs).sample

    pipeline = Pipeline()
    weights = torch.cuda.memory_allocated() - before
    fast = lsync_compile.compile(pipeline, strict=True, lowering="eager", compile_vae=False)
    inputs = pipeline.inputs
    for frames in (4, 3, 4):
        fast(
            sample=inputs["sample"][:, :, :frames].contiguous(),
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"][: 2 * frames],
        )
    report = fast.lsync.report()
    captures = [graph.capture for graph in report.graphs]
    assert [capture.state for capture in captures] == ["captured"] * 2, report
    assert captures[0].replays == 2, report
    sizes = [capture.pool_bytes for capture in captures]
    print(report)
    assert sizes[1] < 1.5 * sizes[0], sizes  # not the sum of both
    assert sizes[0] > captures[0].planned_bytes / 4
    pool = fast.lsync._session.memory.get("unet", CUDA)
    assert pool.static_bytes == max(capture.static_bytes for capture in captures)
    assert pool.scratch_bytes() > 0
    fast.lsync.undo()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    print("bytes left after undo:", torch.cuda.memory_allocated() - before - weights)
    assert pool.static_bytes == 0
    assert pool.scratch_bytes() == 0


def test_tuned_kernels_are_chosen_before_the_recording(pool: BatchAwareMemoryPool) -> None:
    weight, bias = draw(64, dtype=torch.float16), draw(64, dtype=torch.float16)

    def function(x: Tensor) -> tuple[Tensor]:
        y = group_norm_silu(x, 4, weight, bias).flatten(2).transpose(1, 2)
        return (geglu(torch.cat([y, y.sin()], -1).contiguous()),)

    for side in (8, 24):
        call = Captured(function, pool)
        for seed in range(3):
            x = draw(2, 64, side, side, seed=seed, dtype=torch.float16)
            torch.testing.assert_close(call(x), function(x), rtol=0, atol=0)
        assert call.record.state == "captured", call.record


# The pipeline's loop


def synthesizer(unet: nn.Module, vae: Any, frames: int, steps: int) -> ChunkSynthesizer:
    side = unet.config.sample_size * 8
    mask = torch.ones(1, side, side, device=CUDA)
    mask[:, side // 2 :] = 0
    # Not a Job: that imports the libraries for videos.
    job = SimpleNamespace(
        generator=torch.Generator(CUDA).manual_seed(0), mask=mask, guidance_scale=1.5, guided=True,
        eta=0.0, num_inference_steps=steps, callback=None, callback_steps=1, num_frames=frames,
        session=None,
    )  # fmt: skip
    return ChunkSynthesizer(vae, unet, default_scheduler(), job, CUDA)


@pytest.mark.usefixtures("untuned")
def test_chunks_are_the_same_and_take_nothing_from_the_device() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    unet = make_unet(layers=1, levels=2).half().to(CUDA)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4,
        norm_num_groups=8, scaling_factor=0.18215, shift_factor=0.0,
    ).half().to(CUDA).eval()  # fmt: skip
    assert LATENTSYNC_UNET["in_channels"] == unet.config.in_channels

    class Pipeline:
        def __init__(self) -> None:
            self.unet, self.vae, self.scheduler = unet, vae, None

        def __call__(self, chunks: tuple[int, ...], watch: Callable[[int, int], None]) -> list:
            run = synthesizer(self.unet, self.vae, 4, 4)
            generator = torch.Generator(CUDA).manual_seed(1)
            side, results = unet.config.sample_size * 8, []
            for chunk, frames in enumerate(chunks):
                faces = torch.randint(
                    256, (frames, 3, side, side), generator=generator, device=CUDA
                ).to(torch.uint8)
                audio = torch.randn(frames, 50, 384, generator=generator, device=CUDA)
                results.append(
                    run(chunk, faces, audio, lambda done, chunk=chunk: watch(chunk, done))
                )
            return results

    pipeline, chunks = Pipeline(), (4, 4, 3, 4, 3, 4)
    expected = pipeline(chunks, lambda chunk, done: None)
    fast = lsync_compile.compile(pipeline, preset="exact", strict=True, lowering="eager")
    counts: list[int] = []

    def watch(chunk: int, done: int) -> None:
        """From the end of a chunk's first step to the end of its last, no step may wait."""
        if done == 4:
            torch.cuda.set_sync_debug_mode("default")
            counts.append(device_allocations())  # a chunk's own decode is still to come
        elif chunk >= 3:
            torch.cuda.set_sync_debug_mode("error")

    try:
        results = fast(chunks, watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print(fast.lsync.report())
    print("device allocations after each chunk's last step:", counts)
    for result, wanted in zip(results, expected, strict=True):
        error = (result.float() - wanted.float()).norm() / wanted.float().norm()
        print("relative error of a chunk:", float(error))
        assert error < 0.05
    counters = fast.lsync.report().counters
    assert counters["captured"] == counters["graphs"] == 6, fast.lsync.report()
    assert counts[3] == counts[4] == counts[5]  # chunks of both lengths were seen whole by then


# What must not be captured, and that nothing is broken afterwards


@torch.library.custom_op("lsync_tests::waits", mutates_args=())
def waits(x: Tensor) -> Tensor:
    torch.cuda.current_stream().synchronize()
    return x * 2


@waits.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def refused(function: Any, pool: BatchAwareMemoryPool, **settings: Any) -> str:
    """Why; having checked that the result is right and that the next capture works."""
    call, x = Captured(function, pool, **settings), draw(1000)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        (result,) = call(x)
        torch.testing.assert_close(result, x * 2)
    assert call.record.state == "refused", call.record
    torch.rand(1, device=CUDA)  # raises where the generator believes that a recording goes on
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    gc.collect()
    torch.cuda.empty_cache()
    good = Captured(lambda x: (x @ x.t(),), pool)
    y = draw(64, 64)
    for _ in range(2):
        torch.testing.assert_close(good(y)[0], y @ y.t())
    assert good.record.state == "captured", good.record
    return call.record.reason


def test_waiting_for_the_device_is_refused(pool: BatchAwareMemoryPool) -> None:
    assert "captur" in refused(lambda x: (waits(x),), pool)
    again = refused(lambda x: (x * float(x.abs().sum() * 0 + 2),), pool)
    assert "captur" in again, again


def test_the_rest_of_a_module_that_waits_still_works() -> None:
    fast = lsync_compile.compile(lambda x: waits(x.sin()) + 1, strict=True, lowering="eager")
    x = draw(100)
    for _ in range(2):
        torch.testing.assert_close(fast(x), x.sin() * 2 + 1)
    report = fast.lsync.report()
    assert report.graphs[0].capture.state == "refused", report
    assert any("not captured" in note for note in report.notes)


def test_random_numbers_stay_those_of_the_plain_call() -> None:
    fast = lsync_compile.compile(
        lambda x: nn.functional.dropout(x, 0.5, training=True), strict=True, lowering="eager"
    )
    x = torch.ones(1000, device=CUDA)
    torch.manual_seed(3)
    expected = [nn.functional.dropout(x, 0.5, training=True) for _ in range(3)]
    torch.manual_seed(3)
    for wanted in expected:
        assert torch.equal(fast(x), wanted)
    assert fast.lsync.report().graphs[0].capture.reason == "it draws random numbers"


def test_too_little_memory_is_refused(pool: BatchAwareMemoryPool) -> None:
    assert "planned" in refused(lambda x: (x * 2,), pool, planned=2**50)

    def hungry(x: Tensor) -> tuple[Tensor]:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**45, dtype=torch.uint8, device=CUDA)
        return (x * 2,)

    assert "memory is short" in refused(hungry, pool)


def test_an_operation_that_returns_its_input_is_refused(pool: BatchAwareMemoryPool) -> None:
    call, x = Captured(lambda x: (x.view(-1),), pool), draw(4, 4)
    assert call(x)[0].data_ptr() == x.data_ptr()
    assert call.record.reason == "it returns an input"


# Inputs, threads and streams


def test_kept_inputs_survive_other_graphs(pool: BatchAwareMemoryPool) -> None:
    call = Captured(lambda x, y: (x @ y,), pool, 2, kept=(1,))
    other = Captured(lambda x: (x.sin(),), pool)
    x, y, z = draw(32, 32), draw(32, 32, seed=1), draw(64, 64, seed=2)
    for _ in range(3):
        torch.testing.assert_close(call(x, y)[0], x @ y)
        torch.testing.assert_close(call(x, y)[0], x @ y)
        torch.testing.assert_close(other(z)[0], z.sin())


def test_threads_on_streams_of_their_own(pool: BatchAwareMemoryPool) -> None:
    weight = draw(512, 512)
    call = Captured(lambda x, w: ((x @ w).cos(),), pool, 2, read=(1,))
    inputs = [[draw(512, 512, seed=10 * n + i) for i in range(8)] for n in range(3)]
    expected = [[(x @ weight).cos() for x in mine] for mine in inputs]
    torch.cuda.synchronize()
    results: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results[number] = [call(x, weight)[0] for x in inputs[number]]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for number in range(3):
        for result, wanted in zip(results[number], expected[number], strict=True):
            torch.testing.assert_close(result, wanted)
    assert call.record.captures == 1


def test_a_pool_is_usable_after_all_its_graphs_are_gone(pool: BatchAwareMemoryPool) -> None:
    for seed in range(3):
        x = draw(100, seed=seed)
        call = Captured(lambda x: (x.sin() * 2,), pool)
        torch.testing.assert_close(call(x)[0], x.sin() * 2)
        assert pool.scratch_bytes() > 0
        del call
        gc.collect()
    assert pool.static_bytes == 0


def test_a_users_own_recording_takes_the_call_in() -> None:
    gm, _ = capture(lambda x: x.sin() * 2, torch.ones(4, device=CUDA))
    call = Captured(gm.forward, BatchAwareMemoryPool(CUDA, torch.cuda))
    x, graph = torch.zeros(4, device=CUDA), torch.cuda.CUDAGraph()
    gm.forward(x)
    with torch.cuda.graph(graph):
        (result,) = call(x)
    x.fill_(1)
    graph.replay()
    torch.testing.assert_close(result, x.sin() * 2)
    assert call.record.captures == 0
