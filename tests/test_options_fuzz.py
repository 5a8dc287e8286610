"""Any names and values of options are options, or one line that names what is wrong."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import few
from hypothesis import given
from hypothesis import strategies as st

from lsync_compile.combinations import EXCLUSIONS
from lsync_compile.errors import MediaError, OptionError
from lsync_compile.options import OPTION_NAMES, PRESETS, Options, resolve_options
from lsync_compile.tune.configuration import read_configuration, write_configuration

SPECS = {spec.name: spec for spec in fields(Options)}
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from([10**30, "\0", "\n", np.float32(0.5), np.zeros(2), Path("a.json"), Options]),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=2),
        st.tuples(inner),
    ),
    max_leaves=4,
)


def likely(name: str) -> st.SearchStrategy[Any]:
    """Values that an option takes, for the most part."""
    choices, between = SPECS[name].metadata["choices"], SPECS[name].metadata["between"]
    if choices:
        return st.sampled_from(choices)
    if between is not None:
        least, most = between
        numbers = st.floats if isinstance(least, float) else st.integers
        return st.one_of(st.sampled_from([least, most]), numbers(least, most))
    special = {
        "inductor": st.just({"max_autotune": True}),
        "plugins": st.booleans(),
        "deep_cache_steps": st.lists(st.integers(0, 30), max_size=4),
        "trace": st.sampled_from(["trace.json", "a/b.svg"]),
        "dump_dir": st.just("dumps"),
    }
    return special.get(name, st.booleans())


@st.composite
def given_options(draw: st.DrawFn) -> dict[Any, Any]:
    """Options as users may give them: mostly right, here and there anything."""
    options: dict[Any, Any] = {}
    for name in draw(st.lists(st.sampled_from(OPTION_NAMES), max_size=8)):
        options[name] = draw(likely(name) if draw(st.integers(0, 9)) else anything)
    if not draw(st.integers(0, 4)):
        options[draw(st.one_of(st.text(max_size=10), st.integers(), st.none()))] = draw(anything)
    return options


def resolved(*arguments: Any, **more: Any) -> Options | None:
    """The options; None where they are refused in one line."""
    said = None
    try:
        return resolve_options(*arguments, **more)
    except OptionError as error:
        said = str(error)
    assert "\n" not in said
    assert 0 < len(said) < 1000
    return None


@few(150)
@given(options=given_options(), mode=st.one_of(st.none(), st.sampled_from([*PRESETS]), anything))
def test_any_options_resolve_or_are_one_line(options: dict[Any, Any], mode: Any) -> None:
    found = resolved(mode, options)
    if found is None:
        return
    for exclusion in EXCLUSIONS:
        assert not exclusion.applies(found)
    for name, value in options.items():
        if value is not None and name not in ("trace", "dump_dir", "deep_cache_steps", "plugins"):
            assert getattr(found, name) == value  # what the user says wins
    text = json.dumps(found.to_dict())
    again = resolve_options(options=json.loads(text))
    assert json.dumps(again.to_dict()) == text
    assert again == found
    assert hash(again.rebuild_key) == hash(found.rebuild_key)
    assert not again.needs_rebuild(found)


@few(100)
@given(name=st.sampled_from(OPTION_NAMES), value=anything)
def test_a_wrong_value_is_named_with_its_option(name: str, value: Any) -> None:
    said = ""
    try:
        resolve_options(options={name: value})
    except OptionError as error:
        said = str(error)
    assert not said or name in said


@few(60)
@given(options=given_options())
def test_what_is_written_to_a_file_is_read_from_it(
    tmp_path_factory: pytest.TempPathFactory, options: dict[Any, Any]
) -> None:
    found = resolved(options=options)
    if found is None:
        return
    path = tmp_path_factory.mktemp("config") / "best.json"
    write_configuration(path, found.to_dict(), frames=3)
    assert resolve_options(options=read_configuration(path)) == found


@few(80)
@given(content=st.one_of(st.binary(max_size=40), st.text(max_size=40), anything, given_options()))
def test_any_configuration_file_is_read_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    path = tmp_path_factory.mktemp("config") / "best.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        wrapped = content if isinstance(content, str) else {"options": content}
        path.write_text(wrapped if isinstance(wrapped, str) else json.dumps(wrapped, default=repr))
    said = f"{path}: "
    try:
        resolve_options(options=read_configuration(path))
    except OptionError as error:
        said = str(error)
    assert "\n" not in said
    assert said.startswith(str(path))


@pytest.mark.parametrize("mode", [[], {}, ["turbo"], 3])
def test_a_mode_of_another_type_is_unknown(mode: Any) -> None:
    with pytest.raises(OptionError, match="unknown mode"):
        resolve_options(mode)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lowering": np.array(["eager", "x"])}, "option lowering=array"),
        ({"few_steps": "x" * 10_000}, "option few_steps='xxx"),
        ({"few_steps": "\n"}, "few_steps='\\\\n'"),
        ({"dump_dir": "a\0b"}, "dump_dir=.* must be a path"),
        ({"trace": "trace.txt"}, "trace='trace.txt' must end in .json"),
        ({"inductor": {"max_autotune": object()}}, "max_autotune=.* is no plain value"),
        ({"few_steps": 10**5000}, "option few_steps=a int"),
    ],
)
def test_odd_values_are_one_short_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        resolve_options(options=options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_two_values_that_cannot_be_compared_contradict() -> None:
    with pytest.raises(OptionError, match="given twice"):
        resolve_options(options={"few_steps": np.arange(3)}, few_steps=np.arange(3))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"options": ' * 50_000, "1" * 5_000])
def test_files_that_are_too_much_for_a_parser(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"deep\.json: "):
        read_configuration(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write anywhere")
def test_files_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(OptionError, match="cannot be read"):
        read_configuration(path)
    tmp_path.chmod(0o500)
    with pytest.raises(MediaError, match="cannot be written"):
        write_configuration(path, {})
