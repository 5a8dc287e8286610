"""A module's graph captured once and found again, as by a later process; and when it must not be.

The module of these tests is one of "known code" by a fixture. What is compared is always the plain
module's result, bit by bit.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lsync_compile
from lsync_compile import compile_cache
from lsync_compile.kept import state, structure

OPTIONS: dict[str, Any] = {"preset": "exact", "lowering": "eager", "strict": True}


class Gate:
    """An object that a module holds and calls, as diffusers' modules hold their processors."""

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.power


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.conv(x)) * self.scale


class Network(nn.Module):
    """Reads parameters, a buffer, constants, a list, a processor, a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = Child(), Child()
        self.factor = 2.0
        self.factors = [1.0, 2.0]
        self.named = {"bias": 0.25}
        self.gate = Gate(3.0)
        self.activation = nn.functional.relu
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, times: int = 1, *, shift: Tensor | None = None) -> Any:
        for _ in range(times):
            x = self.activation(self.child(x) + self.other(x)) * self.factor
        x = self.gate(self.dropout(x)) * self.factors[0] + self.named["bias"]
        return (x if shift is None else x + shift,)


class Pipeline:
    """The least that lsync takes for a pipeline."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.vae, self.scheduler = unet, None, None

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[Path]]:
    """The files of captures."""
    known = (*state.KNOWN, __name__)
    monkeypatch.setattr(state, "KNOWN", known)
    monkeypatch.setattr(structure, "KNOWN", known)
    monkeypatch.setattr(compile_cache, "folder", lambda: tmp_path / "cache")
    return lambda: sorted((tmp_path / "cache").rglob("captures/*.json"))


def network(kind: type[nn.Module] = Network) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def compiled(module: nn.Module, **options: Any) -> Any:
    """Compiled as in a new process: dynamo knows nothing."""
    torch._dynamo.reset()
    return lsync_compile.compile(Pipeline(module), **OPTIONS, compile_vae=False, **options)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return module._call_impl(*args, **kwargs)


def captures() -> int:
    """How many graphs dynamo has captured."""
    return counters["stats"]["unique_graphs"]


def graphs(fast: Any) -> list[Any]:
    return fast.lsync.report().graphs


def keep_one(kind: type[nn.Module] = Network, *args: Any, **kwargs: Any) -> None:
    """Capture and keep, as the first process does."""
    compiled(network(kind))(*(args or (draw(),)), **kwargs)


def again(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compile and call as a later process does; the result is checked. The compiled pipeline."""
    fast, args = compiled(module), args or (draw(),)
    (result,), (expected,) = fast(*args, **kwargs), plain(module, *args, **kwargs)
    assert torch.equal(result, expected)
    return fast


def test_a_later_process_does_not_capture() -> None:
    first = compiled(network())
    first(draw())
    before = captures()
    fast = again(network())
    assert captures() == before
    (one,), (other,) = graphs(first), graphs(fast)
    assert (one.kept, other.kept) == (False, True)
    assert [asdict(each) for each in one.passes] == [asdict(each) for each in other.passes]
    assert (one.nodes_in, one.nodes_out) == (other.nodes_in, other.nodes_out)
    assert other.name == one.name
    assert other.inputs == one.inputs
    assert other.pass_seconds == 0
    assert "captured before" in str(fast.lsync.report())
    assert fast.lsync.report().notes == first.lsync.report().notes


def test_the_first_calls_arguments_are_let_go() -> None:
    """The compiler lives on, and they may be a chunk of pictures on a device."""
    fast, x = compiled(network()), draw()
    held = ref(x)
    fast(x)
    del x
    gc.collect()
    assert held() is None


def test_weights_are_those_of_now() -> None:
    keep_one()
    module = network()
    fast = again(module)
    module.child.conv.weight.data.mul_(2)
    module.other.scale = torch.tensor(-1.0)
    module.other.conv.bias = nn.Parameter(draw(4), requires_grad=True)
    before = captures()
    assert torch.equal(fast(draw(seed=1))[0], plain(module, draw(seed=1))[0])
    assert captures() == before


def replace_child(module: Any) -> None:
    module.child = nn.Identity()


def move_parameter(module: Any) -> None:
    module.child.conv.weight.data = (
        module.child.conv.weight.data.movedim(0, 1).contiguous().movedim(0, 1)
    )


CHANGES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda module: setattr(module, "factor", 3.0),
    "list in place": lambda module: module.factors.__setitem__(0, 5.0),
    "mapping in place": lambda module: module.named.__setitem__("bias", 7.0),
    "object in place": lambda module: setattr(module.gate, "power", 0.5),
    "object": lambda module: setattr(module, "gate", Gate(0.1)),
    "function": lambda module: setattr(module, "activation", nn.functional.gelu),
    "child": replace_child,
    "children": lambda module: module.add_module("more", nn.Identity()),
    "forward": lambda module: setattr(module.child, "forward", lambda x: x),
    "mode": lambda module: module.child.train(),
    "strides": move_parameter,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_module_is_captured_again(name: str) -> None:
    keep_one()
    module = network()
    fast = again(module)
    before = captures()
    CHANGES[name](module)
    assert torch.equal(fast(draw())[0], plain(module, draw())[0])
    assert captures() > before
    assert any("captured again" in note for note in fast.lsync.report().notes)


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_changed_before_is_not_the_kept_one(name: str) -> None:
    keep_one()
    module = network()
    CHANGES[name](module)
    fast = again(module)
    assert name == "children" or not any(graph.kept for graph in graphs(fast))


def test_a_module_that_is_as_it_was_runs_as_before() -> None:
    keep_one()
    module = network()
    fast = again(module)
    for factor in (3.0, 2.0, 3.0):
        module.factor = factor
        assert torch.equal(fast(draw())[0], plain(module, draw())[0])
    calls = {graph.kept: graph.calls for graph in graphs(fast)}
    assert calls == {True: 2, False: 2}


@pytest.mark.parametrize(
    "arguments",
    [
        ((draw(1, 4, 8, 8),), {}),
        ((draw(), 2), {}),
        ((draw().double(),), {}),
        ((draw(),), {"shift": draw()}),
        ((draw().transpose(2, 3),), {}),
        ((draw(),), {"times": 1}),
    ],
    ids=["shape", "constant", "dtype", "another", "strides", "keyword"],
)
def test_other_arguments_are_another_question(arguments: tuple[tuple[Any, ...], Any]) -> None:
    args, kwargs = arguments
    keep_one()
    module = network().double() if args[0].dtype == torch.float64 else network()
    fast = again(module, *args, **kwargs)
    assert not any(graph.kept for graph in graphs(fast))


def test_arguments_are_compared_in_each_call() -> None:
    """Of those that the compiled call does not tell apart itself: constants, strides, aliases."""
    keep_one(Network, draw(), 1, shift=draw(seed=1))
    module, x, y = network(), draw(), draw(seed=1)
    fast = again(module, x, 1, shift=y)
    for args, kwargs in (
        ((x, 2), {"shift": y}),
        ((x.transpose(2, 3), 1), {"shift": y}),
        ((x, True), {"shift": y}),
        ((x, 1), {"shift": x}),
        ((x, 1), {"shift": y}),
    ):
        assert torch.equal(fast(*args, **kwargs)[0], plain(module, *args, **kwargs)[0])


@pytest.mark.parametrize("change", ["sources", "torch", "options", "passes", "mode", "device"])
def test_other_circumstances_are_another_question(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, change: str
) -> None:
    keep_one()
    module, options = network(), {}
    if change == "sources":
        state._source_uuid.cache_clear()
        monkeypatch.setattr(state, "module_uuid", lambda module: "changed")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0")
    elif change == "options":
        options = {"share_repeated": False}
    elif change == "passes":
        manager = "lsync_compile.passes.manager.PassManager.uuid"
        monkeypatch.setattr(manager, lambda self: "changed")
    elif change == "mode":
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(mode=False))
        torch.use_deterministic_algorithms(mode=True)
    else:
        monkeypatch.setattr("lsync_compile.kept.call._device_names", lambda: ["a new GPU"])
    fast = compiled(module, **options)
    assert torch.equal(fast(draw())[0], plain(module, draw())[0])
    assert not graphs(fast)[0].kept
    state._source_uuid.cache_clear()


def test_an_exchanged_method_of_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_one()
    monkeypatch.setattr(Child, "forward", lambda self, x: x * 4)
    assert not graphs(again(network()))[0].kept


def test_gradients_and_autocast_do_without(kept: Callable[[], list[Path]]) -> None:
    keep_one()
    module = network()
    fast = again(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (low,) = fast(draw())
    assert low.dtype == torch.bfloat16 or not torch.equal(low, plain(module, draw())[0])
    (whole,) = fast.unet(draw())  # not under no_grad
    assert whole.requires_grad
    assert len(kept()) == 1


PROCESS = """
import sys, torch
from conftest import TINY_UNET
from diffusers import AutoencoderKL
import lsync_compile
from lsync_compile.models.unet import UNet3DConditionModel

class Pipeline:
    def __init__(self):
        torch.manual_seed(0)
        self.unet, self.scheduler = UNet3DConditionModel.from_config(TINY_UNET).eval(), None
        self.vae = AutoencoderKL(
            block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",), norm_num_groups=4).eval()
    @torch.no_grad()
    def __call__(self):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator)
        noise = self.unet(draw(2, 13, 2, 8, 8), torch.tensor(5), draw(4, 50, 384)).sample
        pictures = self.vae.decode(draw(2, 4, 8, 8)).sample
        return [noise, pictures, self.vae.encode(pictures).latent_dist.mode()]

fast = lsync_compile.compile(Pipeline(), preset="exact", lowering="eager", strict=True)
values = [float(value.double().sum()) for value in fast()]
print(values, [graph.kept for graph in fast.lsync.report().graphs])
"""


def test_in_processes_of_their_own(tmp_path: Path) -> None:
    """The UNet and diffusers' VAE; sets and hashes have another order in each process."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    printed = []
    for seed in ("1", "2"):
        environment["PYTHONHASHSEED"] = seed
        command = [sys.executable, "-c", PROCESS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.strip().splitlines()[-1])
    assert printed[0].endswith("[False, False, False]")
    assert printed[1] == printed[0].replace("False", "True")


# What is not kept


class Hooked(Network):
    def __init__(self) -> None:
        super().__init__()
        self.child.register_forward_hook(lambda module, args, result: result + 1)


class Counting(Network):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return (x * self.calls,)


class Tied(Network):
    def __init__(self) -> None:
        super().__init__()
        self.other.conv.weight = self.child.conv.weight


class Breaking(Network):
    def forward(self, x: Tensor) -> Any:
        x = self.child(x)
        torch._dynamo.graph_break()
        return (self.other(x),)


class Returning(Network):
    def forward(self, x: Tensor) -> Any:
        return (x,)


class HeldTensor(Network):
    def __init__(self) -> None:
        super().__init__()
        self.held = torch.ones(())

    def forward(self, x: Tensor) -> Any:
        return (x * self.held,)


@pytest.mark.parametrize("kind", [Hooked, Counting, Tied, Breaking, Returning, HeldTensor])
def test_modules_that_are_captured_in_each_process(
    kind: type[nn.Module], kept: Callable[[], list[Path]]
) -> None:
    for _ in range(2):
        fast, reference = compiled(network(kind)), network(kind)
        for _ in range(2):
            assert torch.equal(fast(draw())[0], plain(reference, draw())[0])
        assert not any(graph.kept for graph in graphs(fast))
    assert not kept()


def test_code_of_others_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, kept: Callable[[], list[Path]]
) -> None:
    monkeypatch.setattr(state, "KNOWN", ("torch", "diffusers"))
    keep_one()
    assert not kept()


def test_options_switch_it_off(kept: Callable[[], list[Path]], tmp_path: Path) -> None:
    compiled(network(), keep_captures=False)(draw())
    compiled(network(), dump_dir=tmp_path / "dump")(draw())
    assert not kept()


def test_a_damaged_file_costs_a_capture(kept: Callable[[], list[Path]]) -> None:
    keep_one()
    (path,) = kept()
    whole = json.loads(path.read_text())
    for damaged in (
        b"{",
        b"[]",
        json.dumps({**whole, "inputs": whole["inputs"][:-1]}).encode(),
        json.dumps(
            {**whole, "inputs": [["tensor", "gone.weight"]] * len(whole["inputs"])}
        ).encode(),
        json.dumps({**whole, "passes": [{"name": 1}]}).encode(),
        json.dumps({**whole, "result": ["tensor", 9]}).encode(),
        json.dumps({key: value for key, value in whole.items() if key != "graph"}).encode(),
    ):
        path.write_bytes(damaged)
        assert not graphs(again(network()))[0].kept
        assert json.loads(path.read_text())["inputs"] == whole["inputs"]  # mended
    assert graphs(again(network()))[0].kept
