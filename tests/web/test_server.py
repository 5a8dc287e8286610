"""Where the page is, and what is said where it cannot be."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lsync_compile import cli
from lsync_compile.errors import OptionError
from lsync_compile.quality.extra import MissingExtraError
from lsync_compile.web.server import Address, check_extra, listening_socket, scratch_folder


def without_gradio(name: str, *rest: Any) -> Any:
    return None if name == "gradio" else FIND_SPEC(name, *rest)


FIND_SPEC: Callable[..., Any] = importlib.util.find_spec


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsync_compile.web.server.find_spec", without_gradio)
    with pytest.raises(MissingExtraError, match=r"pip install 'lsync-compile\[web\]'"):
        check_extra()
    result = CliRunner().invoke(cli.app, ["web"])
    assert isinstance(result.exception, MissingExtraError)


def test_a_port_that_is_taken_is_one_line() -> None:
    with listening_socket("127.0.0.1", 0) as (taken, address):
        taken.listen()
        assert address.port > 0
        with (
            pytest.raises(OptionError, match=rf"--port {address.port}: .*choose another") as caught,
            listening_socket("127.0.0.1", address.port),
        ):
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "url", "local"),
    [
        ("127.0.0.1", "http://127.0.0.1:80", True),
        ("localhost", "http://localhost:80", True),
        ("0.0.0.0", "http://127.0.0.1:80", False),
        ("::1", "http://[::1]:80", True),
        ("192.168.1.2", "http://192.168.1.2:80", False),
    ],
)
def test_the_address_for_the_browser(host: str, url: str, local: bool) -> None:
    assert (Address(host, 80).url, Address(host, 80).local) == (url, local)


def test_the_folder_and_the_settings_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    before = dict(os.environ)
    with scratch_folder() as folder:
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert Path(os.environ["GRADIO_TEMP_DIR"]).parent == folder
        (folder / "files").mkdir()
        (folder / "files" / "clip.mp4").write_bytes(b"x")
    assert not folder.exists()
    assert dict(os.environ) == before


def test_the_default_is_this_machine_only() -> None:
    parameters = {each.name: each.default for each in web_parameters()}
    assert parameters["host"] == "127.0.0.1"
    assert parameters["browser"] is False


def web_parameters() -> list[Any]:
    import typer

    return typer.main.get_command(cli.app).commands["web"].params  # type: ignore[attr-defined]
