"""What is kept of clips on disk: found again, and never used where it does not belong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lsync_compile.errors import MediaError
from lsync_compile.media.faces import Face
from lsync_compile.runtime.clip_cache import ClipCache, ClipStore, clip_key, networks_key

SHAPE = (2, 8, 4, 4)


def face(x: float) -> Face:
    return Face(np.arange(4.0) + x, np.ones((5, 2)) * x, np.ones((3, 2)) + x, 0.9)


def encoding(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(SHAPE, generator=generator).to(dtype)


def filled(cache: ClipCache, clip: str, frames: int, dtype: torch.dtype = torch.float32) -> None:
    store = cache.open(clip, "mtcnn", "vae")
    for number in range(frames):
        store.write(number, 4, encoding(number, dtype))
    store.commit({number: face(number) for number in range(frames)}, clip)


def opened(cache: ClipCache, clip: str = "clip") -> ClipStore:
    return cache.open(clip, "mtcnn", "vae")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_stored_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = ClipCache(tmp_path)
    filled(cache, "clip", 3, dtype)
    store = opened(cache)
    assert sorted(store.faces) == [0, 1, 2]
    found = store.faces[2]
    assert found is not None
    np.testing.assert_array_equal(found.landmarks, face(2).landmarks)
    assert found.score == pytest.approx(0.9)
    again = store.read(1, 4)
    assert again is not None
    assert torch.equal(again, encoding(1, dtype))
    assert store.read(1, 5) is None  # encoded in a batch of another size
    assert store.read(3, 4) is None


def test_a_frame_without_a_face_is_known_as_such(tmp_path: Path) -> None:
    cache = ClipCache(tmp_path)
    opened(cache).commit({0: None, 1: face(1)}, "clip")
    assert opened(cache).faces[0] is None


def test_later_runs_add_to_what_is_there(tmp_path: Path) -> None:
    cache = ClipCache(tmp_path)
    filled(cache, "clip", 2)
    store = opened(cache)
    store.write(5, 4, encoding(5))
    store.commit(store.faces, "clip")
    again = opened(cache)
    assert [again.read(number, 4) is not None for number in (0, 1, 5)] == [True] * 3


def test_other_networks_detectors_and_clips_find_nothing(tmp_path: Path) -> None:
    cache = ClipCache(tmp_path)
    filled(cache, "clip", 2)
    assert cache.open("clip", "mtcnn", "other").read(0, 4) is None
    other = cache.open("clip", "insightface", "vae")
    assert other.faces == {}
    assert other.read(0, 4) is None
    assert opened(cache, "another").faces == {}


def test_a_file_that_changed_during_the_run_is_not_stored(tmp_path: Path) -> None:
    cache = ClipCache(tmp_path)
    store = opened(cache)
    store.write(0, 4, encoding(0))
    store.commit({0: face(0)}, "the key it has now")
    assert opened(cache).faces == {}
    assert cache.entries() == [] or cache.entries()[0].bytes == 0


def test_a_run_that_ended_early_leaves_nothing(tmp_path: Path) -> None:
    cache = ClipCache(tmp_path)
    store = opened(cache)
    store.write(0, 4, encoding(0))
    store.discard()
    assert opened(cache).read(0, 4) is None
    assert sum(entry.bytes for entry in cache.entries()) == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "nonsense"])
def test_damaged_files_are_not_used(tmp_path: Path, damage: str) -> None:
    cache = ClipCache(tmp_path)
    filled(cache, "clip", 2)
    (records,) = (cache.folder / "clip").glob("*.bin")
    data = bytearray(records.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    records.write_bytes({"flip": data, "cut": data[:-5], "nonsense": b"\x00\n"}[damage])
    (faces,) = (cache.folder / "clip").glob("*.npz")
    faces.write_bytes(faces.read_bytes()[:-30])
    store = opened(cache)
    assert store.faces == {}
    assert store.read(1, 4) is None
    if damage == "flip":  # the record before it is whole
        assert store.read(0, 4) is not None


def test_the_least_recently_used_clips_go_first(tmp_path: Path) -> None:
    size = 2 * torch.empty(SHAPE).nbytes
    for name in ("a", "b", "c"):
        filled(ClipCache(tmp_path), name, 2)
    cache = ClipCache(tmp_path, limit=4 * size)
    folders = {name: cache.folder / name for name in "abc"}

    for age, name in enumerate("bca"):  # a was used last
        os.utime(folders[name], (1000 + age, 1000 + age))
    each = max(entry.bytes for entry in cache.entries())
    ClipCache(tmp_path, limit=2 * each).shrink("a")
    assert not folders["b"].exists()
    assert folders["a"].exists()
    assert sum(entry.bytes for entry in cache.entries()) <= 2 * each
    assert cache.clear() > 0
    assert cache.entries() == []


def test_one_clip_takes_no_more_than_the_limit(tmp_path: Path) -> None:
    cache = ClipCache(tmp_path, limit=5 * torch.empty(SHAPE).nbytes)
    store = opened(cache)
    for number in range(50):
        store.write(number, 4, encoding(number))
    store.commit({}, "clip")
    assert sum(entry.bytes for entry in cache.entries()) <= cache.limit


def test_a_folder_that_cannot_be_written_costs_the_cache_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    store = opened(ClipCache(blocked))
    store.write(0, 4, encoding(0))
    store.commit({0: face(0)}, "clip")
    assert opened(ClipCache(blocked)).faces == {}


def test_clips_are_known_by_their_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one.mp4", tmp_path / "other.mp4"
    one.write_bytes(b"film")
    other.write_bytes(b"film")
    assert clip_key(one) == clip_key(other)
    other.write_bytes(b"Film")
    assert clip_key(one) != clip_key(other)
    with pytest.raises(MediaError, match=r"none\.mp4"):
        clip_key(tmp_path / "none.mp4")


def test_networks_are_known_by_their_weights_and_the_mask() -> None:
    class Vae:
        def __init__(self, bias: float) -> None:
            self.encoder = torch.nn.Linear(2, 2)
            torch.nn.init.constant_(self.encoder.weight, 1.0)
            torch.nn.init.constant_(self.encoder.bias, bias)

    cpu, mask = torch.device("cpu"), torch.ones(1, 4, 4)
    key = networks_key(Vae(0.0), mask, cpu)
    assert networks_key(Vae(0.0), mask, cpu) == key
    assert networks_key(Vae(1e-7), mask, cpu) != key
    assert networks_key(Vae(0.0), torch.zeros(1, 4, 4), cpu) != key
