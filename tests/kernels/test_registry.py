"""Every kernel has a test, a GPU test, a benchmark and a row in the documentation."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lsync_compile.kernels import kernels_table, registered

ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(registered())


def load(name, path, monkeypatch):
    """The module at ``path``, as its own script sees it."""
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_tested_and_measured(name, monkeypatch):
    assert (ROOT / "tests" / "kernels" / f"test_{name}.py").is_file()
    cases = load("kernel_cases", ROOT / "benchmarks" / "kernel_cases.py", monkeypatch).cases()
    sides = {side for case in cases if case.kernel == name for side in [case.side]}
    assert sides == {64, 32, 16, 8}
    gpu = (ROOT / "tests" / "gpu" / "test_kernels.py").read_text()
    assert f'"{name}"' in gpu


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_an_operator_of_its_name(name):
    spec = registered()[name]
    assert spec.name == name
    operator = getattr(torch.ops.lsync, name).default
    names = [argument.name for argument in operator._schema.arguments]
    code = spec.reference.__code__
    assert names == list(code.co_varnames[: code.co_argcount])
    assert set(spec.tolerances) == {torch.float32, torch.float16, torch.bfloat16}
    assert all(tolerance.reason for tolerance in spec.tolerances.values())


def test_the_documentation_has_the_table_of_kernels():
    assert kernels_table() in (ROOT / "docs" / "kernels.md").read_text()


def test_the_benchmark_runs_on_a_cpu(tmp_path):
    out = tmp_path / "kernels.json"
    script = ROOT / "benchmarks" / "kernels.py"
    command = [sys.executable, script, "--small", "--device", "cpu", "--dtype", "float32"]
    command += ["--runs", "2", "--inductor", "--sides", "4", "--out", out]
    subprocess.run(command, check=True)
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} == set(NAMES)
    assert {"lsync", "eager", "torch, contiguous"} < {row["variant"] for row in rows}
    for row in rows:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["relative_error"] < 1e-6
        assert row["bytes"] > 0
        assert row["share_of_copy_bandwidth"] > 0


def test_the_benchmark_keeps_what_came_before_a_failure(tmp_path, monkeypatch):
    benchmark = load("benchmark_kernels", ROOT / "benchmarks" / "kernels.py", monkeypatch)
    every, out = benchmark.eager, tmp_path / "kernels.json"

    def failing(kernel):
        if kernel == "lip_attention":
            raise RuntimeError("operation not permitted when stream is capturing")
        return every(kernel)

    def measure(*kernels):
        command = ["kernels.py", "--small", "--device", "cpu", "--sides", "4", "--runs", "1"]
        command += ["--inductor", "--dtype", "float32", "--out", str(out), "--kernels", *kernels]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
        return {row["kernel"] for row in json.loads(out.read_text())["rows"]}

    monkeypatch.setattr(benchmark, "eager", failing)
    with pytest.raises(RuntimeError, match="capturing"):
        measure("spatial_attention", "lip_attention")
    monkeypatch.setattr(benchmark, "eager", every)
    assert measure("layer_norm") == {"spatial_attention", "layer_norm"}


def test_the_benchmark_times_no_kernel_that_is_wrong(monkeypatch):
    benchmark = load("benchmark_kernels", ROOT / "benchmarks" / "kernels.py", monkeypatch)
    case = next(c for c in benchmark.cases(((4, 32),), 1, 2) if c.kernel == "geglu")
    tight = {torch.float32: registered()["geglu"].tolerances[torch.float32]}
    monkeypatch.setattr(
        benchmark, "error", lambda spec, *arguments: 2 * tight[torch.float32].relative
    )
    rows = benchmark.run_case(case, torch.device("cpu"), torch.float32, 1e9, inductor=False, runs=2)
    assert rows[0]["variant"] == "lsync"
    assert "is above" in rows[0]["refused"]
    assert "p50" not in rows[0]
    assert rows[1]["variant"] == "eager"
    assert rows[1]["p50"] > 0
