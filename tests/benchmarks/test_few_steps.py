"""The price list of fewer steps: which rows are on the curve, and what the table shows."""

from __future__ import annotations

import few_steps

ROWS = [
    {"row": "reference", "steps": 20, "psnr_to_original": 22.5},
    {"row": "floor: codec", "mouth_psnr": 44.0},
    {"row": "ddim 10", "steps": 10, "mouth_psnr": 43.7, "sync_best": None},
    {"row": "unipc 10", "steps": 10, "mouth_psnr": 39.2},
    {"row": "unipc 8", "steps": 8, "mouth_psnr": 41.0},
    {"row": "ddim 8", "steps": 8, "mouth_psnr": 41.0},
    {"row": "ddim 15", "steps": 15, "mouth_psnr": 43.7},
]


def test_a_row_is_on_the_curve_if_none_beats_it_in_steps_and_quality() -> None:
    # Neither the reference nor a floor is a way to save steps; of equals both stay.
    assert few_steps.pareto(ROWS) == {"ddim 10", "unipc 8", "ddim 8"}


def test_the_table_has_a_line_for_each_row_and_no_figure_that_was_not_measured() -> None:
    lines = few_steps.markdown(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert {line.count("|") for line in lines} == {10}
    assert lines[4].split("|")[3].strip() == "43.70"
    assert lines[4].endswith("| yes |")
    assert lines[3].split("|")[2].strip() == ""
    assert "None" not in "".join(lines)


def test_the_reference_is_no_candidate() -> None:
    names = [
        setting.name for setting in few_steps.settings([20, 8], ["ddim", "unipc"], ["leading"])
    ]
    assert names == ["ddim 8", "unipc 20", "unipc 8"]
