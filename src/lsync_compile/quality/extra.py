"""What the extra ``quality`` adds, and the error where it is missing."""

from __future__ import annotations

import importlib.util

from lsync_compile.errors import LsyncError


class MissingExtraError(LsyncError, ImportError):
    """A package of an optional extra is not installed."""

    exit_code = 8


def require(*packages: str) -> None:
    """Check that packages of the extra ``quality`` are installed, without importing them.

    Raises:
        MissingExtraError: names the missing ones and how to install them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{', '.join(missing)} is not installed; pip install 'lsync-compile[quality]'"
        )
