"""What passes with kernels have in common: when they stay away."""

from __future__ import annotations

import pytest
import torch
from captures import capture
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.kernels import registered
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
