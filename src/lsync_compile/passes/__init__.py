"""The passes. Importing this package registers all of them; one file holds one pass."""

from __future__ import annotations

from lsync_compile.passes import remove_noops, share_repeated

__all__ = ["remove_noops", "share_repeated"]
