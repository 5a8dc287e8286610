"""Options: unknown names, wrong values, presets, and what is data on the fields."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from lsync_compile import options as module
from lsync_compile.errors import OptionError
from lsync_compile.lowering import lowering_names
from lsync_compile.options import (
    OPTION_NAMES,
    PRESETS,
    Options,
    options_table,
    resolve_options,
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lowerin": "eager"}, "unknown option 'lowerin'; did you mean 'lowering'?"),
        ({"zzz": 1}, "unknown option 'zzz'"),
        ({"lowering": "eagre"}, "option lowering='eagre'; did you mean 'eager'?; allowed are"),
        ({"lowering": 3}, "option lowering=3; allowed are 'inductor', 'eager'"),
        ({"strict": 1}, "option strict=1 must be True or False"),
        ({"strict": "yes"}, "option strict='yes' must be True or False"),
        ({"dump_dir": 3}, "option dump_dir=3 must be a path"),
        ({"preset": "turob"}, "option preset='turob'; did you mean 'turbo'?"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'?"),
        ({"inductor": "max_autotune"}, "option inductor='max_autotune' must be a mapping"),
    ],
)
def test_what_is_wrong_is_named(given: dict, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_options(options=given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_mode_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="unknown mode 'balance'; did you mean 'balanced'"):
        resolve_options("balance")


def test_options_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(OptionError, match="options must be a mapping"):
        resolve_options(options=["strict"])


def test_mode_is_a_preset() -> None:
    assert resolve_options("turbo") == resolve_options(options={"preset": "turbo"})
    assert resolve_options("default").preset == "balanced"
    with pytest.raises(OptionError, match="mode 'turbo' contradicts"):
        resolve_options("turbo", {"preset": "exact"})


def test_a_name_given_twice_must_agree() -> None:
    assert resolve_options(options={"strict": True}, strict=True).strict
    with pytest.raises(OptionError, match="option strict is given twice"):
        resolve_options(options={"strict": True}, strict=False)


def test_an_explicit_value_wins_and_none_means_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "turbo", {"remove_noops": False})
    assert resolve_options("turbo").remove_noops is False
    assert resolve_options("turbo", {"remove_noops": None}).remove_noops is False
    assert resolve_options("turbo", {"remove_noops": True}).remove_noops is True
    assert resolve_options("balanced").remove_noops is True


def test_the_users_mapping_stays_as_it_is() -> None:
    given = {"preset": "turbo", "strict": None, "inductor": {"max_autotune": True}}
    resolved = resolve_options(options=given)
    assert given == {"preset": "turbo", "strict": None, "inductor": {"max_autotune": True}}
    given["inductor"]["max_autotune"] = False
    assert resolved.inductor == {"max_autotune": True}


def test_which_options_force_a_rebuild_is_data() -> None:
    plain = resolve_options()
    assert plain.needs_rebuild(resolve_options(lowering="eager"))
    assert plain.needs_rebuild(resolve_options(inductor={"max_autotune": True}))
    soft = resolve_options(strict=True, dump_dir="dumps", guided_steps=1)
    assert not plain.needs_rebuild(soft)
    assert all("rebuild" in field.metadata for field in fields(Options))


def test_direct_construction_is_checked_too() -> None:
    assert Options(dump_dir="dumps").dump_dir == Path("dumps")
    with pytest.raises(OptionError):
        Options(strict="no")


def test_the_lowerings_are_those_that_exist() -> None:
    choices = {field.name: field.metadata["choices"] for field in fields(Options)}["lowering"]
    assert set(choices) == set(lowering_names())


def test_the_table_has_a_row_for_each_option() -> None:
    rows = options_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(OPTION_NAMES)
    assert all(row.count("|") == 6 for row in rows)


def test_the_documentation_has_the_table() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "options.md").read_text()
    assert all(row in page for row in options_table().splitlines())


def test_presets_only_name_options_that_exist() -> None:
    for settings in module.PRESETS.values():
        assert set(settings) <= set(OPTION_NAMES)
