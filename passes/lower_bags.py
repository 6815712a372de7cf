"""Lower bags of embeddings of equal length to what they are: a look-up and a sum.

    bags = embedding_bag(table, reshape(ids, [-1]), arange(0, B * L, L), mode)
      →  rows = embedding(table, ids);  bags = sum(rows, 1)  or  mean(rows, 1)

for ids of (B, L), which is how `nn.EmbeddingBag` looks a matrix up. So each index has relevance of
its own. Bags that offsets delimit, weigh or pad have no such form and stay.
"""

import operator
from typing import Any

from torch import fx

from attnlrp_fx.graph.operators import aten, is_op
from attnlrp_fx.passes.base import PassContext, PassResult, finish, replace

REDUCTIONS = {0: aten.sum.dim_IntList, 1: aten.mean.dim}
"""The modes that are linear, by PyTorch's number; the third is the maximum."""


def lower_bags(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace every look-up of bags of one length by an embedding and its sum or mean."""
    result = PassResult("lower_bags")
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not is_op(node, "embedding_bag"):
            continue
        ids, reason = _matrix(node)
        if ids is None:
            result.miss(node, reason)
            continue
        table, mode = node.args[0], node.args[4]
        bags = next(part for part in node.users if part.args[1] == 0)
        assert isinstance(table, fx.Node)
        with graph.inserting_before(bags):
            rows = graph.call_function(aten.embedding.default, (table, ids))
            new = graph.call_function(REDUCTIONS[mode], (rows, [1]))
        replace(bags, new, result.name)
        rows.meta = {**new.meta, "val": table.meta["val"].new_empty(*_sizes(ids, table))}
        for part in list(node.users):
            graph.erase_node(part)
        graph.erase_node(node)
        result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


def _matrix(node: fx.Node) -> tuple[fx.Node | None, str]:
    """The matrix of indices whose rows are the bags, or None and why there is none."""
    defaults = (None, None, None, False, 0, False, None, False, None)
    given: tuple[Any, ...] = (*node.args, *defaults[len(node.args) :])
    _, flat, offsets, _, mode, _, weights, last, padding = given
    if mode not in REDUCTIONS:
        return None, "it takes the maximum of a bag"
    if weights is not None or last or padding is not None:
        return None, "its bags are weighed, padded or delimited to the end"
    used = [part for part in node.users if part.users]
    if [part.target is operator.getitem and part.args[1] for part in used] != [0]:
        return None, "more than the bags is used"
    ids = flat.args[0] if is_op(flat, "reshape", "view", "flatten") else None
    if ids is None or ids.meta["val"].dim() != 2 or not is_op(offsets, "arange"):
        return None, "offsets delimit the bags"
    rows, length = ids.meta["val"].shape
    bounds = [0, *offsets.args] if len(offsets.args) == 1 else list(offsets.args)
    start, end, step = [_value(bound) for bound in (*bounds, 1)[:3]]
    if start != 0 or str(step) != str(length) or str(end) != str(rows * length):
        return None, "its bags are not the rows of the indices"
    return ids, ""


def _value(bound: Any) -> Any:
    return bound.meta["val"] if isinstance(bound, fx.Node) else bound


def _sizes(ids: fx.Node, table: fx.Node) -> list[Any]:
    return [*ids.meta["val"].shape, table.meta["val"].shape[1]]
