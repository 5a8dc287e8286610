"""The model for other GPUs: between the two ratios, from a measured run and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scaling import DEVICES, PRESETS, STATED, modelled

SETTING = {"size": "full", "pixels": 512, "frames": 16, "dtype": "float16", "steps": 20}


def section(device: str, rate: float, **setting: object) -> dict:
    rows = [{"row": name, "frames_per_s": rate, "unet_step_ms": 100.0} for name in PRESETS]
    return {"machine": {"device": device}, "setting": {**SETTING, **setting}, "rows": rows}


def write(path: Path, *sections: dict) -> Path:
    path.write_text(json.dumps({"sections": sections}))
    return path


def test_figures_lie_between_the_ratios_of_what_makers_state(tmp_path: Path) -> None:
    path = write(tmp_path / "bench.json", section("NVIDIA H100 80GB HBM3", 30.0))
    rows = {each["gpu"]: each for each in modelled(path)}
    assert set(rows) == set(STATED)
    own, card = rows["H100 SXM 80 GB"], rows["RTX 4090 24 GB"]
    assert own["unet_step_ms"] == [100.0, 100.0]
    assert own["frames_per_s"] == {name: [30.0, 30.0] for name in PRESETS}
    assert card["unet_step_ms"] == [332.3, 599.4]  # 3350 / 1008 and 989 / 165
    assert card["frames_per_s"]["turbo"] == [5.0, 9.0]
    assert card["measured_on"] == "H100 SXM 80 GB"


def test_a_gpu_is_known_by_its_whole_name(tmp_path: Path) -> None:
    assert set(DEVICES.values()) == set(STATED)
    for other in ("GeForce RTX 3080", "L40", "GH200 480GB", "H100 PCIe"):
        with pytest.raises(SystemExit, match="to model from"):
            modelled(write(tmp_path / "bench.json", section(f"NVIDIA {other}", 10.0)))
    rows = modelled(write(tmp_path / "bench.json", section("NVIDIA GeForce RTX 3090", 10.0)))
    assert rows[0]["measured_on"] == "RTX 3090 24 GB"


def test_the_newest_full_run_counts(tmp_path: Path) -> None:
    partial = section("NVIDIA H200", 60.0)
    partial["rows"].pop()
    others = [section("NVIDIA H200", 70.0, pixels=256), section("x86_64", 1.0), partial]
    runs = [section("NVIDIA H100 80GB HBM3", 30.0), section("NVIDIA H200", 50.0), *others]
    rows = {each["gpu"]: each for each in modelled(write(tmp_path / "bench.json", *runs))}
    assert rows["H200 SXM 141 GB"]["frames_per_s"]["exact"] == [50.0, 50.0]
    with pytest.raises(SystemExit, match="to model from"):
        modelled(write(tmp_path / "bench.json", *others))
