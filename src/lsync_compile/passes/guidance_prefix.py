"""Compute once what is the same in both halves of a guided batch.

Classifier-free guidance (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598) runs the network
for the same sample with and without its condition, as two halves of one batch. Until the condition
is first looked at, the halves are equal: conv_in, the first residual block and the first
self-attention are computed twice for nothing.

No graph can know that the halves of its inputs are equal. The runtime vouches for it
(``StepContext.vouched``, "guidance"), and the graph is only run while it does.

Case 1, before the condition is looked at, half of the batch is computed, and doubled where the
whole one is needed::

    x = conv2d(sample, w)               h = conv2d(sample[:1], w)
    y = attend(x, sound)          ->    x = cat([h, h])
                                        y = attend(x, sound)

Case 2, what is already a half of such a value is the value's half itself::

    x = conv2d(sample, w)               h = conv2d(sample[:1], w)
    y = linear(x[1:], v)          ->    y = linear(h, v)

What depends on the timestep alone stays whole, since it is not computed in each step anyway. An
operation that is not known to treat each sample alone (:mod:`lsync_compile.graph.halving`) ends the
prefix, and so does anything whose halves are not equal.

Not bit for bit: libraries choose other kernels for another batch size, which round otherwise.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, example, refresh
from lsync_compile.graph.census import ATTENTION, CONVOLUTIONS, PRODUCTS
from lsync_compile.graph.dependency import find_argument
from lsync_compile.graph.halving import half_of, halved, is_half
from lsync_compile.graph.purity import storage, why_seen
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

_HEAVY = frozenset({*CONVOLUTIONS, *PRODUCTS, *ATTENTION})


@register
class GuidancePrefix(Pass):
    """Cases above; counts the operations that run at half the batch."""

    spec = PassSpec(
        name="guidance_prefix",
        phase=Phase.SPECIALISE,
        option="guidance_prefix",
        after=("null_audio",),
        targets=("unet",),
        exact=False,
        summary="Computes what both halves of a guided batch have in common once: all before the "
        "first attention to the sound.",
        source="Ho and Salimans, 2022, arXiv:2207.12598",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        """Not vouched for, no two halves, or a graph whose values others see."""
        if "guidance" not in context.vouched:
            return "nobody vouches that the batch is two equal halves"
        sample = example(find_argument(gm.graph, "sample"))
        if sample is None or sample.dim() == 0 or sample.shape[0] % 2:
            return "no sample with two halves"
        return why_seen(gm.graph)

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        sample = find_argument(gm.graph, "sample")
        assert sample is not None  # see veto
        prefix = _Prefix(gm, sample)
        prefix.halve()
        return prefix.rewrite()


class _Prefix:
    """The nodes whose halves are equal.

    Attributes:
        equal: their first half, for each of them; None where it has not been needed yet.
        of_sample: those that are computed from the sample.
    """

    def __init__(self, gm: GraphModule, sample: Node) -> None:
        self.graph = gm.graph
        self.sample = sample
        self.equal: dict[Node, Node | None] = {sample: None}
        self.of_sample: list[Node] = []
        timestep = find_argument(gm.graph, "timestep")
        value = example(timestep)
        if timestep is not None and value is not None and value.dim() and not value.shape[0] % 2:
            self.equal[timestep] = None

    def halve(self) -> None:
        """Insert the half of each operation whose result has equal halves."""
        from_sample = {self.sample}
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                continue
            with self.graph.inserting_before(node.next):
                half = halved(node, self._half)
            if half is None:
                continue
            if from_sample.isdisjoint(node.all_input_nodes):
                self.equal[node] = None  # stays whole, and is sliced where a half is needed
                self.graph.erase_node(half)
            else:
                self.equal[node] = half
                from_sample.add(node)
                self.of_sample.append(node)

    def _half(self, node: Node) -> Node | None:
        """The half of an input of the node being halved; sliced where it has none yet."""
        if node not in self.equal:
            return None
        half = self.equal[node]
        if half is None:
            half = self.equal[node] = half_of(node, second=False)
        return half

    def rewrite(self) -> int:
        """Let the rest of the graph use the halves; return how many operations became halves."""
        if not any(node.target in _HEAVY for node in self.of_sample):
            return 0
        inside = {*self.of_sample, *(half for half in self.equal.values() if half is not None)}
        whole: set[Node] = set()

        def outside(node: Node) -> list[Node]:
            """Users that need the whole batch."""
            return [
                user
                for user in node.users
                if user in whole or (user not in inside and not is_half(user, node))
            ]

        for node in reversed(self.of_sample):
            # Views stay: what they look at is doubled. So do tuples, whose parts are.
            if outside(node) and (_is_view(node) or example(node) is None):
                whole.add(node)
        for node in self.of_sample:
            half = self.equal[node]
            assert half is not None  # of those computed from the sample
            for user in [user for user in node.users if is_half(user, node)]:
                user.replace_all_uses_with(half)
            refresh(half)
            users = [] if node in whole else outside(node)
            if users:
                double = self._double(half, like=node)
                node.replace_all_uses_with(double, delete_user_cb=users.__contains__)
                refresh(double)
        return len(self.of_sample) - len(whole)

    def _double(self, half: Node, like: Node) -> Node:
        """The whole batch, in the layout of its half.

        Under a second name: a tensor joined with itself is written out by Inductor with its
        channels apart, and all that reads it copies it back.
        """
        with self.graph.inserting_before(half.next):
            join = call(self.graph, torch.cat, [half, half], like=like)
        with self.graph.inserting_before(join):
            other = call(self.graph, torch.ops.aten.alias.default, half, like=like)
        join.args = ([half, other],)
        return join


def _is_view(node: Node) -> bool:
    sources = node.all_input_nodes
    return len(sources) == 1 and storage(node) is not None and storage(node) == storage(sources[0])
