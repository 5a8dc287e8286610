"""What mkdocs does not do by itself: pages that lie elsewhere in the repository, and links to them.

The documentation is written to be read in a checkout too, so its links name files where they lie:
``../README.md``, ``../benchmarks/results/unet_step.json``. Here such files become pages or files of
the site, and links are turned to them. A link to a file that does not exist fails a strict build.

mkdocs calls the functions whose names begin with ``on_``; nothing here imports mkdocs before.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Pages of the site that lie outside docs/, by their path in the repository.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "training/README.md": "training.md",
    "examples/third_party_pass/README.md": "third-party-pass.md",
    "src/lsync_compile/assets/mini/README.md": "mini-model.md",
    "benchmarks/results": "results.md",  # made by results_page()
}
FENCE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^()\s]+)((?:[ \t]+\"[^\"]*\")?\))")
SCHEME = re.compile(r"[a-z]+:")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from elsewhere, and every file outside docs/ that a page links to."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    files.append(File.generated(config, "results.md", content=results_page()))
    pages = [file for file in files if file.src_uri.endswith(".md")]
    outside = {
        target
        for page in pages
        for target in linked(page.content_string, repository_path(page.src_uri))
        if not target.startswith("docs/") and target not in PAGES and (ROOT / target).is_file()
    }
    for target in sorted(outside):
        files.append(File.generated(config, address(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository to links between pages of the site."""
    source = repository_path(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or SCHEME.match(target):
            return match[0]
        path = resolve(target, source)
        place = address(path) + (f"#{anchor}" if anchor else "")
        return match[1] + place + match[3]

    return outside_fences(markdown, lambda text: LINK.sub(turned, text))


def address(path: str) -> str:
    """Where a file of the repository is on the site; a page of none is a text there."""
    if path in PAGES or path.startswith("docs/"):
        return PAGES.get(path, path.removeprefix("docs/"))
    return f"{path}.txt" if path.endswith(".md") else path


def repository_path(page: str) -> str:
    """Where the source of a page of the site lies in the repository."""
    return next((source for source, name in PAGES.items() if name == page), f"docs/{page}")


def resolve(target: str, source: str) -> str:
    """A link's path in the repository, given that of the file it stands in."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def linked(markdown: str, source: str) -> set[str]:
    """Paths in the repository that a page links to, other sites and places on it left out."""
    targets: set[str] = set()

    def gather(text: str) -> str:
        for match in LINK.finditer(text):
            target = match[2].partition("#")[0]
            if target and not SCHEME.match(target):
                targets.add(resolve(target, source))
        return text

    outside_fences(markdown, gather)
    return targets


def outside_fences(markdown: str, change: Any) -> str:
    """Apply ``change`` to the text between code blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def results_page() -> str:
    """A table of the recorded results: what was asked, of which device, when."""
    lines = [
        "# Recorded results",
        "",
        "Every figure in this documentation is from one of these files, which scripts in"
        " `benchmarks/` wrote.",
        "",
        "| file | question | device | torch | date |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file in sorted((ROOT / "benchmarks" / "results").rglob("*.json")):
        content = json.loads(file.read_text("utf-8"))
        machine = content.get("machine", {}) if isinstance(content, dict) else {}
        name = file.relative_to(ROOT).as_posix()
        cells = [
            f"[{file.name}]({Path('..', name).as_posix()})",
            content.get("question", "") if isinstance(content, dict) else "",
            machine.get("device", machine.get("cpu", "")),
            machine.get("torch", ""),
            machine.get("date", content.get("date", "") if isinstance(content, dict) else ""),
        ]
        cells[-1] = str(cells[-1]).replace("-", "\N{NON-BREAKING HYPHEN}")
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
