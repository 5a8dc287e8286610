"""Passes of other distributions: found, placed, switched, keyed, and never in the user's way."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from captures import capture, make_unet, unet_inputs
from distributions import Install, forget, install  # noqa: F401  a fixture
from torch import Tensor, nn

import lsync_compile
from lsync_compile.doctor import Finding, _plugins
from lsync_compile.errors import OptionError
from lsync_compile.explain import explain
from lsync_compile.lowering.cache_key import ops_key
from lsync_compile.options import Options, options_table, resolve_options
from lsync_compile.passes.manager import PassManager, ordered
from lsync_compile.passes.plugins import placed
from lsync_compile.passes.spec import Pass, PassSpec, Phase, passes_table, register, registered

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_party_pass"
OURS = [cls.spec.name for cls in ordered(registered().values())]
WARNING = logging.getLevelName(logging.WARNING)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cos() * 2


def names(options: Options | None = None) -> list[str]:
    return [each.spec.name for each in PassManager(options or Options()).passes]


def compiled(**options: object) -> nn.Module:
    """A module that has run once, and given what it should."""
    torch._dynamo.reset()
    module = lsync_compile.compile(Twice(), lowering="eager", **options)
    with torch.no_grad():
        x = torch.randn(3)
        assert torch.equal(module(x), x.cos() * 2)
    return module


def outcomes(module: nn.Module) -> dict[str, str]:
    (graph,) = module.lsync.report().graphs
    assert not graph.fallback
    return {record.name: record.outcome for record in graph.passes}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == WARNING]


# The example


@pytest.fixture
def example(install: Install, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # noqa: F811
    """The example as if it were installed, by what its pyproject.toml says."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    ((name, place),) = project["entry-points"]["lsync_compile.passes"].items()
    module, _, cls = place.partition(":")
    install(
        name,
        distribution=project["name"],
        version=project["version"],
        text=f"from {module} import {cls} as Made\n",
    )
    monkeypatch.syspath_prepend(EXAMPLE / "src")
    yield
    sys.modules.pop(module, None)


def example_tests() -> dict[str, object]:
    """The example's own tests by name."""
    place = EXAMPLE / "tests" / "test_reshape_once.py"
    spec = importlib.util.spec_from_file_location("test_reshape_once", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: each for name, each in vars(module).items() if name.startswith("test_")}


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("name", example_tests())
def test_the_example_passes_its_own_tests(name: str) -> None:
    example_tests()[name]()


@pytest.mark.usefixtures("example")
def test_the_example_on_the_real_unet() -> None:
    """One level of it: each transformer block has such a copy."""
    with torch.no_grad():
        gm, inputs = capture(make_unet(layers=1, levels=1), *unet_inputs().values())
        expected = gm(*inputs)[0]
        options = Options(kernels="off", plugins={"reshape_once": True})
        records = PassManager(options).run(gm, "unet", "graph")
        torch.testing.assert_close(gm(*inputs)[0], expected, rtol=1e-3, atol=1e-4)
    (record,) = (record for record in records if record.name == "reshape_once")
    assert (record.outcome, record.matches) == ("applied", 1)
    assert record.distribution == "lsync-reshape-once 0.1.0"


@pytest.mark.usefixtures("example")
def test_the_report_explain_and_the_doctor_show_it() -> None:
    line = "reshape_once (lsync-reshape-once 0.1.0): no match"
    report = compiled(reshape_once=True).lsync.report()
    assert line in str(report)
    assert line in str(explain(Twice(), (torch.ones(3),), reshape_once=True))
    rows = {row["name"]: row for row in report.to_dict()["graphs"][0]["passes"]}
    assert rows["reshape_once"]["distribution"] == "lsync-reshape-once 0.1.0"
    assert rows["remove_noops"]["distribution"] == ""
    assert Finding("pass reshape_once", "ok", "of lsync-reshape-once 0.1.0") in list(_plugins())


# Order, options


def test_they_stand_at_the_end_of_their_phase_or_where_they_say(install: Install) -> None:  # noqa: F811
    install("a_last")
    install("a_first", fields='before=("fuse_geglu",)')
    install("after_another", fields='after=("a_last",)')
    install("clean_too", phase="CLEAN")
    order = names()
    assert [name for name in order if name in OURS] == OURS
    assert order.index("a_first") == order.index("fuse_geglu") - 1
    assert order.index("a_last") == order.index("channels_last") - 2
    assert order.index("after_another") == order.index("a_last") + 1
    assert order.index("clean_too") == order.index("share_repeated") + 1


def test_a_place_that_does_not_exist_is_said_so() -> None:
    def made(**more: object) -> type[Pass]:
        spec = PassSpec(name="x", phase=Phase.CLEAN, summary="", **more)
        return type("Made", (Pass,), {"spec": spec})

    order = ordered(registered().values())
    with pytest.raises(ValueError, match="comes after 'fuse_geglu', not a pass of its phase"):
        placed(order, made(after=("fuse_geglu",)))
    with pytest.raises(ValueError, match="after 'share_repeated' and before 'remove_noops', which"):
        placed(order, made(after=("share_repeated",), before=("remove_noops",)))
    assert placed(order, made(after=("gone",)), absent={"gone"})
    with pytest.raises(ValueError, match="name it in the others' `after`"):
        register(made(before=("remove_noops",), option="strict"))


def test_what_keeps_the_bits_is_on_and_the_rest_is_off_until_asked_for(install: Install) -> None:  # noqa: F811
    install("same_bits")
    install("rounds", fields="exact=False")
    found = outcomes(compiled())
    assert (found["same_bits"], found["rounds"]) == ("no match", "off")
    found = outcomes(compiled(same_bits=False, rounds=True))
    assert (found["same_bits"], found["rounds"]) == ("off", "no match")
    found = outcomes(compiled(plugins=False))
    assert not {"same_bits", "rounds"} & found.keys()


def test_a_pass_is_an_option_by_its_name(install: Install) -> None:  # noqa: F811
    install("foreign")
    plain = resolve_options()
    assert plain.plugins == {}
    off = resolve_options(foreign=False)
    assert off == resolve_options(options={"plugins": {"foreign": False}})
    assert off.needs_rebuild(plain)
    assert json.loads(json.dumps(off.to_dict()))["plugins"] == {"foreign": False}
    assert resolve_options(foreign=None) == plain == resolve_options(plugins=True)
    assert resolve_options(**{**off.to_dict(), "foreign": False}) == off
    for given, message in [
        ({"foreing": True}, "unknown option 'foreing'; did you mean 'foreign'?"),
        ({"foreign": 1}, "option foreign=1 must be True or False"),
        ({"plugins": {"foreing": True}}, "no installed distribution has a pass 'foreing'"),
        ({"plugins": 3}, "option plugins=3 must be True, False or a mapping"),
        ({"plugins": False, "foreign": True}, "plugins=False contradicts the option foreign"),
        (
            {"plugins": {"foreign": True}, "foreign": False},
            "foreign is given twice: True and False",
        ),
    ]:
        with pytest.raises(OptionError) as caught:
            resolve_options(options=given)
        assert message in str(caught.value)


def test_the_documentation_s_tables_have_ours_alone(install: Install) -> None:  # noqa: F811
    before = passes_table(), options_table()
    install("foreign")
    PassManager(Options())
    assert (passes_table(), options_table()) == before


# What is wrong with them


def test_nothing_is_imported_before_a_graph_or_when_switched_off(install: Install) -> None:  # noqa: F811
    module = install("foreign")
    resolve_options(foreign=True)
    PassManager(resolve_options(foreign=False))
    assert module not in sys.modules
    PassManager(resolve_options())
    assert module in sys.modules


BROKEN = {
    "a module that fails": ({"text": "1 / 0"}, "ZeroDivisionError: division by zero"),
    "a module that exits": ({"text": "raise OSError('no\\nlicence')"}, "OSError: no;"),
    "a missing dependency": ({"text": "import gone_for_good"}, "No module named 'gone_for_good'"),
    "no such class": ({"text": ""}, "has no attribute 'Made'"),
    "no pass": ({"text": "Made = int"}, "no subclass of lsync_compile.passes.spec.Pass"),
    "no declaration": (
        {"text": "from lsync_compile.passes.spec import Pass\nclass Made(Pass): pass"},
        "no PassSpec",
    ),
    "another name inside": ({"called": "other"}, "entered as 'broken'; its name 'other'"),
    "our registry": (
        {"text": "from lsync_compile.passes.spec import *\n@register\n" + "class Made(Pass):\n"
         "    spec = PassSpec(name='broken', phase=Phase.CLEAN, summary='')"},
        "names option 'broken', which does not exist",
    ),
    "an unknown neighbour": ({"fields": "after=('gone',)"}, "comes after 'gone', not a pass of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_costs_a_warning_and_nothing_else(
    case: str,
    install: Install,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings, reason = BROKEN[case]
    install("broken", **settings)
    install("fine", distribution="other-passes")
    module = compiled()
    assert outcomes(module)["fine"] == "no match"
    assert "broken" not in outcomes(module)
    compiled()
    (warning,) = warnings(caplog)
    assert warning.startswith("pass 'broken' of some-passes 1.2 is left out: ")
    assert reason in warning
    assert warning.endswith("update or uninstall it, or switch it off with broken=False")
    assert warning in module.lsync.report().notes
    with pytest.raises(Exception, match=r"pass 'broken' of some-passes 1\.2") as caught:
        compiled(strict=True)
    assert "CompileError: " in str(caught.value)
    assert outcomes(compiled(strict=True, broken=False))["broken"] == "off"


@pytest.mark.parametrize("name", ["fuse_geglu", "strict"])
def test_a_built_in_name_is_not_shadowed(
    name: str,
    install: Install,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(name, body="raise AssertionError('it ran')")
    assert names() == OURS
    (warning,) = warnings(caplog)
    assert "its name is a built-in option's" in warning
    assert resolve_options(options={name: True}).plugins == {}


def test_two_distributions_with_one_name_are_both_left_out(
    install: Install,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    install("twin")
    install("twin", distribution="other-passes")
    assert names() == OURS
    (warning,) = warnings(caplog)
    assert "some-passes 1.2" in warning
    assert "other-passes 1.2 has a pass of this name too" in warning or "too" in warning


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('place')", "KeyError: 'place'"),
        ("gm.graph.erase_node(gm.graph.output_node()); return 1 // 0", "ZeroDivisionError"),
        ("rename(gm.graph); return 1", "changed the graph's inputs"),
    ],
)
def test_a_graph_is_as_before_where_one_fails_on_it(
    body: str,
    reason: str,
    install: Install,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    install("fails", phase="CLEAN", body=body)
    module = compiled()
    assert outcomes(module)["fails"] == "failed"
    (warning,) = warnings(caplog)
    assert warning.startswith("pass 'fails' of some-passes 1.2 failed: ")
    assert reason in warning
    assert warning.endswith("switch it off with fails=False")
    assert any("failed" in note and "as without it" in note for note in module.lsync.report().notes)
    with pytest.raises(Exception, match=r"pass 'fails' of some-passes 1\.2 failed"):
        compiled(strict=True)


def test_a_graph_that_is_not_compiled_says_through_whose_passes_it_went(
    install: Install,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("foreign")

    def fail(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("lsync_compile.backend.get_lowering", lambda name: fail)
    torch._dynamo.reset()
    module = lsync_compile.compile(Twice())
    with torch.no_grad():
        module(torch.ones(3))
    (graph,) = module.lsync.report().graphs
    assert "through 'foreign' of some-passes 1.2; plugins=False leaves them out" in graph.fallback


# The caches' keys


def test_the_key_has_the_version_and_the_source(install: Install) -> None:  # noqa: F811
    plain = PassManager(Options()).uuid()
    install("foreign")
    first = PassManager(Options()).uuid()
    assert first != plain
    forget()
    assert PassManager(Options()).uuid() == first
    install("foreign", body="return 0  # edited")
    edited = PassManager(Options()).uuid()
    assert edited != first
    assert PassManager(Options(plugins=False)).uuid() != edited


def test_the_key_has_the_version(install: Install) -> None:  # noqa: F811
    module = install("foreign", version="1.0", module="same")
    first = PassManager(Options()).uuid()
    sys.modules.pop(module)
    install("foreign", version="1.1", module="same", distribution="some-passes-again")
    assert PassManager(Options()).uuid() != first


def test_an_op_of_theirs_enters_the_key_of_compiled_code(install: Install) -> None:  # noqa: F811
    @torch.library.custom_op("lsync_plugin_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    with torch.no_grad():
        gm, _ = capture(lambda x: double(x.cos()), torch.ones(3))
        plain, _ = capture(lambda x: x.cos() + 1, torch.ones(3))
    PassManager(Options())
    assert ops_key(gm.graph) is None
    install("foreign")
    PassManager(Options())
    key = ops_key(gm.graph)
    assert key is not None
    assert ops_key(plain.graph) is None
    install("foreign", body="return 0  # edited")
    PassManager(Options())
    assert ops_key(gm.graph).uuid() != key.uuid()
