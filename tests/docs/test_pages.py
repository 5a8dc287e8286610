"""What the documentation says is there: links, tables, code, commands, options, tests, examples."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import lsync_compile
from lsync_compile.cli import app
from lsync_compile.options import OPTION_NAMES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))
import hooks  # noqa: E402
import messages  # noqa: E402
import tables  # noqa: E402

PAGES = [
    ROOT / "README.md",
    ROOT / "training" / "README.md",
    ROOT / "src" / "lsync_compile" / "assets" / "mini" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# Options that the example of a pass in a distribution of its own brings.
PLUGINS = {"reshape_once"}
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def anchors(text: str) -> set[str]:
    """Of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", hooks.FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        for heading in plain
    }


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for match in hooks.LINK.finditer(hooks.FENCE.sub("", text)):
        target, _, anchor = match[2].partition("#")
        if hooks.SCHEME.match(target):
            continue
        place = page if not target else (page.parent / target).resolve()
        assert place.exists(), f"{match[2]} is not there"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place.read_text("utf-8")), f"{match[2]}: no such heading"


def test_tables_are_as_the_code_has_them() -> None:
    pages = {page.name: page.read_text("utf-8") for page in PAGES}
    stale = [name for name, text in pages.items() if tables.filled(text) != text]
    assert not stale, "run: python docs/site/tables.py"
    places = "".join(pages.values())
    assert all(f"<!-- table: {name} -->" in places for name in tables.TABLES)


def test_every_error_has_its_row_and_every_row_its_error() -> None:
    assert not messages.missing(), "add them to docs/troubleshooting.md"
    assert not messages.stale(), "take them out of docs/troubleshooting.md"


def test_a_row_stands_for_what_it_says_only() -> None:
    assert messages.matches("…: holds no weights", "…: holds no weights")
    assert messages.matches("sample: …", "sample: … channels, but the UNet takes …")
    assert not messages.matches("…: …", "…: holds no weights")
    assert not messages.matches("holds no weights", "…: holds no weights")


def python_blocks(page: Path) -> Iterator[ast.Module]:
    for language, code in BLOCK.findall(page.read_text("utf-8")):
        if language == "python":
            indent = len(code) - len(code.lstrip(" "))
            lines = [line[indent:] for line in code.splitlines()]
            yield ast.parse("\n".join(lines), filename=page.name)


@every_page
def test_python_compiles_and_its_names_exist(page: Path) -> None:
    for tree in python_blocks(page):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lsync_compile":
                assert hasattr(lsync_compile, node.attr)
            elif isinstance(node, ast.keyword) and node.arg == "options":
                keys = node.value.keys if isinstance(node.value, ast.Dict) else []
                names = {key.value for key in keys if isinstance(key, ast.Constant)}
                assert names <= {*OPTION_NAMES, *PLUGINS}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a program of ours that a page has."""
    text = page.read_text("utf-8")
    shell = [code for language, code in BLOCK.findall(text) if language in ("", "sh", "text")]
    lines = [line for code in shell for line in code.replace("\\\n", " ").splitlines()]
    lines += INLINE.findall(hooks.FENCE.sub("", text))
    for line in lines:
        line = re.sub(r"^ *(\$ )?([A-Z_]+=\S+ )*", "", line).partition(" #")[0]
        if re.match(r"lsync [a-z]+( |$)|python (benchmarks|examples|training|docs)/", line):
            try:
                yield shlex.split(re.sub(r"[…\[\]]", " ", line).rstrip("(,"))
            except ValueError:  # an inline piece of a command, cut in the middle of a string
                yield line.split()


def scripts_options(path: Path) -> set[str]:
    """Options of a script: what stands in its source, and in the helpers beside it."""
    sources = [path, *path.parent.glob("common.py"), *path.parent.glob("ablation*.py")]
    found = set(
        re.findall(r"[\"'](--?[a-z][\w-]*)", "".join(p.read_text("utf-8") for p in sources))
    )
    return found | {"--help"}


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        line = " ".join(words)
        given = {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
        if words[0] == "python":
            script = ROOT / words[1]
            assert script.is_file(), f"{line}: no such script"
            assert given <= scripts_options(script), f"{line}: {given - scripts_options(script)}"
            continue
        assert words[1] in group.commands, f"{line}: no such command"
        known = {"--help", "-h"}
        for parameter in group.commands[words[1]].params:
            known |= {*parameter.opts, *parameter.secondary_opts}
        assert given <= known, f"{line}: no option {given - known}"


def test_every_page_has_a_place_in_the_navigation() -> None:
    def files(nav: Any) -> Iterator[str]:
        for entry in nav:
            for content in entry.values():
                if isinstance(content, str):
                    yield content
                else:
                    yield from files(content)

    nav = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    assert len(nav) == len(set(nav))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(nav), "see mkdocs.yml"


def test_the_eleven_optimisations_and_their_options_exist() -> None:
    page = (ROOT / "docs" / "optimisations.md").read_text("utf-8")
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    first, second = page.split("## What each costs")
    rows = [line.split("|") for line in first.splitlines() if line.startswith("| [`")]
    assert len(rows) == 11
    for row in rows:
        name = row[1].split("`")[1]
        assert f"class {name}" in source
        assert f"| `{name}` |" in second
        assert set(re.findall(r"`(\w+)`", row[2])) <= set(OPTION_NAMES)


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a file of results."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)


def test_prices_and_gains_are_those_recorded() -> None:
    """Each figure of the overview is in a file its row links to; small integers are settings."""
    page = ROOT / "docs" / "optimisations.md"
    rows = [line for line in page.read_text("utf-8").splitlines() if "/results/" in line]
    assert len(rows) == 11
    for row in rows:
        files = [
            page.parent / match[2] for match in hooks.LINK.finditer(row) if ".json" in match[2]
        ]
        known = [
            number for file in files for number in numbers(json.loads(file.read_text("utf-8")))
        ]
        prose = re.sub(r"\(?\[[^\]]*\]\([^)]*\)|`[^`]*`", "", row)
        for text in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", prose):  # no H200
            figure = float(text.replace(",", "").rstrip("."))
            if figure.is_integer() and figure < 100:
                continue
            digits = len(text.partition("e")[0].partition(".")[2])
            style = f".{digits}e" if "e" in text else f".{digits}f"
            wanted = format(figure, style)
            assert any(format(number, style) == wanted for number in known), f"{text} in {row}"


def test_every_room_is_in_the_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = {path.parent.name for path in (ROOT / "src" / "lsync_compile").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in page} == set()
    for path in set(re.findall(r"`(\w+/[\w/]+\.py)`", page)):
        if "NAME" not in path:
            places = ROOT / path, ROOT / "src" / "lsync_compile" / path
            assert any(place.is_file() for place in places), path


def test_what_is_verified_where_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text("utf-8")
    named = dict(re.findall(r"^\| ([A-Z]\d+) \| `(.+)` \|$", page, re.MULTILINE))
    used = set(
        re.findall(r"\b[A-Z]\d+\b", page.split("## What works where")[1].split("### The")[0])
    )
    assert set(named) == used - {"H100"}
    for test in named.values():
        path, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE), test


def test_our_environment_variables_are_on_the_page() -> None:
    page = (ROOT / "docs" / "pitfalls.md").read_text("utf-8")
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    for path in sources:
        for name in re.findall(r"environ\b.{1,5}\"(LSYNC_[A-Z]+)", path.read_text("utf-8")):
            assert f"`{name}`" in page, f"{name} of {path.name}"


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for example in (ROOT / "examples").rglob("*.py"):
        relative = example.relative_to(ROOT / "examples")
        name = relative.parts[0] if len(relative.parts) > 1 else relative.name
        assert name in tests, f"no test mentions examples/{relative}"
