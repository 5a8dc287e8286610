"""Whatever is typed: an exit code from the list, one clear line, no traceback, no file harmed."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from fuzzing import few
from hypothesis import given
from hypothesis import strategies as st

from lsync_compile import cli
from lsync_compile.errors import CheckpointError, LsyncError, MediaError, OptionError
from lsync_compile.jobs import read_jobs
from lsync_compile.models.pipeline import LatentSyncPipeline

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]

# As README and docs/robustness.md have them.
CODES = {0, 1, 2, 3, 4, 5, 6, 7, 75, 130}
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
OPTIONS = {
    name: [option for each in command.params for option in each.opts if option.startswith("--")]
    for name, command in COMMANDS.items()
}
words = st.one_of(
    st.sampled_from(
        ["0", "1", "-1", "4", "nan", "inf", "1e400", "9" * 20, "", " ", "-", "--", "x"]
    ),
    st.sampled_from(["exact", "eager", "cpu", "cuda:99", "meta", "mini", "float16", "mtcnn"]),
    st.sampled_from(["clip.mp4", "speech.wav", "none.mp4", ".", "/", "a\0b", "a\nb", "\udcff"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """A function that runs ``lsync`` with arguments: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lsync", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code
        captured = capsys.readouterr()
        return (code or 0), captured.out, captured.err

    return run


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end where they would load a model or begin to measure."""

    def refuse(*_: object, **__: object) -> None:
        raise CheckpointError("stand-in: there are no models")

    monkeypatch.setattr(LatentSyncPipeline, "from_pretrained", refuse)
    monkeypatch.setattr("lsync_compile.bench.command.run", refuse)
    monkeypatch.setattr("lsync_compile.doctor.examine", list)
    monkeypatch.setenv("LSYNC_CACHE", str(tmp_path / "cache"))


def check(code: int, errors: str) -> None:
    assert code in CODES, errors
    assert "Traceback" not in errors
    ours = [line for line in errors.splitlines() if line.startswith("lsync: ")]
    assert len(ours) <= 1, errors
    if code not in (0, 1, 2, 75):
        assert ours == errors.splitlines(), errors


@few(50)
@given(data=st.data())
@pytest.mark.usefixtures("no_models")
def test_any_arguments(call: Call, tmp_path: Path, make_clip: Maker, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(set(COMMANDS) - {"web"})))  # which waits for visitors
    arguments: list[str] = []
    for _ in range(data.draw(st.integers(0, 6))):
        if data.draw(st.booleans()):
            arguments.append(data.draw(st.sampled_from(OPTIONS[name])))
        arguments.append(data.draw(words))
    out = tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    where = Path.cwd()
    os.chdir(tmp_path)  # the default names of files are here
    try:
        code, _, errors = call(name, *arguments)
    finally:
        os.chdir(where)
    check(code, errors)
    assert out.read_bytes() == b"precious"


@few(8)
@given(data=st.data())
def test_any_numbers_for_a_run(
    call: Call,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    data: st.DataObject,
) -> None:
    """Through to the networks."""
    number = st.sampled_from(["0", "1", "2", "-1", "17", "0.5", "nan", "inf", "1e9", "2" * 30])
    arguments = [
        f"--{name}={data.draw(number)}"
        for name in ("guidance", "num-frames", "max-frames", "seed")
        if data.draw(st.booleans())
    ]
    out = tmp_path_factory.mktemp("out") / "out.mp4"
    out.write_bytes(b"precious")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentSyncPipeline, "from_pretrained", lambda *_, **__: tiny_pipeline)
        files = (make_clip(2), make_speech(0.08))
        code, text, errors = call(
            "sync", *files, "-o", out, "--steps=1", "-q", "--no-compile", *arguments
        )
    check(code, errors)
    assert text == ""
    assert (out.read_bytes() == b"precious") == (code != 0)
    assert [each.name for each in out.parent.iterdir()] == ["out.mp4"]


cells = st.one_of(
    st.sampled_from(["clip.mp4", "speech.wav", "out.mp4", "../x", "/", "", " ", ".", "a\nb", "é"]),
    st.text(max_size=6),
)


@few(100)
@given(
    rows=st.lists(st.lists(cells, max_size=5), max_size=5),
    head=st.one_of(st.just(["video", "audio", "output"]), st.lists(cells, max_size=4)),
    raw=st.one_of(st.none(), st.binary(max_size=30)),
)
def test_any_list_of_jobs(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[str]],
    head: list[str],
    raw: bytes | None,
) -> None:
    path = tmp_path_factory.mktemp("list") / "list.csv"
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    content = text.getvalue().encode("utf-8", "surrogatepass")
    path.write_bytes(content if raw is None else content[: len(raw)] + raw)
    jobs, said = [], ""
    try:
        jobs = read_jobs(path)
    except (OptionError, MediaError) as error:
        said = str(error)
    assert bool(jobs) != bool(said)
    assert len({job.output for job in jobs}) == len(jobs)
    assert all(job.line > 1 for job in jobs)
    assert not said or str(path) in said


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--device", "meta"), 2, "--device meta"),
        (("--device", "cpu:3"), 2, "--device cpu:3"),
        (("--report", "no/where.json"), 3, "--report no/where.json"),
        (("--report", "."), 3, "--report .: is a folder"),
        (("--trace", "no/where.json"), 2, "trace no/where.json: the folder no does not exist"),
        (("--trace", "trace.txt"), 2, "trace trace.txt: the name must end in"),
        (("--seed", "1" * 30), 2, "--seed"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(
    call: Call, arguments: tuple[str, ...], code: int, said: str
) -> None:
    found, _, errors = call("sync", "clip.mp4", "speech.wav", *arguments)
    assert found == code
    assert said in " ".join(errors.split())


@pytest.mark.parametrize("guidance", ["nan", "inf", "-inf"])
def test_guidance_is_a_number(
    call: Call,
    tiny_pipeline: LatentSyncPipeline,
    monkeypatch: pytest.MonkeyPatch,
    make_clip: Maker,
    make_speech: Maker,
    guidance: str,
) -> None:
    monkeypatch.setattr(LatentSyncPipeline, "from_pretrained", lambda *_, **__: tiny_pipeline)
    words = ("--guidance", guidance, "--no-compile", "-q")
    code, _, errors = call("sync", make_clip(2), make_speech(0.08), *words)
    assert (code, errors) == (2, f"lsync: guidance_scale must be a finite number, not {guidance}\n")


def test_a_missing_mask_is_one_line(
    tiny_pipeline: LatentSyncPipeline,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
) -> None:
    """Also on the level of the system: OpenCV has lines of its own."""
    monkeypatch.setattr(LatentSyncPipeline, "from_pretrained", lambda *_, **__: tiny_pipeline)
    monkeypatch.setattr(
        sys, "argv", ["lsync", "sync", str(make_clip(2)), str(make_speech(0.08)), "-q"]
    )
    for mask in (tmp_path / "none.png", make_clip(2), tmp_path):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [*sys.argv[:5], "--no-compile", "--mask", str(mask)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert leaving.value.code == 5
        assert capfd.readouterr().err.count("\n") == 1


def test_line_breaks_in_names_do_not_break_the_line(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LsyncError("a\nb \x1b[2J \udcff 口: no such file")

    monkeypatch.setattr(LatentSyncPipeline, "from_pretrained", refuse)
    _, _, errors = call("sync", "clip.mp4", "speech.wav", "-q")
    assert errors == "lsync: a\\nb \\x1b[2J \\udcff 口: no such file\n"
