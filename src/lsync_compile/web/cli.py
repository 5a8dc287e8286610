"""``lsync web``: a page to sync clips in the browser."""

from __future__ import annotations

import contextlib
import webbrowser
from typing import Annotated

import typer
from rich.console import Console

from lsync_compile.cli_options import Checkpoint, Device, NumberFormat, Resolution


def web(
    checkpoint: Checkpoint = "mini",
    resolution: Resolution = None,
    preset: Annotated[
        str, typer.Option(help="exact, balanced or turbo: the one chosen at first.")
    ] = "balanced",
    lowering: Annotated[
        str | None, typer.Option(help="inductor (default on a GPU) or eager.")
    ] = None,
    detector: Annotated[str, typer.Option(help="mtcnn or insightface.")] = "mtcnn",
    device: Device = None,
    dtype: NumberFormat = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets the whole network in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes one that is free.")
    ] = 7860,
    browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Open a page to sync clips in the browser: on this machine, with nothing sent elsewhere.

    The models are loaded once; jobs run one after the other. Uploads and results lie in a
    temporary folder for an hour at most and are gone when the server ends (Ctrl-C).
    """
    from lsync_compile import compile as recompile
    from lsync_compile.devices import choose_device
    from lsync_compile.loading import load_compiled, usual_lowering
    from lsync_compile.web.server import (
        build_app,
        check_extra,
        listening_socket,
        scratch_folder,
        serve,
    )

    check_extra()
    place = choose_device(device)
    console = Console(stderr=True)
    with listening_socket(host, port) as (taken, address), scratch_folder() as folder:
        from lsync_compile.web.runner import Runner

        named = lowering or usual_lowering(place)
        with console.status(f"Loading {checkpoint} on {place} …"):
            pipeline = load_compiled(
                checkpoint,
                preset=preset,
                lowering=named,
                device=str(place),
                dtype=dtype,
                detector=detector,
                resolution=resolution,
            )
        runner = Runner(lambda name: recompile(pipeline, preset=name, lowering=named))
        about = f"{checkpoint} on {place}"
        app = build_app(runner, address, about=about, preset=preset, folder=folder)
        typer.echo(f"{address.url}  (Ctrl-C ends it)")
        if not address.local:
            console.print(f"Whoever can reach {host} can use the page; it has no password.")
        if browser:
            webbrowser.open(address.url)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                serve(app, taken)
        finally:
            runner.close()
