"""The kernels compile for an H100 on machines without a GPU, and nothing spills."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from lsync_compile.kernels.launch import INTERPRETED, triton

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

# Their tiles fill the registers, and the copy engine or asynchronous copies feed them.
PRODUCTS = {"linear_geglu_tiles", "linear_geglu_stream"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    path = ROOT / "benchmarks" / "kernels_sm90.py"
    spec = importlib.util.spec_from_file_location("kernels_sm90", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_compiles_for_sm90_without_spills(script):
    compiled = set()
    for label, launch in script.launches():
        if launch.kernel.name in compiled:
            continue
        compiled.add(launch.kernel.name)
        row = script.row(label, launch, launch.configs[0])
        assert row["spills"] == 0, row
        if launch.kernel.name in PRODUCTS:
            continue
        assert row["registers"] <= 128, row
        assert row["programs"] >= 2, row
        # These read a few channels of each run, and a table of tokens.
        if launch.kernel.name not in ("group_norm_affine", "lip_rows"):
            assert row["loads16"] > 0.5 * row["loads"], row
    assert compiled == {
        "temporal_attention",
        "spatial_attention",
        "lip_rows",
        "softmax_weights",
        "geglu",
        "linear_geglu_tiles",
        "linear_geglu_stream",
        "add_layer_norm",
        "group_norm_small",
        "group_norm_moments",
        "group_norm_affine",
        "group_norm_apply",
        "residual_moments",
        "spread",
        "quantise_rows",
    }


def test_recorded_resources_are_of_these_kernels_and_spill_nothing(script):
    recorded = json.loads((ROOT / "benchmarks" / "results" / "kernels_sm90.json").read_text())
    rows = {
        (row["kernel"], row["case"], json.dumps(row["config"])): row for row in recorded["rows"]
    }
    for label, launch in script.launches():
        for config in launch.configs:
            blocks = json.dumps({**config.blocks, "warps": config.warps, "stages": config.stages})
            row = rows.pop((launch.kernel.name, label, blocks))
            assert row["spills"] == 0
            assert row["source"] == script.source_hash(launch), "run benchmarks/kernels_sm90.py"
    assert not rows
