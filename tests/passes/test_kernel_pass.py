"""What passes with kernels have in common: when they stay away."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from captures import capture
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from lsync_compile.kernels import launch, registered
from lsync_compile.options import Options
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext


class Some(KernelPass):
    kernel = registered()["geglu"]


def veto(gm: GraphModule, **options: str) -> str:
    return Some().veto(gm, PassContext(Options(**options), "unet"))


def plain(x: Tensor) -> Tensor:
    return x.sin()


def test_the_option() -> None:
    gm, _ = capture(plain, torch.ones(3))
    assert veto(gm) == "no kernel runs on a CPU"
    assert veto(gm, kernels="on") == ""
    assert veto(gm, kernels="off") == "option kernels is 'off'"


def test_gradients() -> None:
    gm, _ = capture(plain, torch.ones(3, requires_grad=True))
    assert veto(gm, kernels="on") == "a gradient is wanted, and the kernel has none"
    with torch.no_grad():
        assert veto(gm, kernels="on") == ""


def test_autocast_around_and_inside() -> None:
    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    gm, _ = capture(plain, torch.ones(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert veto(gm, kernels="on") == "autocast chooses the dtypes"
    gm, _ = capture(inside, torch.ones(3, 3))
    assert veto(gm, kernels="on") == "autocast chooses the dtypes"


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.float16, ""),
        (torch.float64, "geglu does not take float64"),
        (torch.int64, "geglu does not take integers"),
    ],
)
def test_dtypes(dtype: torch.dtype, reason: str) -> None:
    gm, _ = capture(plain, torch.ones(3, dtype=dtype))
    assert veto(gm, kernels="on") == reason


def test_one_tensor() -> None:
    gm, _ = capture(lambda x: (x.sin(), x.double(), x.chunk(2)), torch.ones(4))
    nodes = {node.target: node for node in gm.graph.nodes}
    on, auto = (PassContext(Options(kernels=value), "unet") for value in ("on", "auto"))
    assert Some().takes(nodes["sin"], on)
    assert not Some().takes(nodes["sin"], auto)  # on a CPU
    assert not Some().takes(nodes["double"], on)
    assert not Some().takes(nodes["chunk"], on)
    assert not Some().takes(None, on)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], GraphModule]]:
    """A graph of a half-precision input on a GPU of a compute capability that is not here."""

    def make(*capability: int) -> GraphModule:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        gm, _ = capture(plain, torch.ones(3, dtype=torch.float16))
        (x,) = (node for node in gm.graph.nodes if node.op == "placeholder")
        with FakeTensorMode():
            x.meta["example_value"] = torch.empty(3, dtype=torch.float16, device="cuda:0")
        return gm

    launch.capability.cache_clear()
    yield make
    launch.capability.cache_clear()


@pytest.mark.skipif(launch.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("kernels", ["auto", "on"])
@pytest.mark.parametrize(
    ("kernel", "capability", "reason"),
    [
        ("geglu", (8, 0), ""),
        ("geglu", (12, 0), ""),
        ("geglu", (7, 5), "geglu needs a GPU of compute capability 8.0, this one has 7.5"),
        ("fp8_linear", (8, 9), ""),
        ("fp8_linear", (8, 6), "fp8_linear needs a GPU of compute capability 8.9, "
         "this one has 8.6"),
    ],
)  # fmt: skip
def test_older_gpus(
    on_gpu: Callable[[int, int], GraphModule],
    kernel: str,
    capability: tuple[int, int],
    reason: str,
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Some, "kernel", registered()[kernel])
    assert veto(on_gpu(*capability), kernels=kernels) == reason


@pytest.mark.skipif(launch.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter runs kernels on anything")
def test_ops_on_older_gpus_run_their_references(
    on_gpu: Callable[[int, int], GraphModule],
) -> None:
    for capability, expected in (((7, 5), False), ((8, 0), True)):
        launch.capability.cache_clear()
        (x,) = (n for n in on_gpu(*capability).graph.nodes if n.op == "placeholder")
        assert launch.runs_kernel(x.meta["example_value"]) == expected
