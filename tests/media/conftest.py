"""Fixtures of the media tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from media_films import Film, film_maker


@pytest.fixture
def film(tmp_path: Path) -> Film:
    """A function that writes a film of numbered pictures and returns its path."""
    return film_maker(tmp_path)
