"""The model for other GPUs: between the two ratios, from a measured step and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scaling import STATED, modelled


def test_steps_lie_between_the_ratios_of_what_makers_state(tmp_path: Path) -> None:
    path = tmp_path / "unet_step.json"
    row = {"variant": "lsync", "guidance": True, "latents": 64, "p50": 100.0}
    path.write_text(json.dumps({"machine": {"device": "NVIDIA H100 80GB"}, "rows": [row]}))
    rows = {each["gpu"]: each for each in modelled(path)}
    assert set(rows) == set(STATED)
    own, card = rows["H100 SXM 80 GB"], rows["RTX 4090 24 GB"]
    assert own["step_ms_from"] == own["step_ms_to"] == 100.0
    assert card["step_ms_from"] == pytest.approx(332.3)  # 3350 / 1008
    assert card["step_ms_to"] == pytest.approx(599.4)  # 989 / 165
    path.write_text(json.dumps({"machine": {"device": "CPU"}, "rows": [row]}))
    with pytest.raises(SystemExit, match="to model from"):
        modelled(path)
