"""Compiles a graph with Inductor, specialised to the shapes it was captured with.

``standalone_compile`` with ``"from_example_inputs"`` gives each graph its own shape environment,
independent of the capture under way. Two kinds of graph cannot go that way and take
``compile_fx`` inside dynamo's own tracing context: symbolic sizes, which a new shape environment
does not know, and graphs that need a backward, which is compiled lazily there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from lsync_compile.lowering.base import Lowered
from lsync_compile.lowering.cache_key import ops_key
from lsync_compile.lowering.written_once import written_once
from lsync_compile.options import Options

log = logging.getLogger(__name__)


def lower(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Lowered:
    """Compile for these inputs' sizes, dtypes and device.

    Raises:
        torch._inductor.exc.InductorError: where Inductor cannot; see
            ``lsync_compile.backend.LOWERING_ERRORS`` for what else may come out of it.
    """
    gm = written_once(gm)
    inputs, patches = list(example_inputs), {**_keyed(gm), **options.inductor}
    hits = _hits()
    note = _needs_compile_fx(inputs)
    call: Any = None if note else _standalone(gm, inputs, patches)
    if call is None:
        from torch._inductor.compile_fx import compile_fx

        note = note or "standalone_compile failed: compile_fx"
        call = compile_fx(gm, inputs, config_patches=patches)
    return Lowered(call, cache_hit=_hits() > hits, note=note)


def _keyed(gm: GraphModule) -> dict[str, Any]:
    """The setting that puts the sources of our ops into the keys of torch's caches."""
    key = ops_key(gm.graph)
    return {} if key is None else {"post_grad_custom_post_pass": key}


def _standalone(gm: GraphModule, inputs: list[Any], patches: dict[str, Any]) -> Any:
    """The compiled artifact; None where the wrapping around Inductor fails, not Inductor itself."""
    try:
        return torch._inductor.standalone_compile(
            gm, inputs, dynamic_shapes="from_example_inputs", options={"config_patches": patches}
        )
    except TorchDynamoException:  # Inductor's own failure, which compile_fx would only repeat
        raise
    except (AssertionError, AttributeError, RuntimeError, TypeError):
        # A prototype of torch's: it asserts what its caches hold and its arguments have changed.
        log.info("standalone_compile failed, trying compile_fx", exc_info=True)
        return None


def _needs_compile_fx(example_inputs: Sequence[Any]) -> str:
    if any(_is_symbolic(value) for value in example_inputs):
        return "symbolic sizes: compile_fx"
    tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients wanted: compile_fx"
    return ""


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _hits() -> int:
    """Cache hits so far; dynamo compiles under one lock, so a difference is this graph's."""
    return (
        counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    )
