"""``lsync cache`` shows and clears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lsync_compile.cli import app
from lsync_compile.runtime.clip_cache import ClipCache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one clip."""
    monkeypatch.setenv("LSYNC_CACHE", str(tmp_path))
    ClipCache().open("abcd", "mtcnn", "vae").commit({0: None}, "abcd")
    return tmp_path


def test_it_is_shown_and_cleared(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["cache"])
    assert shown.exit_code == 0
    assert "abcd" in shown.output
    assert "1 clip," in shown.output
    answer = json.loads(CliRunner().invoke(app, ["cache", "--json"]).output)
    assert answer["clips"][0]["key"] == "abcd"
    assert answer["bytes"] > 0
    assert CliRunner().invoke(app, ["cache", "--clear"]).exit_code == 0
    assert not (folder / "clips").exists()
    assert "0 clips" in CliRunner().invoke(app, ["cache"]).output
