"""The manager: order, switches, counts, dumps, checks, and the key of its cache."""

from __future__ import annotations

import operator
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captures import Attention, capture
from torch import Tensor
from torch.fx import GraphModule

import lsync_compile
from lsync_compile import sources
from lsync_compile.errors import OptionError
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassError, PassManager, ordered
from lsync_compile.passes.spec import (
    Pass,
    PassContext,
    PassSpec,
    Phase,
    passes_table,
    register,
    registered,
    source_uuid,
)

ROOT = Path(__file__).resolve().parents[2]


def make(name: str, rewrite=lambda gm: 0, veto: str = "", **more: object) -> type[Pass]:
    """A pass class that is not registered."""
    fields = {"phase": Phase.CLEAN, "option": "remove_noops", "summary": "", **more}

    class Made(Pass):
        spec = PassSpec(name=name, **fields)

        def veto(self, gm: GraphModule, context: PassContext) -> str:
            return veto

        def rewrite(self, gm: GraphModule, context: PassContext) -> int:
            return rewrite(gm)

    return Made


def graph() -> GraphModule:
    with torch.no_grad():
        return capture(Attention().eval(), torch.ones(1, 4, 3, 3), torch.tensor(1))[0]


def run(gm: GraphModule, *classes: type[Pass], target: str = "unet", **options: object) -> list:
    return PassManager(Options(**options), classes).run(gm, target, "graph")


def test_phases_come_in_turn_and_after_holds_inside_one() -> None:
    classes = [
        make("d", phase=Phase.FINISH),
        make("a", after=("c",)),
        make("b", phase=Phase.REWRITE),
        make("c"),
        make("e"),
    ]
    assert [cls.spec.name for cls in ordered(classes)] == ["c", "a", "e", "b", "d"]
    assert ordered(classes) == ordered(reversed(classes))


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        ordered([make("a", after=("b",)), make("b", after=("a",))])
    with pytest.raises(ValueError, match="'a' comes after 'gone'"):
        ordered([make("a", after=("gone",))])
    with pytest.raises(ValueError, match="'a' comes after 'b', not a pass of its phase"):
        ordered([make("a", after=("b",)), make("b", phase=Phase.REWRITE)])


def test_each_way_of_not_running_is_recorded() -> None:
    def never(gm: GraphModule) -> int:
        raise AssertionError("it ran")

    records = run(
        graph(),
        make("a", never, option="share_repeated"),
        make("b", never, targets=("vae.encoder",)),
        make("c", never, veto="too small"),
        make("d"),
        share_repeated=False,
    )
    assert [(record.name, record.outcome, record.reason) for record in records] == [
        ("a", "off", "option share_repeated"),
        ("b", "not for this graph", "only vae.encoder"),
        ("c", "vetoed", "too small"),
        ("d", "no match", ""),
    ]


def double_the_cosine(gm: GraphModule) -> int:
    node = next(node for node in gm.graph.nodes if node.target == "cos")
    with gm.graph.inserting_after(node):
        twice = gm.graph.call_function(operator.mul, (node, 2))
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    return 1


def test_a_rewrite_takes_effect_and_is_counted() -> None:
    gm = graph()
    before = len(gm.graph.nodes)
    (record,) = run(gm, make("a", double_the_cosine))
    assert (record.outcome, record.matches) == ("applied", 1)
    assert (record.nodes_before, record.nodes_after) == (before, before + 1)
    assert record.seconds > 0
    assert "* 2" in gm.code


def test_code_is_regenerated_only_after_a_change() -> None:
    gm = graph()
    calls = []
    gm.recompile = lambda: calls.append(1)
    run(gm, make("a"), make("b", double_the_cosine), make("c"))
    assert calls == [1]


def test_unused_nodes_go_after_a_change() -> None:
    def orphan(gm: GraphModule) -> int:
        output = gm.graph.output_node()
        output.args = ((next(node for node in gm.graph.nodes if node.op == "placeholder"),),)
        return 1

    gm = capture(lambda x: (x * 2) + 1, torch.ones(3))[0]
    (record,) = run(gm, make("a", orphan))
    assert record.nodes_after == 2  # the input and the output


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.add(x, 1, out=x),
        lambda x: x.__setitem__(0, 1),
        lambda x: operator.iadd(x, 1),
    ],
    ids=["method", "inplace", "out", "item", "operator"],
)
def test_what_writes_is_not_unused(write: Callable[[Tensor], object]) -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        write(y)
        return y.cos() + 1

    gm, (x,) = capture(function, torch.ones(3) - 2)
    (record,) = run(gm, make("a", double_the_cosine))
    assert record.outcome == "applied"
    torch.testing.assert_close(gm(x)[0], 2 * function(x) - 1)


def test_a_pass_must_not_change_inputs_or_outputs() -> None:
    def drop_an_input(gm: GraphModule) -> int:
        extra = next(iter(gm.graph.nodes))
        with gm.graph.inserting_before(extra):
            gm.graph.placeholder("more")
        return 1

    def other_output(gm: GraphModule) -> int:
        output = gm.graph.output_node()
        shorter = next(node for node in gm.graph.nodes if node.op == "placeholder")
        output.args = ((shorter, shorter),)
        return 1

    with pytest.raises(PassError, match="'a' changed the graph's inputs"):
        run(graph(), make("a", drop_an_input))
    with pytest.raises(PassError, match="'a' changed the number, shape or dtype"):
        run(graph(), make("a", other_output))


def test_a_graph_that_does_not_lint_is_refused() -> None:
    def use_before_definition(gm: GraphModule) -> int:
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        last = gm.graph.output_node().all_input_nodes[0]
        first.args = (last, *first.args[1:])
        return 1

    with pytest.raises(RuntimeError, match="before it has been defined"):
        run(graph(), make("a", use_before_definition))


def test_dumps_are_named_by_phase_index_pass_and_stage(tmp_path: Path) -> None:
    run(graph(), make("a"), make("b", double_the_cosine), dump_dir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "graph").iterdir()) == [
        "clean.0.a.after.py",
        "clean.0.a.before.py",
        "clean.1.b.after.py",
        "clean.1.b.before.py",
    ]
    before, after = (
        (tmp_path / "graph" / f"clean.1.b.{stage}.py").read_text() for stage in ("before", "after")
    )
    assert "* 2" not in before
    assert "* 2" in after


def test_the_key_depends_on_options_order_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    key = PassManager(Options()).uuid()
    assert key == PassManager(Options()).uuid()
    assert key != PassManager(Options(strict=True)).uuid()
    assert key != PassManager(Options(), [registered()["remove_noops"]]).uuid()


@pytest.mark.parametrize(
    ("name", "helper"),
    [
        ("remove_noops", "lsync_compile.graph.purity"),
        ("fuse_geglu", "lsync_compile.passes.kernel_pass"),
        ("fuse_geglu", "lsync_compile.kernels.geglu"),
        ("fuse_group_norm_silu", "lsync_compile.kernels.group_norm_kernels"),
    ],
)
def test_the_key_sees_a_changed_helper(
    monkeypatch: pytest.MonkeyPatch, name: str, helper: str
) -> None:
    cls = registered()[name]
    before = source_uuid(cls)
    plain = sources._source

    def changed(module: object) -> str:
        text = plain(module)
        return text + "#" if module.__name__ == helper else text

    monkeypatch.setattr(sources, "_source", changed)
    assert source_uuid(cls) != before


def test_the_key_does_not_depend_on_what_has_been_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package holds each of its modules once it is imported, and its names once used."""
    keys = {name: source_uuid(cls) for name, cls in registered().items()}
    monkeypatch.setattr(lsync_compile, "anything", lsync_compile.compile, raising=False)
    monkeypatch.setattr(lsync_compile, "cli", import_module("lsync_compile.cli"), raising=False)
    assert {name: source_uuid(cls) for name, cls in registered().items()} == keys


def test_registering_twice_or_without_an_option_is_refused() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register(make("remove_noops"))
    with pytest.raises(ValueError, match="option 'gone', which does not exist"):
        register(make("unheard_of", option="gone"))


def test_every_pass_has_a_file_a_test_an_option_and_a_page() -> None:
    page = (ROOT / "docs" / "backend.md").read_text()
    for name, cls in registered().items():
        assert cls.__module__ == f"lsync_compile.passes.{name}"
        assert (ROOT / "tests" / "passes" / f"test_{name}.py").is_file()
        assert cls.spec.option == name
        assert cls.spec.summary.endswith(".")
        assert "::" in (__import__(cls.__module__, fromlist=["x"]).__doc__ or "")
    assert passes_table() in page


def test_options_switch_passes_by_their_name() -> None:
    with pytest.raises(OptionError, match="remove_noops='off' must be True or False"):
        Options(remove_noops="off")
