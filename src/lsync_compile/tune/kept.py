"""Trials on file, so that a search that was cut off goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lsync_compile.errors import MediaError
from lsync_compile.tune.search import Measure, Measured, Options


class KeptTrials:
    """A file with a line for what was measured, and one for each measurement.

    Args:
        path: the file; what is in it of something else is not kept.
        subject: all that measurements depend on, as plain values.
    """

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        self.path = path
        self._head = json.dumps({"subject": subject}, sort_keys=True)
        self._known = self._read()

    def __len__(self) -> int:
        return len(self._known)

    def once(self, what: str, measure: Measure) -> Measure:
        """The same function, but what it found before is taken from the file.

        Args:
            what: is measured by it, such as "tuned".
            measure: called for the rest.
        """

        def run(name: str, options: Options) -> Measured:
            key = json.dumps([what, options], sort_keys=True)
            if key not in self._known:
                self._known[key] = measure(name, options)
                self._write({"what": what, "options": options}, self._known[key])
            return self._known[key]

        return run

    def remove(self) -> None:
        """The search is over: the next one measures anew."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Measured]:
        try:
            head, *lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return {}
        if head != self._head:
            return {}
        known = {}
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # cut off in the middle of a line
                break
            key = json.dumps([row["what"], row["options"]], sort_keys=True)
            known[key] = Measured.from_dict(row["measured"])
        return known

    def _write(self, about: dict[str, Any], measured: Measured) -> None:
        """Add a line; all of the file where there is no line yet."""
        line = json.dumps({**about, "measured": measured.to_dict()}, allow_nan=False)
        first = len(self._known) == 1
        try:
            with self.path.open("w" if first else "a", encoding="utf-8") as file:
                file.write((f"{self._head}\n" if first else "") + f"{line}\n")
        except OSError as error:
            raise MediaError(f"{self.path}: cannot be written: {error.strerror}") from error
