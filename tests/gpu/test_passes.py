"""All passes on a GPU: layouts there are as the examples say, and half precision loses nothing.

Needs no video libraries: ``pytest --noconftest tests/gpu/test_passes.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from captures import capture, make_unet, unet_inputs

from lsync_compile.graph.build import example
from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.spec import registered

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch sees none", allow_module_level=True)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
FUSIONS = {name for name in registered() if name.startswith("fuse_")}
ON = {registered()[name].spec.option: True for name in FUSIONS}


class Watch(Interpreter):
    """Runs a graph and notes where real strides differ from the examples'."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.different: list[str] = []

    def run_node(self, node: Node):
        result = super().run_node(node)
        value = example(node)
        if isinstance(result, Tensor) and value is not None and result.stride() != value.stride():
            self.different.append(f"{node.name} {result.stride()} not {value.stride()}")
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_real_unet(dtype: torch.dtype) -> None:
    unet = make_unet().to(CUDA, torch.float32)
    inputs = {name: value.to(CUDA) for name, value in unet_inputs().items()}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    unet.to(dtype)
    with torch.no_grad():
        gm, values = capture(unet, **inputs)
        after = copy_graph(gm)
        records = PassManager(Options(**ON)).run(after, "unet", "graph")
        wide = make_unet().to(CUDA, dtype).to(torch.float64)
        exact = wide(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
        watch = Watch(after)
        (one,), (other,) = watch.run(*values), gm(*values)
    applied = {record.name for record in records if record.outcome == "applied"}
    assert applied >= FUSIONS
    assert "channels_last" in applied
    assert watch.different == []
    assert one.stride() == other.stride()
    error, plain = (float((x - exact.sample).norm() / exact.sample.norm()) for x in (one, other))
    assert error <= 1.2 * plain, (error, plain)
