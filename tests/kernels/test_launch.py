from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lsync_compile.kernels import (
    add_layer_norm,
    geglu,
    group_norm_silu,
    registered,
    residual_moments,
    temporal_attention,
)
from lsync_compile.kernels.accuracy import error
from lsync_compile.kernels.launch import (
    INTERPRETED,
    Config,
    Kernel,
    kernel,
    record_launches,
    runs_kernel,
    triton,
)
from lsync_compile.kernels.spec import register
from lsync_compile.kernels.upsample_conv import phases_of


def test_a_cpu_runs_kernels_under_the_interpreter_only():
    x = torch.zeros(2, 8)
    assert runs_kernel(x) is INTERPRETED
    with record_launches() as launches:
        geglu(x)
    assert [launch.kernel.name for launch in launches] == (["geglu"] if INTERPRETED else [])


def test_configurations_that_do_not_fit_are_left_out():
    configs = [Config({"N": n}) for n in (1, 2, 4)]

    @kernel(configs, fits=lambda config, arguments: config.blocks["N"] <= arguments["m"])
    def tried(m, N):
        pass

    assert tried.candidates({"m": 2}) == configs[:2]
    assert tried.candidates({"m": 0}) == configs  # none fits: any is better than none


@pytest.mark.skipif(triton is None or INTERPRETED, reason="about kernels that are compiled")
def test_a_kernel_that_fits_no_gpu_says_so(monkeypatch):
    """As a RuntimeError, which `lsync_compile.kernels.fastest` takes for "not this way"."""
    from triton.runtime.errors import OutOfResources

    class Tuner:
        def __getitem__(self, grid):
            def run(*args, **constants):
                raise OutOfResources(147456, 101376, "shared memory")

            return run

    @kernel([Config({"N": 8})])
    def large(x_ptr, N):
        pass

    monkeypatch.setattr(large, "_tuner", Tuner())
    large._ahead = lambda: None
    with pytest.raises(RuntimeError, match=r"large cannot run on this GPU: .*101376"):
        large.launch(lambda blocks: (1,), torch.zeros(8), N=8)
    assert large._ahead is None  # the arguments' memory


@pytest.mark.skipif(triton is None or INTERPRETED, reason="about kernels that are compiled")
def test_a_configuration_that_does_not_fit_is_slowest(monkeypatch):
    from triton.compiler.errors import CompilationError

    def bench(call, **settings):
        return call()

    @kernel([Config({"N": 8})])
    def tried(x_ptr, N):
        pass

    def unknown_dtype():
        raise CompilationError(None, None, "type fp8e4nv not supported in this architecture")

    monkeypatch.setattr(triton.testing, "do_bench", bench)
    time = tried._tuner.do_bench
    assert time(unknown_dtype, (0.5, 0.2, 0.8)) == [float("inf")] * 3
    assert time(lambda: [1.0] * 3, (0.5, 0.2, 0.8)) == [1.0] * 3


def test_a_name_is_registered_once():
    spec = registered()["geglu"]
    with pytest.raises(ValueError, match="registered twice"):
        register(spec)


def mixed(x, weight, bias):
    """All ops in one graph: (2*2, 8, 4, 4) channels-last -> (4, 16, 8)."""
    y = group_norm_silu(x * 2, 4, weight, bias, shift=x.mean((2, 3)))
    tokens = y.permute(0, 2, 3, 1).flatten(1, 2)
    attended = temporal_attention(tokens, tokens + 1, tokens - 1, 2, 2)
    total, normed = add_layer_norm(attended, tokens, weight, bias, position=bias.expand(2, 8))
    return geglu(torch.cat([normed, normed.sin()], -1)) + total


# Its kernel has one configuration, and rounds to eight bits otherwise in the interpreter:
# test_fp8_linear.py bounds that.
LEFT_OUT = {"fp8_linear"}


def enlarged(x, weight, bias):
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return x, weight, bias, phases_of(weight)


def measured(x, *rest):
    _, moments = residual_moments(x, None, None)
    return x, moments, *rest


def half(*tensors, at=None):
    """The tensors in half precision; ``at``: other arguments by their places."""
    arguments = [tensor.half() for tensor in tensors]
    for place, value in (at or {}).items():
        arguments.insert(place, value)
    return tuple(arguments)


@pytest.mark.skipif(not INTERPRETED, reason="a CPU chooses no configuration elsewhere")
@pytest.mark.parametrize("name", [name for name in registered() if name not in LEFT_OUT])
def test_every_configuration_is_exact(normal, monkeypatch, name):
    arguments = {
        "temporal_attention": lambda: (*normal(3, 6, 3, 80), 3, 2, None),
        "spatial_attention": lambda: (*normal(3, 2, 70, 80, dtype=torch.float16), 2, None),
        "geglu": lambda: (normal(9, 2 * 300),),
        "add_layer_norm": lambda: (*normal(2, 6, 3, 300), *normal(2, 300), 1e-5, normal(3, 300)),
        "lip_attention": lambda: (*normal(3, 2, 64, 64), 2, "8:3c3c3c", 0, 2, 2, 1.0, None),
        "layer_norm": lambda: (normal(6, 3, 300), *normal(2, 300), 1e-5, normal(3, 300)),
        "linear_geglu": lambda: half(normal(150, 64), normal(144, 64) / 8, normal(144)),
        "feed_forward": lambda: half(
            *normal(2, 150, 64),
            *normal(2, 64),
            normal(144, 64) / 8,
            normal(144),
            normal(64, 136) / 12,
            normal(64),
            at={4: 1e-5},
        ),
        "group_norm_silu": lambda: (normal(1, 12, 33, 67), 2, *normal(2, 12), 1e-5, True, None),
        "upsample_conv": lambda: enlarged(normal(1, 8, 17, 9), normal(72, 8, 3, 3) / 8, normal(72)),
        "residual_moments": lambda: (*normal(2, 2, 12, 33, 67), normal(12)),
        "group_norm_from_moments": lambda: measured(
            normal(2, 12, 33, 67), 2, *normal(2, 12), 1e-5, True
        ),
    }[name]()
    spec = registered()[name]
    bound = spec.tolerances[arguments[0].dtype].relative
    with record_launches() as launches:
        spec.kernel(*arguments)
    every = Kernel.candidates
    for launch in launches:
        for config in launch.configs:

            def chosen(kernel, given, this=launch.kernel, config=config):
                return [config] if kernel is this else every(kernel, given)

            monkeypatch.setattr(Kernel, "candidates", chosen)
            assert error(spec, *arguments) <= bound, config


@pytest.mark.skipif(INTERPRETED, reason="the compilers treat an op alike whatever it runs")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_keeps_layout_and_values(normal, backend):
    x = normal(4, 8, 4, 4).to(memory_format=torch.channels_last)
    weight, bias = normal(2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(mixed, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), mixed(x, weight, bias))


@pytest.mark.skipif(INTERPRETED, reason="about a process without Triton")
def test_without_triton_ops_run_their_references():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from lsync_compile.kernels import geglu, registered\n"
        "from lsync_compile.kernels.launch import triton\n"
        "assert triton is None and 'geglu' in registered()\n"
        "x = torch.randn(3, 8)\n"
        "torch.testing.assert_close(geglu(x), x[:, :4] * torch.nn.functional.gelu(x[:, 4:]))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_candidates_are_compiled_side_by_side_before_one_is_timed(tmp_path):
    """In a process that believes in an H100: Triton compiles for it without one."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_ahead.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    every = first["candidates"]
    assert every > 1
    assert first["together"] == [every]
    assert first["when timed"] == [every] * every
    assert first["launched"] == 1
    # A choice from disk needs one: nothing is compiled ahead, and nothing timed.
    assert second["together"] == second["when timed"] == []
    assert second["compiled"] == second["launched"] == 1
    assert not first["kept"]  # the arguments' memory
    assert not second["kept"]
