"""The tables in the documentation that are made from the code.

A page has the place of a table between two comments::

    <!-- table: options -->
    <!-- /table -->

``python docs/site/tables.py`` writes the tables into their places; with ``--check`` it only says
which pages are out of date. A test runs the check.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from lsync_compile import errors
from lsync_compile.cli import app
from lsync_compile.combinations import exclusions_table
from lsync_compile.kernels.spec import kernels_table
from lsync_compile.options import OPTION_NAMES, PRESETS, options_table
from lsync_compile.passes.spec import passes_table

DOCS = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

# Headings of the options' page, with how the names of their options begin; what fits none of them
# comes first.
GROUPS: dict[str, tuple[str, ...]] = {
    "What runs, and what happens when it cannot": (),
    "Exact passes": (
        "remove_noops",
        "share_repeated",
        "kernels",
        "fuse_",
        "channels_last",
        "guidance_prefix",
        "null_audio",
        "split_conv_in",
        "choose_sdpa",
    ),
    "Computed once": ("hoist_",),
    "Deep features from an earlier step": ("deep_cache",),
    "Steps and chunks": (
        "few_steps",
        "guided_steps",
        "adaptive_",
        "temporal_",
        "scene_cut",
        "solver",
        "batch_chunks",
        "batch_memory_gib",
        "speculate",
    ),
    "Less than the whole picture, fewer bits": ("lip_", "crop_", "fp8_linear"),
    "Stages, faces and clips": (
        "parallel_stages",
        "batch_faces",
        "face_",
        "track_faces",
        "clip_cache",
    ),
    "Watching": ("guard_", "trace", "dump_dir"),
}


def grouped_options() -> str:
    """The options' table, cut into groups."""
    header, rule, *rows = options_table().splitlines()
    by_name = dict(zip(OPTION_NAMES, rows, strict=True))
    first = next(iter(GROUPS))
    members: dict[str, list[str]] = {title: [] for title in GROUPS}
    for name, row in by_name.items():
        title = next((t for t, starts in GROUPS.items() if name.startswith(starts)), first)
        members[title].append(row)
    parts = [
        "\n".join([f"## {title}", "", header, rule, *rows])
        for title, rows in members.items()
        if rows
    ]
    return "\n\n".join(parts) + "\n"


def presets_table() -> str:
    """What each preset sets."""
    names = list(dict.fromkeys(name for settings in PRESETS.values() for name in settings))
    lines = [
        "| option | " + " | ".join(f"`{preset}`" for preset in PRESETS) + " |",
        "| --- |" + " --- |" * len(PRESETS),
    ]
    for name in names:
        cells = [f"`{settings[name]}`" if name in settings else "" for settings in PRESETS.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def commands() -> Iterator[tuple[str, Any]]:
    """The sub-commands of ``lsync`` by name, as click sees them."""
    group: Any = typer.main.get_command(app)
    yield from group.commands.items()


def commands_tables() -> str:
    """A heading and a table of arguments and options for each command."""
    return "\n".join(_command_table(name, command) for name, command in commands())


def _command_table(name: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    usage = " ".join(
        [each.name.upper() if each.required else f"[{each.name.upper()}]" for each in arguments]
    )
    purpose = (command.help or "").split("\n\n")[0].replace("\n", " ").strip()
    lines = [
        f"### `lsync {name}`",
        "",
        purpose,
        "",
        "```text",
        f"lsync {name} {usage + ' ' if usage else ''}[OPTIONS]",
        "```",
        "",
        "| argument or option | default | what it says |",
        "| --- | --- | --- |",
    ]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        label = "`" + "`, `".join(_spellings(parameter)) + "`"
        lines.append(f"| {label} | {_default(parameter)} | {_cell(parameter.help)} |")
    return "\n".join(lines) + "\n"


def _spellings(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [parameter.name.upper()]
    return [*parameter.opts, *parameter.secondary_opts]


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required or value is None or value is False or callable(value):
        return "required" if parameter.required else ""
    if isinstance(value, (list, tuple)):
        return ", ".join(f"`{getattr(each, 'value', each)}`" for each in value)
    return f"`{getattr(value, 'value', value)}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def exit_codes() -> str:
    """What the exit codes of ``lsync`` mean."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LsyncError)
    ]
    lines = ["| code | error | meaning |", "| --- | --- | --- |"]
    for kind in sorted(kinds, key=lambda kind: kind.exit_code):
        meaning = (kind.__doc__ or "").split("\n")[0]
        if kind is errors.LsyncError:
            meaning = "Any other error of this package, and clips of a list that failed."
        lines.append(f"| {kind.exit_code} | `{kind.__name__}` | {meaning} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands_tables,
    "exclusions": exclusions_table,
    "exit_codes": exit_codes,
    "kernels": kernels_table,
    "options": grouped_options,
    "passes": passes_table,
    "presets": presets_table,
}


def filled(page: str) -> str:
    """The text of a page with its tables as they are now."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]().rstrip()}\n\n{match[3]}"

    return PLACE.sub(table, page)


def main(arguments: list[str]) -> int:
    """Write the tables, or say where that is needed."""
    stale = []
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text("utf-8")
        after = filled(before)
        if after == before:
            continue
        stale.append(path.name)
        if "--check" not in arguments:
            path.write_text(after, "utf-8")
    verb = "out of date" if "--check" in arguments else "written"
    print("\n".join(f"{name}: {verb}" for name in stale) or "all tables are as the code has them")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
