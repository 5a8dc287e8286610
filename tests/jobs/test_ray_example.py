"""``examples/ray_jobs.py`` with a stand-in for Ray, in this process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lsync_compile.jobs import ListedJob, SyncSettings

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_jobs.py"


class ActorPool:
    """Gives each value to the next actor."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    def map_unordered(
        self, call: Callable[[Any, Any], Any], values: Iterable[Any]
    ) -> Iterator[Any]:
        for index, value in enumerate(values):
            yield call(self.actors[index % len(self.actors)], value)


class Handle:
    """An actor whose methods have ``remote``."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


def stand_in(asked: list[dict[str, Any]]) -> dict[str, ModuleType]:
    """Ray's modules, as far as the example uses them."""
    ray, util = ModuleType("ray"), ModuleType("ray.util")

    def remote(**wanted: Any) -> Callable[[type], Any]:
        asked.append(wanted)
        return lambda cls: SimpleNamespace(remote=lambda *values: Handle(cls(*values)))

    context = SimpleNamespace(get_node_id=lambda: "0123456789abcdef")
    vars(ray).update(
        init=lambda: None,
        remote=remote,
        cluster_resources=lambda: {"GPU": 2.0},
        get_runtime_context=lambda: context,
        util=util,
    )
    vars(util).update(ActorPool=ActorPool)
    return {"ray": ray, "ray.util": util}


def test_each_clip_is_done_once_on_as_many_actors_as_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []
    loaded: list[SyncSettings] = []
    done: list[tuple[int, Path]] = []

    def load(settings: SyncSettings) -> Callable[[ListedJob], Any]:
        loaded.append(settings)
        number = len(loaded)

        def sync(job: ListedJob) -> Any:
            done.append((number, job.output))
            return SimpleNamespace(num_frames=4, missing_faces=0, seconds=1.0)

        return sync

    monkeypatch.setattr(SyncSettings, "load", load)
    for name, module in stand_in(asked).items():
        monkeypatch.setitem(sys.modules, name, module)
    listed = tmp_path / "list.csv"
    listed.write_text("video,audio,output\na.mp4,,1.mp4\nb.mp4,,2.mp4\nc.mp4,,3.mp4\n")
    (tmp_path / "2.mp4").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["ray_jobs.py", str(listed), "--steps", "5"])
    spec = importlib.util.spec_from_file_location("ray_jobs", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    assert asked == [{"num_gpus": 1, "max_restarts": 3, "max_task_retries": 1}]
    assert [each.arguments for each in loaded] == [{"num_inference_steps": 5}] * 2
    assert done == [(1, tmp_path / "1.mp4"), (1, tmp_path / "3.mp4")]
    lines = capsys.readouterr().out.splitlines()
    assert ["state='skipped'" in line for line in lines] == [False, True, False]
    assert "device='01234567'" in lines[0]
