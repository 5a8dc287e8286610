"""The registries are whole: what lies in a folder is in the list, and what is in the list is told.

What single passes and kernels must have is asked for beside them: `tests/passes/test_manager.py`
(file, test, option, cases in the docstring, row) and `tests/kernels/test_registry.py` (test, GPU
test, benchmark case, operator, tolerances).
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from lsync_compile.kernels.spec import registered as registered_kernels
from lsync_compile.options import Options
from lsync_compile.passes.manager import ordered
from lsync_compile.passes.spec import Pass, registered

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lsync_compile"
PASSES = registered()
KERNELS = registered_kernels()


def written() -> str:
    """The documentation without the tables that are made from the registries."""
    made = re.compile(r"<!-- table: \w+ -->.*?<!-- /table -->", re.DOTALL)
    pages = sorted((ROOT / "docs").glob("*.md"))
    return "\n".join(made.sub("", page.read_text()) for page in pages)


WRITTEN = written()


def test_every_file_that_declares_a_pass_has_it_in_the_registry() -> None:
    declaring = {
        path.stem
        for path in (SOURCE / "passes").glob("*.py")
        if re.search(r"^@register$", path.read_text(), re.M)
    }
    assert declaring == set(PASSES)
    for name, cls in PASSES.items():
        assert issubclass(cls, Pass)
        assert cls.spec.name == name
        assert not cls.spec.before  # a place of its own is for passes of other distributions


def test_the_order_has_every_pass_once_and_does_not_depend_on_theirs() -> None:
    order = [cls.spec.name for cls in ordered(PASSES.values())]
    assert sorted(order) == sorted(PASSES)
    assert order == [cls.spec.name for cls in ordered(reversed(list(PASSES.values())))]
    place = {name: index for index, name in enumerate(order)}
    for name, cls in PASSES.items():
        assert all(place[earlier] < place[name] for earlier in cls.spec.after)


def test_every_pass_is_an_option_that_says_so_and_means_compiling_anew() -> None:
    options = {field.name: field for field in fields(Options)}
    for name, cls in PASSES.items():
        metadata = options[cls.spec.option].metadata
        assert re.match(r"(Approximate p|P)ass: ", metadata["help"]), name
        assert metadata["rebuild"], name


def test_every_file_with_a_kernel_has_it_in_the_registry() -> None:
    declaring = {
        path.stem
        for path in (SOURCE / "kernels").glob("*.py")
        if re.search(r"^SPEC = register\($", path.read_text(), re.M)
    }
    assert declaring == set(KERNELS)
    for name, spec in KERNELS.items():
        assert spec.name == name
        assert callable(spec.kernel)
        assert callable(spec.reference)
        assert spec.reference is not spec.op
        assert spec.source


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_put_into_graphs_by_a_pass(name: str) -> None:
    users = [
        path.stem
        for path in (SOURCE / "passes").glob("*.py")
        if re.search(rf"\b{name}\b", path.read_text())
    ]
    assert set(users) & set(PASSES)


@pytest.mark.parametrize("name", sorted({*PASSES, *KERNELS}))
def test_the_documentation_speaks_of_it_where_no_table_is_made(name: str) -> None:
    assert re.search(rf"\b{name}\b", WRITTEN)
