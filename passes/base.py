"""What a pass is: a function that takes a valid graph to a valid graph and says what it did."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import Kind
from attnlrp_fx.graph.provenance import describe
from attnlrp_fx.rules.composites import ATTNLRP, Composite
from attnlrp_fx.rules.latent_sites import EARLIER
from attnlrp_fx.torch_private import fake_mode_of


@dataclass(frozen=True)
class PassContext:
    """What passes may know beside the graph."""

    explain: tuple[str, ...] | None = None
    """Inputs to explain; None for all that relevance can reach."""
    composite: Composite = ATTNLRP
    """The composite that assigns rules."""
    fallback: str = "error"
    """What becomes of an op that no rule claims: "error" or "gradient"."""
    positions: bool = False
    """Whether positions are explained with the tokens that stand there, or constant."""
    latent: tuple[Any, ...] = ()
    """The latent values that are read, by role, module or node."""
    editable: bool = False
    """Whether they can be changed, and their relevance masked."""
    sliced: tuple[int, ...] = ()
    """Flat outputs (batch, sequence, classes) of which the target's position alone is returned."""


@dataclass
class PassResult:
    """What one pass did."""

    name: str
    changes: int = 0
    """How many nodes or patterns it changed; 0 says that the graph is as it was."""
    near_misses: list[str] = field(default_factory=list)
    """Patterns that almost matched: the node and the reason."""
    notes: list[str] = field(default_factory=list)
    """Anything else that a user should know."""
    removed: frozenset[str] = frozenset()
    """Names of the nodes that were there before it and no longer are."""

    def miss(self, node: fx.Node, reason: str) -> None:
        """Record a pattern that almost matched."""
        self.near_misses.append(f"{describe(node)}: {reason}")


Pass = Callable[[fx.GraphModule, PassContext], PassResult]


def replace(node: fx.Node, new: fx.Node, constructed_by: str) -> None:
    """Put a new node in another's place, provenance included."""
    inherit(new, node, constructed_by)
    new.meta[EARLIER] = node.meta.get(EARLIER, node.name)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def inherit(new: fx.Node, node: fx.Node, constructed_by: str) -> None:
    """Give a new node the provenance of the node that it stands for, and its name."""
    kind = new.meta.get("kind")
    stands_for = (*node.meta.get("stands_for", ()), node.name)
    new.meta = {**node.meta, "constructed_by": constructed_by, "stands_for": stands_for}
    if kind is not None:
        new.meta["kind"] = kind


def call(like: fx.Node, constructed_by: str, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of an op at the graph's insertion point, with another node's provenance.

    Its value's shape and dtype are what the op makes of its arguments'.
    """
    node = like.graph.call_function(op, args, kwargs)
    kept = {key: value for key, value in like.meta.items() if key not in ("val", "kind")}
    node.meta = {**kept, "constructed_by": constructed_by}
    compute(node)
    return node


def compute(node: fx.Node) -> None:
    """Give a node's value the shape and dtype that its op makes of its arguments'."""
    module = node.graph.owning_module
    assert module is not None
    is_module = node.op == "call_module"
    op: Any = module.get_submodule(str(node.target)) if is_module else node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda leaf: leaf.meta["val"])
    with fake_mode_of(module):
        node.meta["val"] = op(*args, **kwargs)


def finish(graph_module: fx.GraphModule) -> None:
    """Drop what a pass made dead, and recompile."""
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def mark(user: fx.Node, value: fx.Node, marker: ops.Op, kind: Kind, result: PassResult) -> fx.Node:
    """Mark an input of a node, for that node alone, for the composite to decide about."""
    graph = user.graph
    with graph.inserting_after(value):
        marked = graph.call_function(marker, (value,))
    marked.meta["kind"] = kind
    inherit(marked, value, result.name)
    user.replace_input_with(value, marked)
    result.changes += 1
    return marked
