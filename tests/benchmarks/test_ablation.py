"""The ablation's rows and its comparison with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path

import ablation
import pytest
import torch
from ablation_rows import FEWER_STEPS, ROWS

from lsync_compile.options import resolve_options


def test_every_row_is_a_valid_setting_with_a_name_of_its_own() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        resolve_options(None, ablation.options_of(row, torch.device("cpu")), default_preset="exact")
    for option in ("deep_cache_predictor", "deep_cache_branch", "deep_cache_similarity"):
        assert any(option in (row.options or {}) for row in ROWS)


def test_fewer_steps_are_interpolated_and_never_beyond_what_was_measured() -> None:
    points = [(5.0, 30.0), (10.0, 40.0), (20.0, 50.0)]
    assert ablation.at_cost(points, 7.5) == 35.0
    assert ablation.at_cost(points, 20.0) == 50.0
    assert ablation.at_cost(points, 4.9) is None
    assert ablation.at_cost(points, 21.0) is None


@pytest.mark.parametrize("timed", [False, True])
def test_the_table_compares_at_equal_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: bool
) -> None:
    def filed(row: str, cost: float, psnr: float) -> dict:
        empty = dict.fromkeys(("worst_frame_psnr", "mouth_ssim", "flicker"))
        more = {"loss_to_original": None, "sync_best": None, "computed": 1, "reused": 0}
        return {"row": row, "cost_in_steps": cost, "mouth_psnr": psnr, **empty, **more}

    rows = [filed("10 steps", 10, 40.0), filed("5 steps", 5, 30.0), filed("DeepCache 3/0", 9, 39)]
    assert {row.name for row in FEWER_STEPS} >= {"10 steps", "5 steps"}
    monkeypatch.setattr(ablation, "QUALITY", tmp_path / "quality.json")
    monkeypatch.setattr(ablation, "SPEED", tmp_path / "speed.json")
    ablation.QUALITY.write_text(json.dumps({"rows": rows}))
    if timed:
        times = {"10 steps": 800.0, "5 steps": 400.0, "DeepCache 3/0": 600.0}
        speed = [{"row": name, "p50": time} for name, time in times.items()]
        ablation.SPEED.write_text(json.dumps({"rows": speed}))
    line = next(line for line in ablation.table().splitlines() if "DeepCache" in line)
    assert line.endswith("| 35.00 |" if timed else "| 38.00 |")
