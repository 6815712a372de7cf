"""Give every explained node exactly one rule, and write it into the graph.

    y = aten.op(*args)  →  y = ops.rule(aten.op, *args, **parameters)

Nodes are visited in order, so that a node that its rule holds constant is a constant for all that
follows: a product with it has one factor less. An op that no rule claims is an error, unless the
gradient fallback was asked for; then the report says so.
"""

import operator
from collections import Counter
from collections.abc import Set
from typing import Any

import torch
from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.errors import RuleError
from attnlrp_fx.graph.analysis import explained_values, parameter_values
from attnlrp_fx.graph.operators import Kind, is_elementwise, is_op, kind_of, leaves
from attnlrp_fx.graph.provenance import describe, target_name
from attnlrp_fx.passes.base import PassContext, PassResult, finish
from attnlrp_fx.rules.roles import Role, is_join, is_layer, roles
from attnlrp_fx.rules.rules import Constant, Gradient, Rule, Site

FALLBACK = "fallback"
"""The authority of a rule that no entry of the composite gave."""
AFFINE = ("_native_batch_norm_legit_no_training",)
"""Ops beside elementwise ones that are affine in each element."""


def assign_rules(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Rewrite every explained node to its rule's relevance op.

    Raises:
        RuleError: no rule claims an op, or a rule stands at an op that it does not fit.
    """
    result = PassResult("assign_rules")
    graph = graph_module.graph
    values = explained_values(graph)
    explained = {node for node in values if _is_open(node)}
    roles_of = roles(graph, values)
    parameters = parameter_values(graph)
    live = {
        node for node in graph.nodes if ops.is_explained(node) and node.target not in ops.LATENT
    }
    rules: dict[fx.Node, tuple[Kind, Rule]] = {}
    for node in graph.nodes:
        if node.target in ops.LATENT and node.args[0] in live:
            live.add(node)
        elif node in explained and any(leaf in live for leaf in leaves((node.args, node.kwargs))):
            kind = kind_of(node, live)
            rule = _rule(node, kind, roles_of.get(node, set()), context, result)
            site = _site(node, kind, live, parameters)
            node.meta["vanishes"] = site.vanishes
            rules[node] = kind, rule.at(site)
            if not isinstance(rules[node][1], Constant):
                live.add(node)
    counts: Counter[str] = Counter()
    reaching = _reaching(graph, live)
    for node, (kind, rule) in rules.items():
        if node in reaching or isinstance(rule, Constant):
            counts[str(rule)] += 1
            result.changes += 1
            _rewrite(graph, node, kind, rule)
    result.notes += [f"{count} × {rule}" for rule, count in counts.most_common()]
    if result.changes:
        finish(graph_module)
    return result


def _is_open(node: fx.Node) -> bool:
    """Whether a node has no rule yet, and is no marker that needs none."""
    is_marker = node.target in ops.LATENT or ops.is_explained(node)
    return "rule" not in node.meta and not is_marker


def _site(node: fx.Node, kind: Kind, live: Set[fx.Node], parameters: Set[fx.Node]) -> Site:
    """What a rule may ask of a node, given what is explained."""
    inputs = [leaf for leaf in leaves((node.args, node.kwargs)) if leaf in live]
    is_pointwise = len(inputs) == 1 and _is_pointwise(node, kind, inputs[0])
    return Site(
        is_layer=is_layer(node, live, parameters),
        is_join=is_join(node, live),
        is_pointwise=is_pointwise,
        vanishes=is_pointwise and kind is Kind.ACTIVATION and _is_zero_at_zero(node),
    )


def _is_pointwise(node: fx.Node, kind: Kind, x: fx.Node) -> bool:
    value = node.meta["val"]
    y = value[0] if isinstance(value, list | tuple) else value
    by_element = is_elementwise(node) or is_op(node, *AFFINE) or kind is not Kind.LINEAR
    return by_element and bool(y.shape == x.meta["val"].shape)


def _is_zero_at_zero(node: fx.Node) -> bool:
    """Whether an activation of one value and numbers is zero at zero."""
    others = [*node.args[1:], *node.kwargs.values()]
    if any(isinstance(arg, fx.Node) for arg in others):
        return False
    op: Any = node.target
    if node.op == "call_module":
        assert node.graph.owning_module is not None
        op = node.graph.owning_module.get_submodule(str(node.target))
    value = op(torch.zeros([1] * node.meta["val"].dim()), *node.args[1:], **node.kwargs)
    return bool(value == 0)


def _reaching(graph: fx.Graph, live: Set[fx.Node]) -> set[fx.Node]:
    """The live nodes from which relevance of an output can come: not only through constants."""
    reaching: set[fx.Node] = set()
    stack = [leaf for leaf in graph.output_node().all_input_nodes if leaf in live]
    while stack:
        node = stack.pop()
        if node not in reaching:
            reaching.add(node)
            stack.extend(leaf for leaf in node.all_input_nodes if leaf in live)
    return reaching


def _rewrite(graph: fx.Graph, node: fx.Node, kind: Kind, rule: Rule) -> None:
    """Write a node's rule into the graph."""
    if isinstance(rule, Constant) or node.target is operator.getitem:
        node.meta["rule"] = str(rule)
        return
    if node.target in ops.MARKERS:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
        return
    assert rule.op is not None
    op: Any = node.target
    if node.op == "call_module":
        with graph.inserting_before(node):
            op = graph.get_attr(str(node.target))
    node.meta |= {
        "rule": str(rule),
        "formula": rule.formula,
        "kind": kind,
        "op": node.target,
        "constructed_by": node.meta.get("constructed_by", "assign_rules"),
    }
    node.args = (op, *node.args)
    node.kwargs = {**node.kwargs, **rule.parameters_at(op)}
    node.target = rule.op
    node.op = "call_function"


def _rule(
    node: fx.Node, kind: Kind, roles: Set[Role], context: PassContext, result: PassResult
) -> Rule:
    entry = context.composite.entry_for(node, kind, roles)
    if entry is None and context.fallback == "gradient":
        result.notes.append(f"gradient fallback: {describe(node)}")
        node.meta["authority"] = FALLBACK
        return Gradient()
    if entry is None:
        raise RuleError(
            f"no rule of composite '{context.composite.name}' claims {target_name(node.target)}",
            where=describe(node),
            why=f"its kind is {kind}" if kind is not Kind.UNKNOWN else "the op is not in the table",
            remedy="add an entry, e.g. composite.with_rules((Match(op="
            f"'{target_name(node.target)}'), Gradient())), or compile with fallback='gradient'",
        )
    match, rule = entry
    node.meta["authority"] = str(match)
    if kind not in rule.kinds:
        raise RuleError(
            f"rule {rule} cannot stand at an op of kind '{kind}'",
            where=describe(node),
            remedy=f"narrow the matcher to: {', '.join(sorted(rule.kinds))}",
        )
    return rule
