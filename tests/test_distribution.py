"""What is shipped: the sdist is the checkout, the wheel has the model, and there is one version."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lsync_compile

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {".gitignore"}  # of no use without a repository


def tracked() -> list[Path]:
    """The files of the repository that are here, relative to its root."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository: what belongs to it is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of the repository, and a wheel built from that sdist."""
    for name in ("build", "setuptools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'lsync-compile[test]'")
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.mark.slow
def test_the_sdist_has_every_file_of_the_repository(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(name) for name in tracked()} - names == LEFT_OUT
    assert not [name for name in names if "__pycache__" in name or ".hypothesis" in name]


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        about = archive.read(f"{info}/METADATA").decode()
    package = {name.relative_to("src") for name in tracked() if name.parts[0] == "src"}
    shipped = {Path(name) for name in names if not name.startswith(info)}
    assert shipped == package
    assert Path("lsync_compile/assets/mini/unet.safetensors") in shipped
    assert Path("lsync_compile/assets/sample/talking.mp4") in shipped
    assert "lsync = lsync_compile.cli:main" in entry_points
    assert "[torch_dynamo_backends]\nlsync = lsync_compile.backend:lsync" in entry_points
    assert f"\nVersion: {lsync_compile.__version__}\n" in about
    assert f"{info}/licenses/LICENSE" in names


def test_there_is_one_version() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert re.search(r"^version = \{ attr = \"lsync_compile.__version__\" \}", project, re.M)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == lsync_compile.__version__
    assert importlib.metadata.version("lsync-compile") == lsync_compile.__version__


def test_every_target_of_the_makefile_exists_and_is_phony() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony is not None
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert set(phony[1].split()) == targets
