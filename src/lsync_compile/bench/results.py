"""One file of results that grows row by row and can be gone on with.

A section holds the rows that one machine measured of one thing. The same machine, versions and
setting go on with their section; others begin one of their own, and none is thrown away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsync_compile.errors import OptionError
from lsync_compile.files import write_whole


class Results:
    """The results on file.

    Args:
        path: JSON; made with the first row.

    Raises:
        OptionError: the file is there and is no file of results.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections: list[dict[str, Any]] = []
        if not path.exists():
            return
        try:
            self.sections = list(json.loads(path.read_text(encoding="utf-8"))["sections"])
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{path}: is no file of `lsync bench`; name another --out") from error

    def section(self, kind: str, setting: Mapping[str, Any], machine: Mapping[str, str]) -> Section:
        """The section of a kind, setting and machine, without regard to the date."""
        wanted = json.loads(json.dumps(setting)), {**machine, "date": ""}
        for content in self.sections:
            if content["kind"] != kind:
                continue
            if (content["setting"], {**content["machine"], "date": ""}) == wanted:
                return Section(self, content)
        new = {"kind": kind, "setting": wanted[0], "machine": dict(machine), "rows": []}
        return Section(self, new)

    def save(self) -> None:
        """Write the file; an existing one is replaced by a whole one only."""
        text = json.dumps({"sections": self.sections}, indent=2, allow_nan=False)
        write_whole(self.path, f"{text}\n", make_folder=True)


class Section:
    """Rows of one kind from one machine."""

    def __init__(self, results: Results, content: dict[str, Any]) -> None:
        self._results = results
        self._content = content

    @property
    def content(self) -> dict[str, Any]:
        """All that is filed of it."""
        return self._content

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._content["rows"]
        return rows

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row on file with these fields; one without figures counts as missing."""
        wanted = json.loads(json.dumps(key))
        for row in self.rows:
            if all(row.get(name) == value for name, value in wanted.items()):
                return None if {"refused", "not_measured"} & set(row) else row
        return None

    def add(self, row: Mapping[str, Any], machine: Mapping[str, str]) -> None:
        """File a row, in place of one of the same name, and write all."""
        names = [each["row"] for each in self.rows]
        new = json.loads(json.dumps(row))
        if row["row"] in names:
            self.rows[names.index(row["row"])] = new
        else:
            self.rows.append(new)
        self._content["machine"] = dict(machine)
        if not any(each is self._content for each in self._results.sections):
            self._results.sections.append(self._content)
        self._results.save()
