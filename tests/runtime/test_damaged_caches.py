"""Caches on disk that went wrong are not used, and two processes do not lose each other's work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import few
from hypothesis import given
from hypothesis import strategies as st
from test_clip_cache import encoding, filled, opened

from lsync_compile.errors import MediaError
from lsync_compile.files import locked
from lsync_compile.runtime import calibration
from lsync_compile.runtime.calibration import (
    Calibration,
    calibration_file,
    load_calibrations,
    save_calibration,
)
from lsync_compile.runtime.clip_cache import ClipCache

FOUND = Calibration(
    steps=20, branch=0, predictor="linear", computed=(0, 4, 9), mouth_psnr=41.5, floor=40.0,
    clip="talk.mp4", frames=32,
)  # fmt: skip


@pytest.fixture
def unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    monkeypatch.setenv("LSYNC_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return torch.nn.Linear(3, 3)


def stored(unet: torch.nn.Module) -> dict[str, Any]:
    path = save_calibration(unet, FOUND)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "20"},
        {"steps": True},
        {"computed": 3},
        {"computed": ["0"]},
        {"computed": []},
        {"computed": [0, 20]},
        {"mouth_psnr": "high"},
        {"branch": -1},
        {"more": 1},
    ],
)
def test_a_calibration_that_makes_no_sense_is_not_used(
    unet: torch.nn.Module, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    content = stored(unet)
    assert load_calibrations(unet) == {FOUND.key: FOUND}
    content["calibrations"][0] |= change
    calibration_file(unet).write_text(json.dumps(content))
    assert load_calibrations(unet) == {}
    assert "cannot be read" in caplog.text
    save_calibration(unet, FOUND)  # in the damaged file's place
    assert load_calibrations(unet) == {FOUND.key: FOUND}


@few(60)
@given(data=st.data())
def test_any_damage_to_calibrations_reads_as_some_or_none(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("calibrations") / "file.json"
    row = {**vars(FOUND), "computed": [0, 4, 9]}
    content = bytearray(json.dumps({"version": 1, "calibrations": [row]}).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(32, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for key, found in calibration._read(path).items():
        assert key == found.key
        assert all(0 <= step < found.steps for step in found.computed)


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "[]", '{"version": 1}', "\udcff"])
def test_files_that_hold_no_calibrations(unet: torch.nn.Module, text: str) -> None:
    stored(unet)
    calibration_file(unet).write_text(text, errors="surrogateescape")
    assert load_calibrations(unet) == {}


def test_a_cache_folder_that_is_a_file_is_one_error(unet: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    assert load_calibrations(unet) == {}
    with pytest.raises(MediaError, match="cannot be written"):
        save_calibration(unet, FOUND)


SAVE = """
import sys, torch, dataclasses
from lsync_compile.runtime.calibration import Calibration, save_calibration
torch.manual_seed(0)
unet = torch.nn.Linear(3, 3)
for steps in range(int(sys.argv[1]), 60, 2):
    save_calibration(unet, Calibration(steps, 0, "reuse", (0,), 1.0, 1.0, "a", 1))
"""


def test_two_processes_that_calibrate_lose_nothing(unet: torch.nn.Module) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", SAVE, first], stderr=subprocess.PIPE)
        for first in ("20", "21")
    ]
    for process in running:
        assert process.communicate(timeout=120)[1] == b""
    assert sorted(key[0] for key in load_calibrations(unet)) == list(range(20, 60))


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for _ in range(2):
        with locked(path):
            pass
    with pytest.raises(KeyError), locked(path):
        raise KeyError
    with locked(path):
        pass
    assert [each.name for each in tmp_path.iterdir()] == [".file.lock"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    filled(ClipCache(folder), "clip", 3)
    return folder


@few(60)
@given(data=st.data())
def test_any_damage_to_a_clips_files_gives_what_was_stored_or_nothing(
    kept: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(kept, tmp_path_factory.mktemp("copy") / "cache"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        reach = data.draw(st.sampled_from([150, len(content)]))
        content[data.draw(st.integers(0, reach - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 40]))])
    store = opened(ClipCache(folder))
    for source in range(4):
        for batch in (4, 5):
            found = store.read(source, batch)
            if found is not None:
                assert batch == 4
                assert torch.equal(found, encoding(source))
    assert set(store.faces) <= {0, 1, 2}
    store.write(7, 4, encoding(7))
    store.commit(store.faces, "clip")
    again = opened(ClipCache(folder)).read(7, 4)
    assert again is not None
    assert torch.equal(again, encoding(7))


def test_a_record_is_never_taken_for_another_frames(kept: Path, tmp_path: Path) -> None:
    """One bit of a number in the line that says which record is whose."""
    folder = Path(shutil.copytree(kept, tmp_path / "cache"))
    (path,) = folder.rglob("*.bin")
    content = path.read_bytes()
    assert b"[[0, 4, " in content
    path.write_bytes(content.replace(b"[[0, 4, ", b"[[1, 4, ", 1))
    store = opened(ClipCache(folder))
    assert all(store.read(source, 4) is None for source in range(3))


def test_faces_of_another_form_are_not_used(kept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept, tmp_path / "cache"))
    (path,) = folder.rglob("*.npz")
    forms: list[tuple[Any, Any]] = [
        (np.arange(2), np.ones((2, 20))),
        (np.arange(2), np.ones((3, 21))),
        (np.array([0.5, 1.5]), np.ones((2, 21))),
        (np.arange(2), np.array(3.0)),
        (np.array(["a", "b"]), np.ones((2, 21))),
    ]
    for places, rows in forms:
        np.savez(path, places=places, rows=rows)
        assert opened(ClipCache(folder)).faces == {}
    with path.open("wb") as file:  # an array of 10 TB
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 21)}
        )
    assert opened(ClipCache(folder)).faces == {}


def test_a_head_that_claims_too_much_is_not_used(kept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept, tmp_path / "cache"))
    (path,) = folder.rglob("*.bin")
    for head in ('{"shape": [1e300], "dtype": "float32", "records": []}', "[" * 100_000, "{}"):
        text = head.encode() + b"\n"
        path.write_bytes(b"%08x " % zlib.crc32(text) + text + bytes(64))
        assert opened(ClipCache(folder)).read(0, 4) is None


def test_what_does_not_belong_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    cache = ClipCache(tmp_path)
    filled(cache, "clip", 1)
    (cache.folder / "notes.txt").write_text("mine")
    assert [entry.key for entry in cache.entries()] == ["clip"]
