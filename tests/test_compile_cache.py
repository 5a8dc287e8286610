"""What compiling keeps on disk: read back as it was, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._inductor import config

from lsync_compile import compile_cache


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.undo()  # the fixture that keeps tests from each other's files
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "lsync"


def test_a_value_is_read_back(folder: Path) -> None:
    name = compile_cache.digest(["a", 1])
    assert compile_cache.read("kind", name) is None
    compile_cache.write("kind", name, {"a": [1, None, "b"]})
    assert compile_cache.read("kind", name) == {"a": [1, None, "b"]}
    assert compile_cache.read("other", name) is None
    assert [path.parent.name for path in folder.rglob("*.json")] == ["kind"]


def test_names_tell_parts_apart() -> None:
    parts = (["a", "b"], ["ab"], ["a", "b", ""], [1], ["1"], [1.0])
    assert len({compile_cache.digest(each) for each in parts}) == len(parts)


def test_a_damaged_file_is_no_answer(folder: Path) -> None:
    compile_cache.write("kind", "name", [1])
    (folder / "kind" / "name.json").write_bytes(b"\xff{")
    assert compile_cache.read("kind", "name") is None


def test_a_folder_that_cannot_be_written_costs_nothing_else(folder: Path) -> None:
    folder.write_text("in the way")
    compile_cache.write("kind", "name", 1)
    assert compile_cache.read("kind", "name") is None


def test_torchs_switch_is_obeyed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    compile_cache.write("kind", "name", 1)
    monkeypatch.setattr(config, "force_disable_caches", True)
    assert compile_cache.folder() is None
    assert compile_cache.read("kind", "name") is None
    compile_cache.write("kind", "other", 1)
    assert not (folder / "kind" / "other.json").exists()
