"""What all benchmarks share: timing, the description of the machine, one JSON form of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lsync_compile.bench.sizes import STAGE2_512
from lsync_compile.bench.timing import (
    Timing,
    largest_error,
    machine,
    measure,
    percentiles,
    relative_error,
)

__all__ = [
    "RESULTS",
    "STAGE2_512",
    "Timing",
    "largest_error",
    "machine",
    "measure",
    "merge_results",
    "mouth_mask",
    "percentiles",
    "recorded",
    "relative_error",
    "write_results",
]

RESULTS = Path(__file__).parent / "results"


def recorded(
    path: Path, question: str, device: torch.device, key: Sequence[str]
) -> list[list[Any]]:
    """The ``key`` fields of the rows on file that this machine and these versions wrote."""
    return [[row.get(name) for name in key] for row in _own_rows(path, question, device)]


def merge_results(
    path: Path, question: str, device: torch.device, rows: list[dict], key: Sequence[str]
) -> None:
    """:func:`write_results`, keeping older rows whose ``key`` fields differ from all new ones.

    Rows of another device, other versions or another question are not kept.
    """
    new = [[row.get(name) for name in key] for row in rows]
    old = [
        row
        for row in _own_rows(path, question, device)
        if [row.get(name) for name in key] not in new
    ]
    write_results(path, question, device, old + rows)


def _own_rows(path: Path, question: str, device: torch.device) -> list[dict]:
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    same = {**content["machine"], "date": ""} == {**machine(device), "date": ""}
    return content["rows"] if same and content["question"] == question else []


def write_results(path: Path, question: str, device: torch.device, rows: list[dict]) -> None:
    """Write ``{question, machine, rows}`` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"question": question, "machine": machine(device), "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")


def mouth_mask(side: int) -> torch.Tensor:
    """(1, side, side), 0 where generated: as large, and on as many rows, as the built-in mask.

    A rectangle: kernels' cases and counts of arithmetic are recorded with it. Times of whole chunks
    (`lsync bench`, pipeline.py) are taken with the mask itself, which is wider at its top.
    """
    mask = torch.ones(1, side, side)
    mask[:, round(0.365 * side) : round(0.95 * side), round(0.14 * side) : round(0.86 * side)] = 0
    return mask
