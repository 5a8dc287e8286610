"""News of compilations: to whom it goes, and what it says."""

from __future__ import annotations

import logging

import pytest
import torch
from captures import Attention, Pipeline, picture

import lsync_compile
from lsync_compile.progress import Compiling, announced, listening, typical_seconds

UNET = Compiling(
    "unet", "2x13x16x64x64 float16 cuda:0", 4195, typical_seconds("inductor", "cuda", 4195)
)


class Terminal:
    """Standard error as a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_times_in_words() -> None:
    assert UNET.typically == "2 min"
    assert Compiling("vae.encoder", "", 400, 14.0).typically == "14 s"
    assert typical_seconds("eager", "cuda", 4195) == 0
    assert typical_seconds("inductor", "cpu", 100) > typical_seconds("inductor", "cuda", 100)


def test_a_long_wait_is_told_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with announced(UNET):
        assert "lsync: compiling unet (2x13x16x64x64 float16" in terminal.text
        assert "4195 operations): typically 2 min" in terminal.text
    assert terminal.text.endswith("lsync: compiled unet in 0 s\n")


def test_a_short_wait_and_a_file_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="lsync_compile.progress"), announced(UNET):
        pass  # standard error is no terminal here
    assert capsys.readouterr().err == ""
    assert [line.split()[0] for line in caplog.messages] == ["compiling", "compiled"]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with announced(Compiling("module", "4", 10, 0.4)):
        pass
    assert terminal.text == ""


def test_a_failed_compilation_is_not_called_done(capsys: pytest.CaptureFixture) -> None:
    news: list[float | None] = []
    with (
        pytest.raises(RuntimeError, match="no"),
        listening(lambda compiling, seconds: news.append(seconds)),
        announced(UNET),
    ):
        raise RuntimeError("no")
    assert news == [None]


def test_a_listener_hears_of_each_graph_and_of_nothing_afterwards() -> None:
    news: list[tuple[str, bool]] = []

    def listen(compiling: Compiling, seconds: float | None) -> None:
        news.append((compiling.name, seconds is not None))

    torch._dynamo.reset()
    fast = lsync_compile.compile(Pipeline(), lowering="eager")
    with listening(listen):
        fast(picture())
        fast(picture())
    told = [(name, done) for name in ("vae.encoder", "unet", "vae.decoder") for done in (0, 1)]
    assert news == told
    with torch.no_grad():
        lsync_compile.compile(Attention().eval(), lowering="eager")(
            torch.ones(1, 4, 8, 8), torch.tensor(3)
        )
    assert news == told
