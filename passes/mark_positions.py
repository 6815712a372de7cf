"""Mark positions, so that what they contribute is explained too, and belongs to their tokens.

    y = add(e, table)  →  y = add(e, source(expand_as(table, e), name="input_ids", ids=ids))
    y = mul(q, cos)    →  y = mul(q, source(expand_as(cos, q), name="input_ids", ids=ids))

Without this pass a position is a constant, which absorbs its share. With it (PA-LRP, Bakish et al.
2025) a learned or sinusoidal position that is added has its share R(P) = P · R / (P + E), a rotary
table that is multiplied one half, and the sum over features and heads goes to the token that stands
there. A position is a constant that comes from a table or from cos and sin, has the length of a
token input in exactly one dimension, and is not the same at all of them. What has the length twice,
a bias between pairs of tokens, belongs to no token and stays a constant. Of several inputs of one
length, positions belong to the one with the largest table: to words, not to their types.
"""

from operator import attrgetter
from typing import Any

from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.operators import aten, is_elementwise, is_op, is_structural
from attnlrp_fx.passes.base import PassContext, PassResult, finish, inherit

TABLES = ("embedding", "index", "index_select", "cos", "sin")
"""Ops that make positions of numbers; so does a slice of a parameter or a buffer."""


def mark_positions(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Insert a source before every use of a position, if positions are to be explained.

    Raises:
        InputError: positions are to be explained, and there are none that belong to tokens.
    """
    result = PassResult("mark_positions")
    graph = graph_module.graph
    sources = [node for node in graph.nodes if node.target is ops.source]
    if not context.positions or any("keep" in node.kwargs for node in sources):
        return result
    tokens = [node for node in sources if "ids" in node.kwargs]
    explained = explained_values(graph)
    for node in list(graph.nodes):
        if node in explained and is_op(node, "add", "mul") and len(node.args) == 2:
            _mark(node, tokens, explained, result)
    if not result.changes:
        raise InputError(
            "there are no positions to explain",
            why="no table of positions, nor cos and sin of them, is added to or multiplied with "
            "what is computed from token ids (a bias between pairs of tokens belongs to none)"
            + "".join(f"; {miss}" for miss in result.near_misses[:3]),
            remedy="compile without positions=True",
        )
    finish(graph_module)
    return result


def _mark(
    node: fx.Node, tokens: list[fx.Node], explained: set[fx.Node], result: PassResult
) -> None:
    """Mark the operand of a sum or a product that is a position."""
    for position, other in ((0, 1), (1, 0)):
        table, value = node.args[position], node.args[other]
        if not isinstance(table, fx.Node) or table in explained or value not in explained:
            continue
        assert isinstance(value, fx.Node)
        if not _is_table(table):
            continue
        found = [(t, keep) for t in tokens if (keep := _kept(table, value, t)) is not None]
        most = max((_rows(t) for t, _ in found), default=0)
        found = [(t, keep) for t, keep in found if _rows(t) == most]
        if len({t.kwargs["name"] for t, _ in found}) > 1:
            result.miss(table, "a position, but several inputs have its length")
            return
        if not found:
            continue
        (token, keep), *_ = found
        graph = node.graph
        with graph.inserting_before(node):
            expanded = graph.call_function(aten.expand_as.default, (table, value))
            inherit(expanded, table, result.name)
            expanded.meta["val"] = table.meta["val"].expand(value.meta["val"].shape)
            marked = graph.call_function(
                ops.source,
                (expanded,),
                {"name": token.kwargs["name"], "ids": token.kwargs["ids"], "keep": keep},
            )
            inherit(marked, expanded, result.name)
        node.update_arg(position, marked)
        explained.add(marked)
        result.changes += 1
        return


def _kept(table: fx.Node, value: fx.Node, token: fx.Node) -> tuple[int, int] | None:
    """The dimensions of a value that are batch and length of a token input, if a table has them."""
    ids: Any = token.kwargs["ids"]
    shape = _sizes(value)
    if len(_sizes(ids)) != 2 or len(shape) < 3 or len(_sizes(table)) > len(shape):
        return None
    batch, length = _sizes(ids)
    own = (*("1",) * (len(shape) - len(_sizes(table))), *_sizes(table))
    dims = [d for d, size in enumerate(own) if size == length != "1"]
    if len(dims) != 1 or dims[0] == 0 or shape[dims[0]] != length or shape[0] != batch:
        return None
    return 0, dims[0]


def _rows(token: fx.Node) -> int:
    """How large the table is in which a token is looked up: words have the largest."""
    looked_up: Any = token.args[0]
    return int(looked_up.all_input_nodes[0].meta["val"].shape[0])


def _is_table(value: fx.Node) -> bool:
    """Whether a constant is looked up by position, or cos or sin of it, moved or rescaled."""
    stack, seen = [value], {value}
    while stack:
        node = stack.pop()
        if not _is_floating(node):
            continue
        if is_op(node, "embedding"):
            return _varies(node.args[1])
        if is_op(node, *TABLES):
            return any(_varies(leaf) for leaf in node.all_input_nodes if leaf.op != "get_attr")
        if is_op(node, "slice", "narrow") and _is_attribute(node.args[0]):
            return True
        if is_structural(node) or is_elementwise(node) or is_op(node, "cat", "stack"):
            earlier = [leaf for leaf in node.all_input_nodes if leaf not in seen]
            stack += earlier
            seen.update(earlier)
    return False


def _varies(index: Any) -> bool:
    """Whether an index is counted, or read off a buffer or an input that is not all the same."""
    stack, seen = [index], {index}
    while stack:
        node = stack.pop()
        if not isinstance(node.meta.get("val"), Tensor):
            continue  # a size
        if is_op(node, "arange", "cumsum") or node.op == "placeholder":
            return True
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(node.graph.owning_module)
            if (
                isinstance(value, Tensor)
                and value.numel()
                and bool((value != value.flatten()[0]).any())
            ):
                return True
        looked_up = is_op(node, "gather", "index", "index_select")
        sources = node.all_input_nodes[:1] if looked_up else node.all_input_nodes
        earlier = [leaf for leaf in sources if leaf not in seen]
        stack += earlier
        seen.update(earlier)
    return False


def _is_attribute(value: Any) -> bool:
    """Whether a value is a parameter or a buffer, a view of one at most."""
    while isinstance(value, fx.Node) and is_structural(value):
        value = value.args[0]
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _sizes(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value.meta["val"].shape))
