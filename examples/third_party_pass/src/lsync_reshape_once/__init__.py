"""View what lies in memory in another order, instead of copying it first::

    c = x.contiguous()
    y = c.view(8, 32, 16, 16)      ->    y = x.reshape(8, 32, 16, 16)

``reshape`` copies only where it must. In LatentSync's UNet that spares each transformer block a
copy: the convolution after it takes the channels-last layout as it is, and so rounds otherwise. The
pass stays away from graphs that write in place, and from memory that the graph's results lie in.
"""

from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, replace
from lsync_compile.graph.purity import has_writes, result_storages, storage
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase


class ReshapeOnce(Pass):
    """Counts the copies that are left to ``reshape``."""

    spec = PassSpec(
        name="reshape_once",
        phase=Phase.FINISH,
        summary="Views instead of copying where memory allows it; rounding may differ.",
        before=("channels_last",),
        exact=False,
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        return "writes in place" if has_writes(gm.graph) else ""

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        results = result_storages(gm.graph)
        views = [n for n in gm.graph.nodes if _is(n, "view") and _copied_for(n)]
        views = [n for n in views if storage(n) not in results]
        for view in views:
            source = view.args[0].args[0]
            with gm.graph.inserting_before(view):
                replace(view, call(gm.graph, "reshape", source, *view.args[1:], like=view))
        return len(views)


def _copied_for(view: Node) -> bool:
    """Whether its input is a plain copy, made for this view alone."""
    copy = view.args[0]
    plain = _is(copy, "contiguous") and len(copy.args) == 1 and not copy.kwargs
    return plain and len(copy.users) == 1


def _is(node: Node, method: str) -> bool:
    return node.op == "call_method" and node.target == method
