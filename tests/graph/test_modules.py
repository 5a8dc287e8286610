"""Every node of the real UNet leads back to its module, by path and by identity."""

from __future__ import annotations

from captures import captured_unet
from torch import nn
from torch.fx import Graph

from lsync_compile.graph.modules import module_names, module_path, named_path


def test_paths_are_those_of_named_modules() -> None:
    unet, gm, _ = captured_unet()
    names = module_names(unet)
    nodes = [node for node in gm.graph.nodes if node.meta.get("nn_module_stack")]
    assert len(nodes) > 3000
    paths = {module_path(node) for node in nodes}
    assert paths <= set(dict(unet.named_modules()))
    assert all(named_path(node, names) == module_path(node) for node in nodes)
    assert any(path.endswith("attn2.to_out.0") or ".attn2" in path for path in paths)


def test_a_node_of_another_root_has_no_name() -> None:
    _, gm, _ = captured_unet()
    node = next(node for node in gm.graph.nodes if node.meta.get("nn_module_stack"))
    assert named_path(node, module_names(nn.Linear(1, 1))) is None


def test_nodes_without_a_module_belong_to_the_root() -> None:
    node = Graph().placeholder("x")
    assert module_path(node) == ""
    assert named_path(node, {}) is None


def test_the_ways_dynamo_writes_a_path() -> None:
    node = Graph().placeholder("x")
    for written, path in {
        "L['self'].down_blocks.0.conv": "down_blocks.0.conv",
        "L['self'].__dict__['_modules']['up_blocks'].3.resnets[1]": "up_blocks.3.resnets.1",
        "L['self']._modules['mid']._modules['0']": "mid.0",
        "L['self']": "",
    }.items():
        node.meta["nn_module_stack"] = {"1": (written, nn.Module)}
        assert module_path(node) == path
