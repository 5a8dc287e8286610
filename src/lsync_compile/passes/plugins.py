"""Passes of other installed distributions: loaded with care, placed among ours.

They are found by :mod:`lsync_compile.entry_points`; docs/extending.md says how to write one. A
pass is imported when the first graph is rewritten, unless it is switched off. Whatever is wrong
with it costs the pass, and one warning that names its distribution and says what to do. With
``strict=True`` it is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lsync_compile.entry_points import distribution_of, entered
from lsync_compile.options import OPTION_NAMES, Options
from lsync_compile.passes.spec import Pass, PassSpec, Phase, registered, source_uuid

log = logging.getLogger(__name__)


class PluginError(RuntimeError):
    """A pass of another distribution cannot be used or has failed, and ``strict`` is set."""


@dataclass(frozen=True)
class Plugin:
    """A pass of another distribution.

    Attributes:
        name: of the pass and of its switch.
        distribution: its name and version.
        cls: the pass; None where it is not imported or cannot be used.
        uuid: hash of its source and that of all it uses, with the distribution's version.
        problem: why it cannot be used, and what to do; empty where it can.
    """

    name: str
    distribution: str
    cls: type[Pass] | None = None
    uuid: str = ""
    problem: str = ""


@dataclass
class Selection:
    """All passes for one set of options.

    Attributes:
        order: those that run or are recorded as switched off, in running order.
        plugins: those of them that are of other distributions, by name.
        skipped: passes that are switched off by name; they are not imported.
        broken: passes that cannot be used.
    """

    order: list[type[Pass]]
    plugins: dict[str, Plugin] = field(default_factory=dict)
    skipped: list[Plugin] = field(default_factory=list)
    broken: list[Plugin] = field(default_factory=list)


_loaded: dict[str, Plugin] = {}
_warned: set[str] = set()


def select(options: Options, order: list[type[Pass]]) -> Selection:
    """Our passes in their order, with those of other distributions between them.

    Raises:
        PluginError: one cannot be used, and ``strict`` is set.
    """
    selection = Selection(order)
    if options.plugins is False:
        return selection
    usable: list[Plugin] = []
    for name in entered():
        if _said(options, name) is False:
            distribution = distribution_of(entered()[name][0])
            selection.skipped.append(Plugin(name, distribution))
            continue
        plugin = load(name)
        (selection.broken if plugin.problem else usable).append(plugin)
    _place(selection, usable)
    for plugin in selection.broken:
        if options.strict:
            raise PluginError(plugin.problem)
        if plugin.name not in _warned:
            _warned.add(plugin.name)
            log.warning("%s", plugin.problem)
    return selection


def switched_on(options: Options, spec: PassSpec) -> bool:
    """Whether a pass of another distribution runs: as the options say, else if it is exact."""
    said = _said(options, spec.name)
    return spec.exact if said is None else said


def load(name: str) -> Plugin:
    """Import a pass and check it, once in a process.

    Raises:
        KeyError: for a name that no distribution enters.
    """
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def loaded_uuids() -> list[str]:
    """Keys of the passes that this process can use, for caches of what they take part in."""
    return sorted(plugin.uuid for plugin in _loaded.values() if plugin.cls is not None)


def described(error: BaseException) -> str:
    """An error in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next(filter(None, lines), 'no message')}"


def _said(options: Options, name: str) -> bool | None:
    said: Mapping[str, bool] = options.plugins if isinstance(options.plugins, Mapping) else {}
    return said.get(name)


def _load(name: str) -> Plugin:
    first, *others = entered()[name]
    plugin = Plugin(name, distribution_of(first))
    try:
        if others:
            also = ", ".join(map(distribution_of, others))
            raise ValueError(f"{also} has a pass of this name too")
        cls = _checked(name, first.load())
        return replace(plugin, cls=cls, uuid=f"{plugin.distribution} {source_uuid(cls)}")
    except Exception as error:
        log.debug("%s", name, exc_info=error)
        return _unusable(plugin, error)


def _checked(name: str, loaded: Any) -> type[Pass]:
    """The class, if it can stand beside our passes."""
    if name in registered() or name in OPTION_NAMES:
        raise ValueError("its name is a built-in option's")
    if not name.isidentifier():
        raise ValueError("its name is no identifier, and so no option's")
    if not isinstance(loaded, type) or not issubclass(loaded, Pass):
        raise TypeError("the entry point is no subclass of lsync_compile.passes.spec.Pass")
    spec = getattr(loaded, "spec", None)
    if not isinstance(spec, PassSpec) or not isinstance(spec.phase, Phase):
        raise TypeError("the class has no PassSpec as its `spec`")
    if (spec.name, spec.option) != (name, name):
        raise ValueError(
            f"it is entered as {name!r}; its name {spec.name!r} and its option "
            f"{spec.option!r} must be the same"
        )
    loaded()
    return loaded


def _unusable(plugin: Plugin, error: Exception) -> Plugin:
    problem = (
        f"pass {plugin.name!r} of {plugin.distribution} is left out: {described(error)}; update "
        f"or uninstall it, or switch it off with {plugin.name}=False"
    )
    return replace(plugin, cls=None, problem=problem)


def _place(selection: Selection, plugins: Iterable[Plugin]) -> None:
    """Give each pass its place, after those that it names."""
    waiting = {plugin.name: plugin for plugin in plugins}
    absent = {plugin.name for plugin in selection.skipped}
    while waiting:
        ready = (
            name for name, plugin in waiting.items() if not _names(plugin) & waiting.keys() - {name}
        )
        plugin = waiting.pop(next(ready, next(iter(waiting))))
        assert plugin.cls is not None  # one that is usable
        try:
            selection.order = placed(selection.order, plugin.cls, absent)
        except ValueError as error:
            selection.broken.append(_unusable(plugin, error))
        else:
            selection.plugins[plugin.name] = plugin


def _names(plugin: Plugin) -> set[str]:
    assert plugin.cls is not None
    return {*plugin.cls.spec.after, *plugin.cls.spec.before}


def placed(
    order: list[type[Pass]], cls: type[Pass], absent: Collection[str] = ()
) -> list[type[Pass]]:
    """The order with one more pass: before the first of its ``before``, else last in its phase.

    Args:
        order: stays as it is, so that an installed pass never changes how ours follow each other.
        cls: the new pass.
        absent: passes that are switched off; naming them says nothing.

    Raises:
        ValueError: it names a pass that its phase does not have, or has no place between those
            that it names.
    """
    spec = cls.spec
    places = {each.spec.name: i for i, each in enumerate(order) if each.spec.phase == spec.phase}
    for word, names in (("after", spec.after), ("before", spec.before)):
        for name in names:
            if name not in places and name not in absent:
                raise ValueError(f"it comes {word} {name!r}, not a pass of its phase")
    end = sum(each.spec.phase <= spec.phase for each in order)
    at = min((places[name] for name in spec.before if name in places), default=end)
    late = [name for name in spec.after if places.get(name, -1) >= at]
    if late:
        first = order[at].spec.name
        raise ValueError(f"it comes after {late[0]!r} and before {first!r}, which is earlier")
    return [*order[:at], cls, *order[at:]]
