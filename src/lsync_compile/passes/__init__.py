"""The passes. Importing this package registers all of them; one file holds one pass."""

from __future__ import annotations
