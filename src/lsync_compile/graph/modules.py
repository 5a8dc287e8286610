"""From a node of a captured graph to the module that it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from torch.fx import Node

# Dynamo writes the root as a local variable and children as keys, indices or attributes:
# L['self'].__dict__['_modules']['up_blocks'].0.resnets[1]
_ROOT = re.compile(r"^L\['\w+'\]")
_CHILDREN = re.compile(r"\.__dict__\['_modules'\]|\._modules\b")
_KEY = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")


def module_path(node: Node) -> str:
    """Dotted path of the innermost module, as in ``named_modules()``; "" for the root itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = _CHILDREN.sub("", _ROOT.sub("", list(stack.values())[-1][0]))
    return _KEY.sub(r".\1", path).strip(".")


def module_names(root: nn.Module) -> dict[str, str]:
    """``str(id(module))`` to path, for :func:`named_path`."""
    return {str(id(module)): name for name, module in root.named_modules()}


def named_path(node: Node, names: Mapping[str, str]) -> str | None:
    """Path of the innermost module by identity; None where it is none of ``names``.

    Unlike :func:`module_path` it tells apart roots, and says when a node is not of this one.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    return names.get(str(list(stack)[-1]).partition("@")[0])
