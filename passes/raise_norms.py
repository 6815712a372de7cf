"""Raise normalisations: find the statistic that a value is divided by.

A normalisation multiplies a value by a statistic of itself that undoes its scale:

    x · rsqrt(mean(x²) + ε)        (x − mean x) / sqrt(var x + ε)        x / max(‖x‖, ε)

Written out or not, the statistic is a reduction of x, and homogeneous in x of degree −1 where it
multiplies (+1 where it divides), ε apart. Degrees are computed along the graph:

    x: 1    a·b: sum    a/b: difference    aⁿ: n times    √a: half    rsqrt a: minus half
    mean, sum, max, |a|, a + constant, max(a, constant), views, casts: the same

The statistic is marked, and the composite decides what becomes of it; every rule of LRP holds it
constant, and the rest of the normalisation is linear.
"""

from collections.abc import Set

from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.analysis import explained_values
from attnlrp_fx.operators import Kind, is_op, is_structural, leaves
from attnlrp_fx.passes.base import PassContext, PassResult, finish, inherit

REDUCTIONS = ("mean", "sum", "amax", "linalg_vector_norm", "norm", "std", "var")
SAME_DEGREE = (*REDUCTIONS, "abs", "clamp_min", "clamp", "maximum", "neg")


def raise_norms(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Mark the statistic of every normalisation."""
    result = PassResult("raise_norms")
    graph = graph_module.graph
    explained = explained_values(graph)
    for node in list(graph.nodes):
        if not is_op(node, "mul", "div") or len(node.args) != 2:
            continue
        wanted = -1.0 if is_op(node, "mul") else 1.0
        for position in (1, 0) if is_op(node, "mul") else (1,):
            value, factor = node.args[1 - position], node.args[position]
            if (
                value is factor
                or not {value, factor} <= explained
                or factor.target is ops.statistic
            ):
                continue
            degree = _degree_in(factor, _origins(value, explained), explained)
            if degree is None:
                continue
            if degree != wanted:
                result.miss(
                    node, f"'{factor.name}' is a statistic of degree {degree}, not {wanted}"
                )
                continue
            with graph.inserting_after(factor):
                marked = graph.call_function(ops.statistic, (factor,))
            marked.meta["kind"] = Kind.STATISTIC
            inherit(marked, factor, result.name)
            node.update_arg(position, marked)
            result.changes += 1
            explained.add(marked)
            break
    if result.changes:
        finish(graph_module)
    return result


def _origins(value: fx.Node, explained: Set[fx.Node]) -> set[fx.Node]:
    """The value that is normalised, and what it is a cast, view or centred form of."""
    found = {value}
    stack = [value]
    while stack:
        node = stack.pop()
        if is_structural(node) or is_op(node, "sub"):
            sources = [leaf for leaf in leaves(node.args) if leaf in explained]
            stack.extend(source for source in sources if source not in found)
            found.update(sources)
    return found


def _degree_in(node: fx.Node, origins: Set[fx.Node], explained: Set[fx.Node]) -> float | None:
    """The degree of homogeneity of a reduction of the origins, None if it is not one."""
    degrees: dict[fx.Node, tuple[float, bool] | None] = {}

    def visit(current: fx.Node) -> tuple[float, bool] | None:
        if current not in degrees:
            degrees[current] = None
            degrees[current] = compute(current)
        return degrees[current]

    def compute(current: fx.Node) -> tuple[float, bool] | None:
        """(degree, whether it was reduced) of one node."""
        inputs = [leaf for leaf in leaves((current.args, current.kwargs)) if leaf in explained]
        if current in origins:
            through = _through(current, inputs)
            return through if through is not None and through[1] else (1.0, False)
        return _through(current, inputs)

    def _through(current: fx.Node, inputs: list[fx.Node]) -> tuple[float, bool] | None:
        visited = [visit(leaf) for leaf in inputs]
        found = [pair for pair in visited if pair is not None]
        if not found or len(found) != len(visited):
            return None
        degree, reduced = found[0][0], any(pair[1] for pair in found)
        one = len(found) == 1
        if is_op(current, "mul"):
            return sum(pair[0] for pair in found), reduced
        if is_op(current, "div"):
            if len(found) == 2:
                return found[0][0] - found[1][0], reduced
            return (degree if current.args[0] in explained else -degree), reduced
        if is_op(current, "pow") and one and isinstance(current.args[1], int | float):
            return degree * float(current.args[1]), reduced
        if is_op(current, "square"):
            return degree * 2, reduced
        if is_op(current, "sqrt"):
            return degree / 2, reduced
        if is_op(current, "rsqrt"):
            return -degree / 2, reduced
        if is_op(current, "reciprocal"):
            return -degree, reduced
        if is_op(current, "add", "sub") and all(pair[0] == degree for pair in found):
            return degree, reduced
        if is_op(current, *SAME_DEGREE) and one:
            twice = 2.0 if is_op(current, "var") else 1.0
            return degree * twice, reduced or is_op(current, *REDUCTIONS)
        if is_structural(current) and one:
            return degree, reduced
        return None

    found = visit(node)
    return found[0] if found is not None and found[1] else None
