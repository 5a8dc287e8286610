"""Errors that a user can act on.

Every message is one line: what is wrong, with the option, file or frame in question, and what to
do about it. The command line prints it and leaves with ``exit_code``.
"""

from __future__ import annotations


class LsyncError(Exception):
    """Base class of all errors raised on purpose by lsync-compile."""

    exit_code: int = 1


class OptionError(LsyncError, ValueError):
    """An option or argument has an unknown name, a wrong type or a value outside its range."""

    exit_code = 2


class MediaError(LsyncError):
    """A video or audio file cannot be read or written."""

    exit_code = 3


class NoFaceError(LsyncError):
    """No frame, or a frame that had to, shows a usable face."""

    exit_code = 4


class CheckpointError(LsyncError):
    """A checkpoint is missing, unreadable or does not fit its configuration."""

    exit_code = 5


class MemoryLimitError(LsyncError):
    """The device has not enough memory for the smallest unit of work."""

    exit_code = 6


class CompileError(LsyncError):
    """A graph could not be captured, rewritten or lowered (raised with ``strict=True`` only)."""

    exit_code = 7


class Interrupted(LsyncError):  # noqa: N818  an interrupt is no error of anyone's
    """The user stopped the work; what was under way is discarded."""

    exit_code = 130  # what a shell gives after Ctrl-C
