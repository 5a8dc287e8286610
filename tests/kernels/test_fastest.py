"""Choosing between ways to compute the same, and remembering the choice. Times are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lsync_compile import compile_cache
from lsync_compile.kernels import fastest as module
from lsync_compile.kernels.fastest import Choices

CUDA = torch.device("cuda", 0)
KEY = (torch.float16, (2, 3), (3, 1))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names that were timed: the longer the name, the slower; "broken" cannot run."""
    names: list[str] = []

    def milliseconds(name: str, call: Callable[[], Any], device: torch.device) -> float:
        names.append(name)
        return float("inf") if name == "broken" else float(len(name))

    monkeypatch.setattr(module, "_milliseconds", milliseconds)
    monkeypatch.setattr(compile_cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return names


def ways(*names: str) -> Callable[[], dict[str, Callable[[], None]]]:
    return lambda: dict.fromkeys(names, lambda: None)


def test_the_fastest_is_timed_once(timed: list[str]) -> None:
    choices = Choices(__name__)
    for _ in range(2):
        assert choices.fastest(CUDA, KEY, ways("longer", "short", "broken")) == "short"
    assert timed == ["longer", "short", "broken"]
    assert choices.names() == ["short"]


def test_another_process_need_not_time_again(timed: list[str]) -> None:
    Choices(__name__).fastest(CUDA, KEY, ways("longer", "short"))
    timed.clear()
    assert Choices(__name__).fastest(CUDA, KEY, ways("longer", "short")) == "short"
    assert not timed


@pytest.mark.parametrize("change", ["key", "device", "sources", "version", "gone", "off"])
def test_a_choice_is_not_taken_for_another_question(
    monkeypatch: pytest.MonkeyPatch, timed: list[str], change: str
) -> None:
    Choices(__name__).fastest(CUDA, KEY, ways("longer", "short"))
    timed.clear()
    key, names = KEY, ("longer", "short")
    if change == "key":
        key = (torch.bfloat16, *KEY[1:])
    elif change == "device":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    elif change == "sources":
        monkeypatch.setattr(module, "module_uuid", lambda module: "changed")
    elif change == "version":
        monkeypatch.setattr(torch, "__version__", "0")
    elif change == "gone":
        names = ("longer", "longest")
    else:
        monkeypatch.setattr(compile_cache, "folder", lambda: None)
    assert Choices(__name__).fastest(CUDA, key, ways(*names)) == min(names, key=len)
    assert sorted(timed) == sorted(names)


def test_what_cannot_run_is_not_kept_on_disk(timed: list[str], tmp_path: Path) -> None:
    assert Choices(__name__).fastest(CUDA, KEY, ways("broken")) == ""
    assert Choices(__name__).fastest(CUDA, KEY, ways()) == ""
    assert not list(tmp_path.rglob("*.json"))


def test_nothing_is_timed_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, timed: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    choices = Choices(__name__)
    assert choices.fastest(CUDA, KEY, ways("short")) == ""
    assert not timed
    assert not choices.names()
