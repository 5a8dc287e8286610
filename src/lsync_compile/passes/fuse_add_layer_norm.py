"""Add a residual and normalise the sum in one kernel; both results are used.

Case 1, between the parts of a transformer block::

    t = a + x                            t, n = lsync.add_layer_norm(a, x, w, b, eps)
    n = layer_norm(t, (C,), w, b, eps)   ->
    …, t + …                             …, t + …

Case 2, where frames are told their numbers after the norm, as
:mod:`~lsync_compile.passes.fuse_temporal_attention` leaves it, rows sorted by batch and frame::

    m = n.unflatten(0, (b, f)) + p       # p (f, 1, C)
    y = m.flatten(0, 1)                  ->    t, y = lsync.add_layer_norm(a, x, w, b, eps, p')

Case 3, the same where each row is a position and holds its frames::

    y = n + p                            # n (N, f, C), p (1, f, C)

Cases 2 and 3 ask that nothing else uses the norm. The pass stays away from sums of tensors that
differ in shape or dtype, from norms over more than the last dimension or without weights, and
where something uses the sum before its norm is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, drop, example, item, replace
from lsync_compile.graph.match import ADD, argument, calls, operands, sole_user
from lsync_compile.kernels.add_layer_norm import MAX_CHANNELS, SPEC
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.add_layer_norm.default


@dataclass(frozen=True)
class Position:
    """Where the frames' numbers are added to a norm.

    Attributes:
        last: the node of the norm's shape that has the numbers in it.
        table: ``(frames, 1, C)`` or ``(1, frames, C)``.
        frames: how many.
        rows_are_frames: case 2; otherwise case 3.
    """

    last: Node
    table: Node
    frames: int
    rows_are_frames: bool


@register
class FuseAddLayerNorm(KernelPass):
    """Case by case above; counts the norms."""

    spec = PassSpec(
        name="fuse_add_layer_norm",
        phase=Phase.REWRITE,
        option="fuse_add_layer_norm",
        after=("fuse_temporal_attention",),
        exact=False,
        summary="Residual sums with the layer norm of the sum, and the frame's encoding where "
        "there is one, in one kernel; rounding differs.",
        source="Ba et al. (2016), https://arxiv.org/abs/1607.06450",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        return sum(self._fuse(node, context) for node in list(gm.graph.nodes))

    def _fuse(self, norm: Node, context: PassContext) -> bool:
        total = normalised(norm)
        terms = operands(total, ADD)
        if total is None or terms is None or not self.takes(total, context):
            return False
        weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
        eps = argument(norm, 4, "eps", 1e-5)
        position = frames_added(norm)
        others = [user for user in total.users if user is not norm]
        if position is not None and any(user < position.last for user in others):
            position = None
        last = norm if position is None else position.last
        if any(user < last for user in others):
            return False
        graph = norm.graph
        with graph.inserting_before(last):
            if position is None:
                sums, normed = _parts(call(graph, OP, *terms, weight, bias, eps, like=norm))
            else:
                sums, normed = _with_position(norm, terms, (weight, bias, eps), position)
        replace(last, normed)
        drop(last)
        if others:
            replace(total, sums)
            drop(total)
        return True


def normalised(norm: Node) -> Node | None:
    """``t`` where the node is a layer norm of ``t`` over its last dimension, with weights."""
    if not calls(norm, F.layer_norm):
        return None
    total, shape = argument(norm, 0, "input"), argument(norm, 1, "normalized_shape")
    before, after = example(total), example(norm)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    if tuple(shape) != tuple(before.shape[-1:]) or before.shape[-1] > MAX_CHANNELS:
        return None
    weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
    return None if example(weight) is None or example(bias) is None else total


def frames_added(norm: Node) -> Position | None:
    """Cases 2 and 3."""
    value, user = example(norm), sole_user(norm)
    if value is None or value.dim() != 3 or user is None:
        return None
    rows_are_frames = calls(user, "unflatten")
    added = sole_user(user) if rows_are_frames else user
    table = _added_to(user if rows_are_frames else norm, added)
    numbers, sums = example(table), example(added)
    if added is None or table is None or numbers is None or sums is None:
        return None
    if len({value.dtype, numbers.dtype, sums.dtype}) > 1:
        return None
    rows, tokens, channels = value.shape
    if not rows_are_frames:
        fits = sums.shape == value.shape and numbers.shape == (1, tokens, channels)
        return Position(added, table, tokens, False) if fits else None
    last, frames = sole_user(added), numbers.shape[0]
    fits = numbers.shape == (frames, 1, channels)
    fits = fits and sums.shape == (rows // frames, frames, tokens, channels)
    if not fits or last is None or not calls(last, "flatten") or last.args[1:] != (0, 1):
        return None
    return Position(last, table, frames, True)


def _added_to(operand: Node, added: Node | None) -> Node | None:
    """The other operand where the node is a sum of ``operand`` and another."""
    if added is None or not calls(added, *ADD) or added.kwargs or len(added.args) != 2:
        return None
    first, second = added.args
    other = second if first is operand else first
    return other if isinstance(other, Node) and other is not operand else None


def _with_position(
    norm: Node, terms: tuple[Node, Node], parameters: tuple[Any, ...], position: Position
) -> tuple[Node, Node]:
    """Insert the op for cases 2 and 3, and give the sum and the norm in the sum's shape."""
    graph, value = norm.graph, example(norm)
    assert value is not None  # frames_added() has looked at it
    channels = value.shape[2]
    table = call(graph, "reshape", position.table, position.frames, channels, like=norm)
    if position.rows_are_frames:
        return _parts(call(graph, OP, *terms, *parameters, table, like=norm))
    # Positions times frames as rows of one token: the table repeats along the rows.
    rows = [call(graph, "reshape", term, -1, 1, channels, like=norm) for term in terms]
    first, second = _parts(call(graph, OP, *rows, *parameters, table, like=norm))
    return (
        call(graph, "view", first, *value.shape, like=norm),
        call(graph, "view", second, *value.shape, like=norm),
    )


def _parts(both: Node) -> tuple[Node, Node]:
    return item(both, 0), item(both, 1)
