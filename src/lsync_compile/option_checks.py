"""What an option says of itself, and checks of values with errors that name the option."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lsync_compile.entry_points import entered
from lsync_compile.errors import OptionError

PATHS = frozenset({"dump_dir", "trace"})  # options that are files or folders
TRACE_SUFFIXES = (".json", ".png", ".svg")
_MOST_SHOWN = 100  # characters of a value in an error


def about(
    help: str,
    *,
    choices: tuple[str, ...] = (),
    between: tuple[float, float] | None = None,
    rebuild: bool = True,
) -> dict[str, Any]:
    """The metadata of an option's field.

    Args:
        help: one sentence for the table.
        choices: the allowed names.
        between: the smallest and the largest allowed number, for fields that are numbers.
        rebuild: whether a change means compiling anew.
    """
    return {"help": help, "choices": choices, "between": between, "rebuild": rebuild}


def check(
    name: str,
    value: Any,
    choices: tuple[str, ...],
    between: tuple[float, float] | None = None,
) -> Any:
    """The value, normalised, or an error that names the option and what it takes."""
    if between is not None:
        return _check_number(name, value, *between)
    if choices:
        if not isinstance(value, str) or value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise OptionError(f"option {name}={shown(value)}{hint}; allowed are {listed(choices)}")
        return value
    if name in PATHS:
        return _check_path(name, value)
    if name == "inductor":
        return _check_inductor(value)
    if name == "plugins":
        return _check_plugins(value)
    if name == "deep_cache_steps":
        return _check_steps(name, value)
    if not isinstance(value, bool):
        raise OptionError(f"option {name}={shown(value)} must be True or False")
    return value


def _check_path(name: str, value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, (str, Path)) or "\0" in str(value):
        raise OptionError(f"option {name}={shown(value)} must be a path")
    if name == "trace" and Path(value).suffix not in TRACE_SUFFIXES:
        raise OptionError(f"option trace={shown(value)} must end in {', '.join(TRACE_SUFFIXES)}")
    return Path(value)


def _check_number(name: str, value: Any, least: float, most: float) -> int | float:
    """A number of the type of the bounds."""
    whole = isinstance(least, int)
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise OptionError(f"option {name}={shown(value)} must be {kind} from {least} to {most}")
    return int(value) if whole else float(value)


def _check_steps(name: str, value: Any) -> tuple[int, ...] | None:
    """Step numbers in order, each once, 0 among them."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(type(each) is int for each in value):
        raise OptionError(
            f"option {name}={shown(value)} must be a list of steps, such as [0, 4, 9]"
        )
    if any(each < 0 for each in value):
        raise OptionError(f"option {name}={shown(value)}: steps are counted from 0")
    return tuple(sorted({0, *value}))


def _check_plugins(value: Any) -> dict[str, bool] | Literal[False]:
    """Switches by name; True is the same as none."""
    if isinstance(value, bool):
        return {} if value else False
    if not isinstance(value, Mapping):
        raise OptionError(
            f"option plugins={shown(value)} must be True, False or a mapping of passes"
        )
    for name, switch in value.items():
        if name not in entered():
            hint = nearest(str(name), entered())
            raise OptionError(
                f"option plugins: no installed distribution has a pass {shown(name)}{hint}"
            )
        if not isinstance(switch, bool):
            raise OptionError(f"option {name}={shown(switch)} must be True or False")
    return dict(value)


def _check_inductor(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"option inductor={shown(value)} must be a mapping of Inductor settings")
    if value:
        import torch._inductor  # slow to import, and rarely needed here

        known = torch._inductor.list_options()
        for key, setting in value.items():
            if key not in known:
                hint = nearest(str(key), known)
                raise OptionError(f"option inductor: unknown setting {shown(key)}{hint}")
            if not _is_plain(setting):
                raise OptionError(f"option inductor: {key}={shown(setting)} is no plain value")
    return dict(value)


def _is_plain(value: Any) -> bool:
    """Whether JSON can write it."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where a known name is close, else the empty string."""
    close = difflib.get_close_matches(name[:_MOST_SHOWN], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: Any) -> str:
    """A value for an error: in one line, and not all of a long one."""
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # it holds itself, or more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
