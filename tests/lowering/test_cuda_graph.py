"""Captured calls on a stand-in for ``torch.cuda`` that destroys what a real GPU may destroy."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from captures import capture, captured_unet
from fake_cuda import FakeCuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import symbolic_trace

from lsync_compile.graph.copying import copy_graph
from lsync_compile.lowering.capturable import why_not
from lsync_compile.lowering.cuda_graph import MOST_CAPTURES, CapturedCall, Inputs, capturing
from lsync_compile.options import Options
from lsync_compile.report import CaptureRecord, GraphRecord, Session
from lsync_compile.runtime.memory import BatchAwareMemoryPool

CPU = torch.device("cpu")


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def pool(cuda: FakeCuda) -> BatchAwareMemoryPool:
    return BatchAwareMemoryPool(CPU, cuda)


class Captured:
    """A captured call of a function, its record and what it was refused for."""

    def __init__(
        self,
        function: Any,
        pool: BatchAwareMemoryPool,
        inputs: int,
        *,
        read: tuple[int, ...] = (),
        kept: tuple[int, ...] = (),
        planned: int = 0,
    ) -> None:
        self.record = CaptureRecord(planned_bytes=planned)
        self.refusals: list[str] = []
        copied = tuple(i for i in range(inputs) if i not in read)
        names = tuple(f"x{i}" for i in range(inputs))
        self.call = CapturedCall(
            function,
            Inputs(names, read, copied, frozenset(kept)),
            pool,
            self.record,
            refused=self.refusals.append,
            cuda=pool._cuda,
        )

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def scaled(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x * w
    return y + 1, y.t()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# What comes back


def test_every_call_gives_the_plain_result_in_memory_of_its_own(pool: BatchAwareMemoryPool) -> None:
    call = Captured(scaled, pool, 2, read=(1,))
    w = numbers(3, 4)
    inputs = [numbers(3, 4, seed=seed) for seed in range(4)]
    results = [call(x, w) for x in inputs]
    for x, result in zip(inputs, results, strict=True):  # after all replays
        for one, expected in zip(result, scaled(x, w), strict=True):
            assert torch.equal(one, expected)
            assert one.stride() == expected.stride()
    assert call.record.state == "captured"
    assert (call.record.captures, call.record.replays) == (1, 4)
    assert call.refusals == []


def test_other_graphs_of_the_pool_do_not_disturb_it(pool: BatchAwareMemoryPool) -> None:
    one = Captured(lambda x: (x.cos() + 1,), pool, 1)
    other = Captured(lambda x: (x.sin() * 2,), pool, 1)
    x, y = numbers(64), numbers(16, seed=1)
    for _ in range(2):
        (first,) = one(x)
        (second,) = other(y)
        assert torch.equal(first, x.cos() + 1)
        assert torch.equal(second, y.sin() * 2)
    assert pool.static_bytes == 512  # theirs lie over each other


def test_what_is_no_tensor_and_what_is_there_twice_comes_back(pool: BatchAwareMemoryPool) -> None:
    def function(x: Tensor) -> list[Any]:
        y = x + 1
        return [y, None, 3, y]

    first, none, three, again = Captured(function, pool, 1)(numbers(3))
    assert (none, three) == (None, 3)
    assert first is again


def test_the_real_unet_replays_its_steps() -> None:
    _, gm, inputs = captured_unet()
    cuda = FakeCuda()
    pool = BatchAwareMemoryPool(CPU, cuda)
    record = CaptureRecord()
    call = CapturedCall(gm.forward, Inputs.of(gm, (), ()), pool, record, cuda=cuda)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    sample = next(i for i, name in enumerate(names) if "sample" in name)
    timestep = next(i for i, name in enumerate(names) if "timestep" in name)
    with torch.no_grad():
        for step in (900, 1):
            inputs = list(inputs)
            inputs[sample] = inputs[sample] + 1
            inputs[timestep] = torch.tensor(step)
            assert torch.equal(call(*inputs)[0], gm.forward(*inputs)[0])
    assert (record.captures, record.replays, record.reason) == (1, 2, "")
    assert len(call._inputs.copied) == 3
    assert len(call._inputs.read) > 1000


# What goes in


def test_new_values_of_a_weight_are_seen_and_a_moved_one_is_recorded_anew(
    pool: BatchAwareMemoryPool,
) -> None:
    call = Captured(scaled, pool, 2, read=(1,))
    x, w = numbers(2, 2), nn.Parameter(numbers(2, 2, seed=1))
    with torch.no_grad():
        call(x, w)
        w.mul_(2)
        assert torch.equal(call(x, w)[0], scaled(x, w)[0])
        assert call.record.captures == 1
        w.data = numbers(2, 2, seed=2)
        assert torch.equal(call(x, w)[0], scaled(x, w)[0])
        assert torch.equal(call(x, w)[0], scaled(x, w)[0])
    assert call.record.captures == 2


def test_weights_that_keep_moving_end_the_capturing(pool: BatchAwareMemoryPool) -> None:
    call = Captured(scaled, pool, 2, read=(1,))
    x, kept = numbers(2, 2), []
    for seed in range(MOST_CAPTURES + 2):
        kept.append(numbers(2, 2, seed=seed))
        assert torch.equal(call(x, kept[-1])[0], scaled(x, kept[-1])[0])
    assert call.refusals == [f"its weights moved after each of {MOST_CAPTURES} captures"]
    assert call.record.replays == MOST_CAPTURES


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each call has copied in."""
    counts: list[int] = []
    plain = torch._foreach_copy_

    def counted(targets: list[Tensor], sources: list[Tensor]) -> None:
        counts.append(len(targets))
        plain(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    return counts


def test_kept_inputs_are_copied_when_they_are_others(
    pool: BatchAwareMemoryPool, copies: list[int]
) -> None:
    call = Captured(scaled, pool, 2, kept=(1,))
    x, audio, other = numbers(2, 2), numbers(2, 2, seed=1), numbers(2, 2, seed=2)
    for w in (audio, audio, other, audio):
        assert torch.equal(call(x, w)[0], scaled(x, w)[0])
    assert copies == [2, 1, 2, 2]
    Captured(scaled, pool, 2)(x, other)  # its inputs lie over this one's
    assert torch.equal(call(x, audio)[0], scaled(x, audio)[0])
    assert copies[-1] == 2


def test_a_kept_input_at_the_address_of_a_dead_one_is_another(pool: BatchAwareMemoryPool) -> None:
    call = Captured(scaled, pool, 2, kept=(1,))
    x, memory = numbers(2, 2), numbers(2, 2)
    call(x, memory.view(2, 2))
    memory.fill_(3)
    assert torch.equal(call(x, memory.view(2, 2))[0], scaled(x, memory)[0])


def test_an_input_that_lies_in_static_memory_is_not_copied(
    pool: BatchAwareMemoryPool, copies: list[int]
) -> None:
    call = Captured(lambda x: (x + 1,), pool, 1)
    call(numbers(4))
    (static,) = call.call._static.values()
    static.fill_(5)
    assert torch.equal(call(static)[0], torch.full((4,), 6.0))
    assert copies == [1]


def test_expanded_inputs_and_strides_are_kept(pool: BatchAwareMemoryPool) -> None:
    strides = []

    def function(x: Tensor, y: Tensor) -> tuple[Tensor]:
        strides.append((x.stride(), y.stride()))
        return (x + y,)

    call = Captured(function, pool, 2)
    x, y = numbers(3, 1, 2).expand(3, 5, 2), numbers(3, 2, 5).transpose(1, 2)
    for _ in range(2):
        assert torch.equal(call(x, y)[0], x + y)
        x = (x[:, :1] * 2).expand(3, 5, 2)
    assert set(strides) == {(x.stride(), y.stride())}


@pytest.mark.parametrize("inference", [True, False])
def test_gradient_modes_may_differ_between_calls(
    pool: BatchAwareMemoryPool, inference: bool
) -> None:
    call = Captured(lambda x: (x * 2,), pool, 1)
    with torch.inference_mode(inference):
        first = call(torch.ones(3))[0]
    with torch.inference_mode(not inference):
        second = call(torch.full((3,), 2.0))[0]
    assert (first.tolist(), second.tolist()) == ([2] * 3, [4] * 3)


def test_a_call_inside_a_larger_recording_is_part_of_it(
    pool: BatchAwareMemoryPool, cuda: FakeCuda
) -> None:
    call = Captured(lambda x: (x * 2,), pool, 1)
    x, graph, side = torch.ones(3), cuda.CUDAGraph(), cuda.Stream()
    with cuda.graph(graph, pool=(0, 99), stream=side, capture_error_mode="thread_local"):
        (result,) = call(x)
    x.fill_(4)
    graph.replay()
    assert result.tolist() == [8] * 3
    assert call.record.captures == 0


# How it is recorded


def test_it_warms_up_and_records_on_the_pools_stream(
    pool: BatchAwareMemoryPool, cuda: FakeCuda
) -> None:
    seen = []

    def function(x: Tensor) -> tuple[Tensor]:
        seen.append((cuda.current_stream().name, cuda.is_current_stream_capturing()))
        assert gc.isenabled() != cuda.is_current_stream_capturing()
        return (x + 1,)

    call = Captured(function, pool, 1)
    call(torch.ones(2))
    call(torch.ones(2))
    assert seen == [("side 1", False), ("side 1", False), ("side 1", True)]
    assert cuda.log == [
        "side 1 waits for main",
        "main waits for side 1",
        "clear workspaces",
        "record on side 1",
        "clear workspaces",
        "replay on main",
        "replay on main",
    ]
    assert cuda.current_stream().name == "main"


def test_another_stream_waits_for_the_last_one(pool: BatchAwareMemoryPool, cuda: FakeCuda) -> None:
    call = Captured(lambda x: (x + 1,), pool, 1)
    call(torch.ones(2))
    cuda.log.clear()
    with cuda.stream(cuda.Stream()):
        call(torch.ones(2))
    call(torch.ones(2))
    assert cuda.log == [
        "side 2 waits for main",
        "replay on side 2",
        "main waits for side 2",
        "replay on main",
    ]


def test_threads_take_turns(pool: BatchAwareMemoryPool, cuda: FakeCuda) -> None:
    call = Captured(lambda x: (x.cumsum(0) + 1,), pool, 1)
    wrong: list[int] = []

    def work(seed: int) -> None:
        with cuda.stream(cuda.Stream()):
            for step in range(20):
                x = numbers(500, seed=100 * seed + step)
                if not torch.equal(call(x)[0], x.cumsum(0) + 1):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (call.record.captures, call.record.replays) == (1, 80)


def test_memory_goes_when_the_call_goes(pool: BatchAwareMemoryPool, cuda: FakeCuda) -> None:
    call = Captured(lambda x: (x + 1,), pool, 1)
    call(numbers(1024))
    assert pool.static_bytes == call.record.static_bytes == 4096
    assert call.record.pool_bytes == 4096
    handle = pool._handle
    cuda.graphs.clear()
    del call
    assert pool.static_bytes == 0
    assert pool.handle() != handle  # torch would refuse the old one


def test_a_pool_can_call_all_memory_back(pool: BatchAwareMemoryPool, cuda: FakeCuda) -> None:
    call = Captured(lambda x: (x + 1,), pool, 1)
    call(numbers(1024))
    pool.release()
    cuda.graphs.clear()
    assert pool.static_bytes == 0
    assert call.call._recording is None
    assert torch.equal(call(numbers(8))[0], numbers(8) + 1)  # it begins anew
    assert call.record.captures == 2


# What cannot be recorded


def refused(
    function: Any, pool: BatchAwareMemoryPool, *args: Tensor, **settings: Any
) -> tuple[str, Captured]:
    """Two calls give the plain result; the reason, said once."""
    call = Captured(function, pool, len(args), **settings)
    for _ in range(2):
        function_args = [value.clone() if value.dim() else value for value in args]
        expected = function(*function_args)
        result = call(*args)
        for one, other in zip(result, expected, strict=True):
            assert torch.equal(one, other)
    (reason,) = call.refusals
    assert call.record.state == "refused"
    assert call.record.reason == reason
    assert call.record.replays == call.record.static_bytes == pool.static_bytes == 0
    assert gc.isenabled()
    assert pool._cuda.current_stream().name == "main"
    assert not pool._cuda.default_generators[0].stuck
    return reason, call


def test_reading_a_number_back_is_refused(pool: BatchAwareMemoryPool) -> None:
    reason, _ = refused(lambda x: (x * x.sum().item(),), pool, torch.ones(3))
    assert reason == "RuntimeError: CUDA error: operation not permitted when stream is capturing"
    good = Captured(lambda x: (x + 1,), pool, 1)
    assert good(torch.ones(3))[0].tolist() == [2] * 3
    assert good.record.state == "captured"


def test_random_numbers_are_refused_and_the_generator_is_put_back(
    pool: BatchAwareMemoryPool, cuda: FakeCuda
) -> None:
    calls = []

    def function(x: Tensor) -> tuple[Tensor]:
        calls.append(cuda.default_generators[0].offset)
        cuda.default_generators[0].offset += 4
        return (x + 1,)

    call = Captured(function, pool, 1)
    call(torch.ones(2))
    assert call.refusals == ["it draws random numbers"]
    assert calls == [0, 4, 0]  # two warm-ups, and the plain call as if they had not been
    assert cuda.default_generators[0].offset == 4


def test_impure_functions_are_refused(pool: BatchAwareMemoryPool) -> None:
    assert refused(lambda x: (x.view(3), x + 1), pool, torch.ones(3))[0] == "it returns an input"
    assert refused(lambda x, w: (x + 1, w), pool, torch.ones(3), torch.ones(3), read=(1,))[0] == (
        "it returns an input"
    )
    call = Captured(lambda x: (x.add_(1),), pool, 1)
    x = torch.ones(3)
    assert call(x)[0].tolist() == x.tolist() == [2] * 3  # as the plain call leaves it
    assert call.refusals == ["it writes to an input"]
    assert refused(lambda x: x + 1, pool, torch.ones(3))[0] == "it returns a Tensor, no tuple"


def test_too_little_memory_is_refused(pool: BatchAwareMemoryPool, cuda: FakeCuda) -> None:
    cuda.free = 1000
    reason, _ = refused(lambda x: (x + 1,), pool, torch.ones(30), planned=2000)
    assert reason == "memory is short: 2.1 KiB planned, 1000 B free"
    cuda.free = 2**30
    assert Captured(lambda x: (x + 1,), pool, 1, planned=2000)(torch.ones(30))[0][0] == 2

    def hungry(x: Tensor) -> tuple[Tensor]:
        if cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nlong story")
        return (x + 1,)

    other = BatchAwareMemoryPool(CPU, cuda)
    assert refused(hungry, other, torch.ones(3))[0] == "memory is short: tried to allocate 9 GiB"


def test_an_input_over_itself_is_refused(pool: BatchAwareMemoryPool) -> None:
    windows = torch.arange(6.0).unfold(0, 3, 1)
    assert refused(lambda x: (x + 1,), pool, windows)[0] == "input x0 overlaps itself"


def test_an_error_of_the_function_is_the_users(pool: BatchAwareMemoryPool) -> None:
    def fails(x: Tensor) -> tuple[Tensor]:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Captured(fails, pool, 1)(torch.ones(2))

    def interrupted(x: Tensor) -> tuple[Tensor]:
        if pool._cuda.is_current_stream_capturing():
            raise KeyboardInterrupt
        return (x + 1,)

    call = Captured(interrupted, pool, 1)
    with pytest.raises(KeyboardInterrupt):
        call(torch.ones(2))
    assert gc.isenabled()
    assert pool._cuda.current_stream().name == "main"
    assert not pool._cuda.is_current_stream_capturing()


# What the graph shows beforehand


def on_gpu(function: Any, *shapes: tuple[int, ...], device: str = "cuda") -> tuple[Any, list]:
    """A graph with example values, as dynamo makes them, of tensors that no GPU has to hold."""
    gm, _ = capture(function, *(torch.ones(shape) for shape in shapes))
    with FakeTensorMode():
        return gm, [torch.empty(shape, device=device) for shape in shapes]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x + 1, ""),
        (lambda x: (x + 1).mul_(2), ""),
        (lambda x: x.view(-1)[1:].add_(2) * 3, "add_ writes to an input"),
        (lambda x: torch.nn.functional.relu(x, inplace=True) + 1, "relu writes to an input"),
        (
            lambda x: torch.nn.functional.batch_norm(
                x, torch.zeros(2), torch.ones(2), training=True
            ),
            "batch_norm writes to an input",
        ),
    ],
)
def test_writes_to_inputs_are_found_in_the_graph(function: Any, reason: str) -> None:
    assert why_not(*on_gpu(function, (4, 2))) == reason


def test_inputs_must_be_tensors_of_one_gpu() -> None:
    gm, inputs = on_gpu(torch.add, (2,), (2,))
    assert why_not(gm, inputs) == ""
    with FakeTensorMode():
        elsewhere = torch.empty(2, device="cuda:1")
    assert "several devices" in why_not(gm, [inputs[0], elsewhere])
    assert why_not(gm, [inputs[0], torch.ones(2)]).endswith("is on the CPU")
    assert "number" in why_not(gm, [inputs[0], 3])
    inputs[0].requires_grad_()
    assert why_not(gm, inputs) == "a gradient is wanted"
    with torch.no_grad():
        assert why_not(gm, inputs) == ""


def test_an_unused_input_does_not_matter() -> None:
    gm = symbolic_trace(lambda x, unused: x + 1)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    assert why_not(gm, [x, 3]) == ""
    assert Inputs.of(gm, ("unused",), ()) == Inputs(("x", "unused"), (), (0,))


def test_capturing_reads_the_options_and_fills_the_record() -> None:
    def outcome(inputs: list, **options: Any) -> tuple[Any, GraphRecord]:
        record = GraphRecord("unet.0.0", "unet", 0, "first", "", 3)
        wrap = capturing(copy_graph(gm), inputs, Session("x", Options(**options)), record)
        return wrap(plain), record

    def plain(x: Tensor) -> tuple[Tensor]:
        return (x + 1,)

    gm, inputs = on_gpu(lambda x: (x + 1).sin() * 2, (1000,))
    call, record = outcome(inputs)
    assert isinstance(call, CapturedCall)
    assert (record.capture.planned_bytes, record.capture.summed_bytes) == (2 * 4096, 3 * 4096)
    assert record.capture.state == "waiting"
    call, record = outcome(inputs, cuda_graphs=False)
    assert call is plain
    assert record.capture is None
    call, record = outcome([torch.ones(1000)])  # no GPU, nothing to say
    assert call is plain
    assert record.capture is None
    call, record = outcome(inputs, inductor={"triton.cudagraphs": True})
    assert call is plain
    assert "Inductor" in record.capture.reason
