"""ComfyUI as far as nodes see it: its checks, the way it calls them, the modules it has loaded.

Written from what ComfyUI 0.3 documents and does: widgets are checked against ``INPUT_TYPES``, then
``VALIDATE_INPUTS`` is asked; a node object is made once and called with keywords, in a thread of
its own and in inference mode; results are a tuple in the order of ``RETURN_TYPES``, or a dictionary
with "ui" and "result"; the exception of Cancel is no ``Exception``.
"""

from __future__ import annotations

import inspect
import io
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import pytest
import torch

WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class InterruptProcessingException(BaseException):
    """Raised where the user has pressed Cancel."""


class RefusedError(Exception):
    """The workflow does not pass the checks; nothing runs."""


@dataclass(frozen=True)
class Link:
    """The output of another node."""

    type: str
    value: Any


@dataclass
class Host:
    """A running ComfyUI.

    Attributes:
        root: holds input, output, temp and models.
        bars: what each progress bar was told.
        cancel_at: the call of the interruption check that finds Cancel pressed.
        unloaded: how often the GPU was cleared of other models.
    """

    root: Path
    bars: list[list[tuple[int, int]]] = field(default_factory=list)
    cancel_at: int | None = None
    checks: int = 0
    unloaded: int = 0

    def modules(self) -> dict[str, ModuleType]:
        host = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.told: list[tuple[int, int]] = []
                self.total = total
                host.bars.append(self.told)

            def update_absolute(
                self, value: int, total: int | None = None, preview: Any = None
            ) -> None:
                self.total = self.total if total is None else total
                self.told.append((value, self.total))

        def check() -> None:
            self.checks += 1
            if self.checks == self.cancel_at:
                raise InterruptProcessingException

        def unload() -> None:
            self.unloaded += 1

        names = ("input", "output", "temp")
        for name in (*names, "models"):
            (self.root / name).mkdir(exist_ok=True)
        management = {
            "throw_exception_if_processing_interrupted": check,
            "unload_all_models": unload,
            "soft_empty_cache": lambda: None,
        }
        paths = {
            f"get_{name}_directory": (lambda name=name: str(self.root / name)) for name in names
        }
        impl = type("InputImpl", (), {"VideoFromFile": VideoFromFile})
        return {
            "comfy": _module("comfy"),
            "comfy.utils": _module("comfy.utils", ProgressBar=ProgressBar),
            "comfy.model_management": _module("comfy.model_management", **management),
            "folder_paths": _module("folder_paths", models_dir=str(self.root / "models"), **paths),
            "comfy_api": _module("comfy_api"),
            "comfy_api.latest": _module("comfy_api.latest", InputImpl=impl),
        }


class VideoFromFile:
    """A VIDEO that is a file, of which a part may be shown."""

    def __init__(self, file: Any, *, duration: float = 0) -> None:
        self.file, self.duration, self.saved = file, duration, 0

    def get_stream_source(self) -> Any:
        if isinstance(self.file, io.BytesIO):
            self.file.seek(0)
        return self.file

    def get_dimensions(self) -> tuple[int, int]:
        with av.open(self.get_stream_source()) as container:
            track = container.streams.video[0]
            return track.width, track.height

    def get_duration(self) -> float:
        with av.open(self.get_stream_source()) as container:
            return self.duration or container.duration / av.time_base

    def save_to(self, path: str) -> None:
        """Write the part that is shown."""
        self.saved += 1
        with av.open(self.get_stream_source()) as source, av.open(path, "w") as target:
            copied = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.pts is not None and packet.pts * packet.time_base < self.duration:
                    packet.stream = copied
                    target.mux(packet)


def installed(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Make the host's modules the loaded ones."""
    for name, module in host.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return host


def execute(node: type, values: dict[str, Any], object_of: dict[type, Any] | None = None) -> tuple:
    """Check the inputs as a prompt's and run the node on them; gives its results.

    Raises:
        RefusedError: the checks fail.
    """
    _validate(node, values)
    objects = {} if object_of is None else object_of
    instance = objects.setdefault(node, node())
    given = {
        name: value.value if isinstance(value, Link) else value for name, value in values.items()
    }
    outcome: list[Any] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                outcome.append(getattr(instance, node.FUNCTION)(**given))
        except BaseException as error:  # noqa: BLE001, raised again below
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    if isinstance(result, dict):
        assert set(result) <= {"ui", "result"}
        assert all(isinstance(shown, list) for shown in result["ui"].values())
        result = result["result"]
    assert isinstance(result, tuple)
    assert len(result) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return result


def _validate(node: type, values: dict[str, Any]) -> None:
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"}
    known = {**inputs["required"], **inputs.get("optional", {})}
    for name in inputs["required"]:
        if name not in values:
            raise RefusedError(f"Required input is missing: {name}")
    for name, value in values.items():
        kind, settings = known[name][0], known[name][1] if len(known[name]) > 1 else {}
        if isinstance(value, Link):
            if value.type != kind:
                raise RefusedError(f"{name}: received {value.type}, wanted {kind}")
        elif isinstance(kind, list):
            if value not in kind:
                raise RefusedError(f"Value not in list: {name}: {value!r}")
        else:
            _widget(name, kind, settings, value)
    check = getattr(node, "VALIDATE_INPUTS", None)
    if check is not None:
        wanted = inspect.signature(check).parameters
        answer = check(
            **{
                name: None if isinstance(values[name], Link) else values[name]
                for name in wanted
                if name in values
            }
        )
        if answer is not True:
            raise RefusedError(str(answer))


def _widget(name: str, kind: str, settings: dict[str, Any], value: Any) -> None:
    assert kind in WIDGETS, f"{name}: a {kind} has no widget, so it must be linked"
    try:
        converted = WIDGETS[kind](value)
    except (TypeError, ValueError) as error:
        raise RefusedError(f"{name}: {error}") from error
    if "min" in settings and converted < settings["min"]:
        raise RefusedError(f"Value {value} smaller than min of {settings['min']}: {name}")
    if "max" in settings and converted > settings["max"]:
        raise RefusedError(f"Value {value} bigger than max of {settings['max']}: {name}")


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module
