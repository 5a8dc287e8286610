"""Where everything lies that is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$LSYNC_CACHE``, or ``lsync-compile`` in the user's cache folder."""
    given = os.environ.get("LSYNC_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lsync-compile"
