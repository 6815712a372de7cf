"""The passes, one a file, and the pipeline, one ordered tuple.

A user passes a longer tuple: `compile(..., passes=(*NORMALISE, *RAISE, mine, *ASSIGN))`.
"""

from torch import fx

from attnlrp_fx.errors import PassError
from attnlrp_fx.passes.assign_rules import assign_rules
from attnlrp_fx.passes.base import Pass, PassContext, PassResult
from attnlrp_fx.passes.drop_assertions import drop_assertions
from attnlrp_fx.passes.drop_identities import drop_identities
from attnlrp_fx.passes.insert_autoencoders import insert_autoencoders
from attnlrp_fx.passes.lower_attention import lower_attention
from attnlrp_fx.passes.lower_bags import lower_bags
from attnlrp_fx.passes.lower_copies import lower_copies
from attnlrp_fx.passes.lower_pools import lower_pools
from attnlrp_fx.passes.lower_rrelu import lower_rrelu
from attnlrp_fx.passes.mark_latents import mark_latents
from attnlrp_fx.passes.mark_positions import mark_positions
from attnlrp_fx.passes.mark_signs import mark_signs
from attnlrp_fx.passes.mark_sources import mark_sources
from attnlrp_fx.passes.merge_batch_norms import merge_batch_norms
from attnlrp_fx.passes.promote_casts import promote_casts
from attnlrp_fx.passes.push_selections import push_selections
from attnlrp_fx.passes.raise_activations import raise_activations
from attnlrp_fx.passes.raise_attention import raise_attention
from attnlrp_fx.passes.raise_norms import raise_norms
from attnlrp_fx.passes.raise_routing import raise_routing
from attnlrp_fx.passes.raise_scans import raise_scans
from attnlrp_fx.passes.return_latents import return_latents
from attnlrp_fx.passes.slice_targets import slice_targets

NORMALISE: tuple[Pass, ...] = (
    drop_assertions,
    lower_bags,
    lower_copies,
    lower_pools,
    lower_rrelu,
    drop_identities,
    merge_batch_norms,
)
"""Passes that leave the graph's meaning unchanged."""

RAISE: tuple[Pass, ...] = (
    mark_sources,
    mark_positions,
    insert_autoencoders,
    raise_attention,
    raise_norms,
    raise_routing,
    raise_scans,
    raise_activations,
    lower_attention,
    mark_latents,
)
"""Passes that recognise what was decomposed."""

ASSIGN: tuple[Pass, ...] = (
    slice_targets,
    push_selections,
    assign_rules,
    mark_signs,
    return_latents,
)
"""Passes that decide what is computed, and write rules into the graph."""

PIPELINE: tuple[Pass, ...] = (*NORMALISE, *RAISE, *ASSIGN)
"""The default pipeline, in order."""

OPTIONAL: tuple[Pass, ...] = (promote_casts,)
"""Passes to put before it for a purpose of one's own."""


def run_passes(
    graph_module: fx.GraphModule, context: PassContext, passes: tuple[Pass, ...] = PIPELINE
) -> list[PassResult]:
    """Run passes in order on a graph, in place, verifying it after each.

    Raises:
        PassError: a pass left an invalid graph behind.
    """
    results = []
    names = _names(graph_module)
    for run in passes:
        results.append(run(graph_module, context))
        before, names = names, _names(graph_module)
        results[-1].removed = before - names
        verify(graph_module, results[-1].name)
    return results


def _names(graph_module: fx.GraphModule) -> frozenset[str]:
    return frozenset(node.name for node in graph_module.graph.nodes)


def verify(graph_module: fx.GraphModule, name: str) -> None:
    """Check a graph after a pass: it lints, and every tensor still knows its shape and dtype."""
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise PassError(f"pass '{name}' left an invalid graph", why=str(error)) from error
    for node in graph_module.graph.nodes:
        is_value = node.op == "placeholder" or (node.op == "call_function" and node.users)
        if is_value and "val" not in node.meta:
            raise PassError(f"pass '{name}' left node '{node.name}' without meta['val']")


__all__ = [
    "ASSIGN",
    "NORMALISE",
    "OPTIONAL",
    "PIPELINE",
    "RAISE",
    "Pass",
    "PassContext",
    "PassResult",
    "assign_rules",
    "drop_assertions",
    "drop_identities",
    "insert_autoencoders",
    "lower_attention",
    "lower_bags",
    "lower_copies",
    "lower_pools",
    "lower_rrelu",
    "mark_latents",
    "mark_positions",
    "mark_signs",
    "mark_sources",
    "merge_batch_norms",
    "promote_casts",
    "push_selections",
    "raise_activations",
    "raise_attention",
    "raise_norms",
    "raise_routing",
    "raise_scans",
    "return_latents",
    "run_passes",
    "slice_targets",
    "verify",
]
