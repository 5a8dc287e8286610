"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lsync_compile.files import partial_name, remove_partials, replaced


def test_a_file_is_replaced_when_the_block_ends_well_and_stays_when_it_does_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.json"
    with replaced(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    with pytest.raises(TypeError), replaced(path) as partial:
        partial.write_bytes("no bytes")  # type: ignore[arg-type]
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_file_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path, other = tmp_path / "a[1].mp4", tmp_path / "a.mp4"
    left = partial_name(path)
    theirs = left.with_name(left.name.replace(f".{os.getpid()}-", f".{os.getpid()}1-"))
    kept = [path, other, partial_name(other), theirs]
    for each in (left, *kept):
        each.write_bytes(b"")
    remove_partials(path, os.getpid())
    assert sorted(tmp_path.iterdir()) == sorted(kept)
