"""Every option, checked and combined with a preset's.

One frozen dataclass holds them all; its fields are in ``graph_options.py`` and ``run_options.py``,
the presets in ``presets.py``. What a field means, which values it takes and whether changing it
means compiling anew is data on the field, from which the checks and the table in the documentation
are made.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from lsync_compile.combinations import (
    CombinationError,
    LatentSyncSpeedOptimizer,
    check_combination,
)
from lsync_compile.entry_points import entered
from lsync_compile.errors import OptionError
from lsync_compile.graph_options import GraphOptions
from lsync_compile.option_checks import PATHS, check, listed, shown
from lsync_compile.option_checks import nearest as nearest
from lsync_compile.presets import PRESETS as PRESETS
from lsync_compile.run_options import RunOptions


@dataclass(frozen=True)
class Options(RunOptions, GraphOptions):
    """Checked options of one compiled object; make them with :func:`resolve_options`.

    Raises:
        OptionError: for a value of the wrong type or outside the allowed ones, and for two that
            exclude each other.
    """

    def __post_init__(self) -> None:
        for spec in fields(self):
            checked = check(
                spec.name,
                getattr(self, spec.name),
                spec.metadata["choices"],
                spec.metadata["between"],
            )
            object.__setattr__(self, spec.name, checked)
        check_combination(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        values["inductor"] = dict(self.inductor)
        values["plugins"] = dict(self.plugins) if isinstance(self.plugins, Mapping) else False
        for name in PATHS:
            values[name] = None if values[name] is None else str(values[name])
        return values

    @functools.cached_property
    def rebuild_key(self) -> tuple[Hashable, ...]:
        """The values that graphs are made by, to file them under."""
        return tuple(
            repr(sorted(value.items())) if isinstance(value, Mapping) else value
            for spec in fields(self)
            if spec.metadata["rebuild"]
            for value in [getattr(self, spec.name)]
        )

    def needs_rebuild(self, other: Options) -> bool:
        """Whether graphs compiled with ``other`` are wrong for these options."""
        return self.rebuild_key != other.rebuild_key


OPTION_NAMES: tuple[str, ...] = tuple(spec.name for spec in fields(Options))


def resolve_options(
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    default_preset: str = "balanced",
    **more: Any,
) -> Options:
    """What the user said, on top of what its preset says, on top of the defaults.

    Args:
        mode: a preset's name (``torch.compile(..., mode="turbo")``); ``"default"`` counts as none.
        options: option names to values; ``None`` as a value means the preset's default. Not
            changed. The name of an installed pass of another distribution switches it.
        default_preset: the preset where none is named.
        **more: as ``options``; a name given in both must have one value.

    Raises:
        OptionError: naming the option that is unknown, contradicted or outside its values.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a mapping of names, got {type(options).__name__}")
    given: dict[str, Any] = {}
    switches: dict[str, Any] = {}
    for name, value in [*(options or {}).items(), *more.items()]:
        if name not in OPTION_NAMES and name not in entered():
            known = [*OPTION_NAMES, *entered()]
            raise OptionError(f"unknown option {shown(name)}{nearest(str(name), known)}")
        if value is None:
            continue
        place = given if name in OPTION_NAMES else switches
        if name in place and not _same(place[name], value):
            both = f"{shown(place[name])} and {shown(value)}"
            raise OptionError(f"option {name} is given twice: {both}")
        place[name] = value
    if switches:
        given["plugins"] = _with_switches(given.get("plugins", {}), switches)
    if mode is not None and mode != "default":
        if not isinstance(mode, str) or mode not in PRESETS:
            hint = nearest(str(mode), PRESETS)
            raise OptionError(f"unknown mode {shown(mode)}{hint}; modes are {listed(PRESETS)}")
        if not _same(given.setdefault("preset", mode), mode):
            preset = shown(given["preset"])
            raise OptionError(f"mode {mode!r} contradicts the option preset={preset}")
    preset = check("preset", given.pop("preset", default_preset), tuple(PRESETS))
    return LatentSyncSpeedOptimizer(PRESETS[preset], given).combine(
        functools.partial(Options, preset=preset)
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; arrays and the like, which cannot tell, are not."""
    try:
        return bool(one == other)
    except (ValueError, TypeError, RuntimeError):
        return False


def _with_switches(plugins: Any, switches: Mapping[str, Any]) -> Any:
    """The value of ``plugins`` with switches that were given as options of their own."""
    if plugins is True:
        plugins = {}
    if not isinstance(plugins, Mapping):
        raise OptionError(f"option plugins={shown(plugins)} contradicts the option {min(switches)}")
    for name, value in switches.items():
        if not _same(plugins.get(name, value), value):
            both = f"{shown(plugins[name])} and {shown(value)}"
            raise OptionError(f"option {name} is given twice: {both}")
    return {**plugins, **switches}


def left_out(options: Options) -> list[str]:
    """A line for each option of the preset that gave way to another one."""
    lines = []
    for name, value in PRESETS[options.preset].items():
        try:
            replace(options, **{name: value})
        except CombinationError as error:
            reason = error.exclusion.reason
            lines.append(f"preset {options.preset!r}: left out {name}; {reason}")
    return lines


def options_table() -> str:
    """The options as a Markdown table, for the documentation."""
    lines = [
        "| option | values | default | compiles anew | what it does |",
        "| --- | --- | --- | --- | --- |",
    ]
    for spec in fields(Options):
        choices = spec.metadata["choices"]
        values = ", ".join(f"`{choice}`" for choice in choices)
        values = values or _kind(spec.name, spec.metadata["between"])
        default = spec.default if spec.default is not MISSING else {}
        rebuild = "yes" if spec.metadata["rebuild"] else "no"
        lines.append(
            f"| `{spec.name}` | {values} | `{default}` | {rebuild} | {spec.metadata['help']} |"
        )
    return "\n".join(lines) + "\n"


def _kind(name: str, between: tuple[float, float] | None) -> str:
    if between is not None:
        return f"{between[0]} to {between[1]}"
    if name == "inductor":
        return "mapping"
    if name == "plugins":
        return "mapping, `True`, `False`"
    if name == "deep_cache_steps":
        return "steps"
    return "path" if name in PATHS else "`True`, `False`"
