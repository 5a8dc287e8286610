"""What kernels need of other GPUs: every kernel has a configuration that fits."""

from __future__ import annotations

import json

import pytest
from common import RESULTS
from kernels_sm90 import launches

from lsync_compile.kernels.launch import INTERPRETED, Config, triton

pytestmark = [
    pytest.mark.skipif(triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]


def test_recorded_kernels_fit_all_supported_gpus() -> None:
    rows = json.loads((RESULTS / "kernels_elsewhere.json").read_text())["rows"]
    assert {row["capability"] for row in rows} == {75, 80, 86, 89, 90, 120}
    for row in rows:
        # Heads of 160 channels spill in our attention, where the libraries' is taken.
        if row["capability"] >= 80 and row["kernel"] != "spatial_attention":
            assert row["usable"], row
    # Why `lsync_compile.kernels.launch.OLDEST` is what it is.
    assert any(row["capability"] == 75 and not row["usable"] for row in rows)


def test_what_does_not_fit_is_told_apart() -> None:
    from kernels_elsewhere import row, runs_there

    named = {launch.kernel.name: (label, launch) for label, launch in launches()}
    label, launch = named["linear_geglu_tiles"]  # the largest tiles: four stages are 144 KiB
    found = row(label, launch, 89)
    assert 0 < found["usable"] < found["configurations"]
    assert found["without_room"] >= 1
    assert 0 < found["warps"] <= found["most_warps"] == 48

    label, launch = named["quantise_rows"]  # its numbers are unknown there
    assert not runs_there(launch, 86)
    found = row(label, launch, 86)
    assert (found["usable"], found["programs"]) == (0, 0)
    assert "fp8" in found["failed"][0]


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120])
def test_rooms_are_those_of_the_programming_guide(capability: int) -> None:
    from lsync_compile.kernels.resources import MULTIPROCESSORS, Resources

    holds = MULTIPROCESSORS[capability]

    def programs(registers: int, shared: int) -> int:
        return Resources(capability, registers, 0, shared, 128, "").programs

    assert programs(16, 0) == min(holds.threads // 128, holds.programs)
    assert programs(16, holds.shared - 1024) == 1
    assert programs(16, holds.shared - 1024 + 1) == 0
    assert programs(255, 0) == min(2, holds.threads // 128)


def test_a_configuration_is_what_is_compiled() -> None:
    from lsync_compile.kernels.resources import compile_for

    launch = next(launch for _, launch in launches() if launch.kernel.name == "geglu")
    narrow = Config({"ROWS": 4, "COLUMNS": 64}, warps=2)
    assert compile_for(launch, narrow, 86).threads == 64
