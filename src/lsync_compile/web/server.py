"""The server behind the page: for this machine alone unless asked otherwise, and silent.

Gradio is told not to count, report or fetch anything before it is imported; the browser is told to
talk to nobody but this server.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsync_compile.errors import OptionError
from lsync_compile.quality.extra import MissingExtraError

if TYPE_CHECKING:
    from lsync_compile.web.runner import Runner

_LOCAL = ("127.0.0.1", "localhost", "::1")
_SILENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}
# Everything from this server or from the page itself.
_POLICY = "; ".join(
    (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' blob: data:",
        "frame-ancestors 'self'",
        "form-action 'self'",
    )
)


@dataclass(frozen=True)
class Address:
    """Where the page is."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """For the browser of this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(self.host, self.host)  # noqa: S104
        return f"http://{host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether nobody else can reach it."""
        return self.host in _LOCAL


def check_extra() -> None:
    """See to it that what the page needs is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("gradio") is None:
        raise MissingExtraError("gradio is not installed; pip install 'lsync-compile[web]'")


@contextmanager
def listening_socket(host: str, port: int) -> Iterator[tuple[socket.socket, Address]]:
    """Take a port; 0 takes any that is free.

    Raises:
        OptionError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        if os.name != "nt":  # there it would share the port with another program
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
        except OSError as error:
            raise OptionError(
                f"--host {host} --port {port}: {error.strerror or error}; choose another"
            ) from error
        yield taken, Address(host, taken.getsockname()[1])


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for all files of this server, gone when it ends, and Gradio kept silent."""
    with tempfile.TemporaryDirectory(prefix="lsync-web-", ignore_cleanup_errors=True) as folder:
        settings = {**_SILENT, "GRADIO_TEMP_DIR": str(Path(folder) / "files")}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def build_app(runner: Runner, address: Address, *, about: str, preset: str, folder: Path) -> Any:
    """The page as an ASGI application.

    Args:
        runner: does the jobs.
        address: where it will be.
        about: one line on the checkpoint and the device.
        preset: which one is chosen at first.
        folder: from :func:`scratch_folder`.
    """
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from lsync_compile.web.page import CSS, SAMPLE, SCRIPT, build_page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if address.local:
        # Another page in the same browser cannot come in by a name that leads here.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    app.add_middleware(_StayHere)
    page = build_page(runner, about=about, preset=preset, folder=folder)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=address.host,
        server_port=address.port,
        allowed_paths=[str(SAMPLE), str(folder)],
        theme=gr.themes.Default(primary_hue="blue", font=["IBM Plex Sans", "sans-serif"]),
        css=CSS,
        js=SCRIPT,
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )


class _StayHere:
    """Tells browsers to talk to nobody else, in the headers of each answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def serve(app: Any, taken: socket.socket) -> None:
    """Answer until Ctrl-C."""
    import uvicorn

    # Open pages hold a connection; without a limit they would keep the server from ending.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[taken])
