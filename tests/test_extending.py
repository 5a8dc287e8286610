"""The page on passes of one's own: its kernel runs, and what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lsync_compile.entry_points import GROUP
from lsync_compile.passes.spec import Phase

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLE = ROOT / "examples" / "third_party_pass"

CHECK = """
import torch
from page_kernel import quick_gelu, quick_gelu_reference
from lsync_compile.kernels.launch import runs_kernel

for dtype in (torch.float32, torch.float16):
    x = torch.randn(3, 700, dtype=dtype).t()
    assert runs_kernel(x)
    out = quick_gelu(x)
    torch.testing.assert_close(out, quick_gelu_reference(x.double()).to(dtype))
torch.library.opcheck(quick_gelu, (x,))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_kernel_runs_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="kernels need Triton")
    (kernel,) = (block for block in blocks("python") if "@kernel(" in block)
    (tmp_path / "page_kernel.py").write_text(kernel)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", CHECK], env=environment, cwd=tmp_path, check=True)


def test_the_example_is_what_the_page_shows() -> None:
    source = (EXAMPLE / "src" / "lsync_reshape_once" / "__init__.py").read_text()
    shown = next(block for block in blocks("python") if "class ReshapeOnce" in block)
    declaration = shown[shown.index("    spec = ") : shown.index("    def rewrite")]
    assert declaration.rstrip() in source
    project = (EXAMPLE / "pyproject.toml").read_text()
    (toml,) = blocks("toml")
    assert all(line in project.splitlines() for line in toml.splitlines())
    assert f'[project.entry-points."{GROUP}"]' in toml


def test_the_phases_are_in_order() -> None:
    named = ", ".join(f"`{phase.name}`" for phase in Phase).replace(", `FINISH`", " or `FINISH`")
    assert named in PAGE
