"""Stand-ins for installed distributions that enter passes: files on the path, nothing is built."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lsync_compile.entry_points import GROUP, entered
from lsync_compile.passes import plugins

# A pass that adds nothing to what it is given; tests fill in the rest.
MODULE = """
from lsync_compile.passes.spec import Pass, PassSpec, Phase

def rename(graph):
    next(iter(graph.nodes)).name = "other"

class Made(Pass):
    spec = PassSpec(name={name!r}, phase=Phase.{phase}, summary="A test's.", {fields})

    def rewrite(self, gm, context):
        {body}
"""

Install = Callable[..., str]


def forget() -> None:
    """Make lsync look for distributions again."""
    importlib.invalidate_caches()
    entered.cache_clear()
    plugins._loaded.clear()
    plugins._warned.clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A function that puts a distribution with one pass on the path."""
    made: list[str] = []

    def put(
        name: str,
        *,
        distribution: str = "some-passes",
        version: str = "1.2",
        module: str | None = None,
        text: str | None = None,
        phase: str = "REWRITE",
        fields: str = "",
        body: str = "return 0",
        called: str | None = None,
    ) -> str:
        """The module's name.

        Args:
            name: of the entry point.
            text: of the module; by default a pass of the other arguments.
            called: the name in the pass's declaration, if it is another one.
        """
        module = module or f"{distribution}_{name}_module".replace("-", "_").replace(" ", "_")
        folder = tmp_path / f"{distribution}-{version}"
        folder.mkdir(exist_ok=True)
        plain = MODULE.format(name=called or name, phase=phase, fields=fields, body=body)
        (folder / f"{module}.py").write_text(plain if text is None else text)
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        about = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(about)
        with (info / "entry_points.txt").open("a") as file:
            if not file.tell():
                file.write(f"[{GROUP}]\n")
            file.write(f"{name} = {module}:Made\n")
        if str(folder) not in sys.path:
            monkeypatch.syspath_prepend(folder)
        sys.modules.pop(module, None)
        made.append(module)
        forget()
        return module

    forget()
    yield put
    for module in made:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    forget()
