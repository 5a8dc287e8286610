"""Which error messages the page on troubleshooting leaves out, and which of its rows are stale.

Messages are read from the source: the text of each ``LsyncError`` that is made there, with ``…``
for what is filled in. A row of the page stands for all messages that it matches, ``…`` being
anything.

``python docs/site/messages.py`` prints both lists; a test holds them empty.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "lsync_compile"
PAGE = ROOT / "docs" / "troubleshooting.md"
CELL = re.compile(r"^\| (`.+?`) \|", re.MULTILINE)
CODE = re.compile(r"(?<!`)(`+) ?(.+?) ?\1(?!`)")
NOTES = "## Warnings and notes"  # from here on the page is about what is no error
FEWEST_LETTERS = 9  # a row with fewer that begins with anything would match anything


@functools.cache
def source() -> dict[Path, ast.Module]:
    """Every module of the package, parsed."""
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


@functools.cache
def messages() -> dict[str, str]:
    """Each message that the source can raise, to where it stands."""
    trees = source()
    kinds = _error_classes(trees)
    found: dict[str, str] = {}
    for path, tree in trees.items():
        for call in _made(tree, kinds):
            text = _text(call.args[0]) if call.args else None
            if text is not None:
                where = f"{path.relative_to(SOURCE)}:{call.lineno}"
                found.setdefault(re.sub("…+", "…", text), where)
    return found


def rows() -> list[str]:
    """The errors in the first column of the page's tables."""
    errors = PAGE.read_text("utf-8").partition(NOTES)[0]
    return [code[2] for cell in CELL.findall(errors) for code in CODE.finditer(cell)]


def notes() -> list[str]:
    """The texts in the first column of the table of notes."""
    table = PAGE.read_text("utf-8").partition(NOTES)[2]
    return [code[2] for cell in CELL.findall(table) for code in CODE.finditer(cell)]


def matches(row: str, message: str) -> bool:
    """Whether a row of the page stands for a message."""
    if row == message:
        return True
    if row.startswith("…") and sum(map(str.isalpha, row)) < FEWEST_LETTERS:
        return False
    pattern = ".+".join(re.escape(part) for part in row.split("…"))
    return re.fullmatch(pattern, message, re.DOTALL) is not None


def missing() -> list[str]:
    """Messages for which the page has no row, with their places."""
    known = rows()
    return [
        f"{where}: {message}"
        for message, where in messages().items()
        if not any(matches(row, message) for row in known)
    ]


def stale() -> list[str]:
    """Rows of the page for which the source has no message, or no text."""
    found = messages()
    errors = [row for row in rows() if not any(matches(row, message) for message in found)]
    texts = "\n".join(
        text.replace("%s", "…")
        for tree in source().values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and (text := _text(node))
    )
    return errors + [note for note in notes() if not all(part in texts for part in note.split("…"))]


def _error_classes(trees: dict[Path, ast.Module]) -> set[str]:
    """Names of ``LsyncError`` and all classes derived from it."""
    classes = [
        (node.name, {ast.unparse(base).rpartition(".")[2] for base in node.bases})
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    kinds = {"LsyncError"}
    while more := {name for name, bases in classes if bases & kinds} - kinds:
        kinds |= more
    return kinds


def _made(tree: ast.Module, kinds: set[str]) -> Iterator[ast.Call]:
    """Calls that make an error, and those by which an error's class makes its own message."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func).rpartition(".")[2] in kinds:
                yield node
        elif isinstance(node, ast.ClassDef) and node.name in kinds:
            yield from (
                call
                for call in ast.walk(node)
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__"
            )


def _text(node: ast.expr) -> str | None:
    """A string's text, with ``…`` for what is filled in; None for what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or "…") + (_text(node.right) or "…")
    return None


def main() -> int:
    """Print what is missing and what is stale."""
    for title, lines in (("not on the page", missing()), ("no longer raised", stale())):
        for line in lines:
            print(f"{title}: {line}")
    return 1 if missing() or stale() else 0


if __name__ == "__main__":
    sys.exit(main())
