"""Mark the latent values whose activation and relevance are asked for.

    y = silu(x)  →  y' = latent(silu(x))

A marker hands on what it takes; the tape reads activation and relevance off it. Editable ones also
take two inputs of the program that change the value and mask its relevance, see `ops.latent`. The
site is in the marker's meta and not in its call, so that blocks that are alike stay alike.
"""

from typing import Any

import torch
from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import Kind
from attnlrp_fx.graph.sites import Found
from attnlrp_fx.passes.base import PassContext, PassResult, finish, inherit
from attnlrp_fx.rules.latent_sites import find_sites
from attnlrp_fx.torch_private import fake_mode_of

SITE, CHOSEN = "site", "chosen"
"""The keys of a marker's meta for its site, and for the node that says which experts are chosen."""
EDITS = "edits"
"""The key of an input's meta that tells which site it edits, and that it holds units or places."""
PLACES = ("batch", "token", "row", "position", "query")
"""Dimensions whose elements can be edited apart."""


def mark_latents(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Insert a marker behind each latent value that is asked for.

    Raises:
        InputError: there is no such value, or relevance does not reach it.
    """
    result = PassResult("mark_latents")
    graph = graph_module.graph
    wanted = [one for one in context.latent if isinstance(one, str)]
    done = any(node.meta.get("constructed_by") == result.name for node in graph.nodes)
    if not wanted or done:
        return result
    sites = find_sites(graph, wanted)
    for found in sorted(sites, key=lambda site: site.breadth, reverse=True):
        mark_site(graph_module, found, context.editable, result.name)
        result.changes += 1
    finish(graph_module)
    return result


def mark_site(graph_module: fx.GraphModule, found: Found, editable: bool, name: str) -> None:
    """Insert a marker behind one value, made by the pass of a name."""
    value = found.value
    readers = list(value.users) if found.readers is None else found.readers
    if found.readers is not None:  # wider sites of the same value may stand in between by now
        value = next(leaf for leaf in readers[0].all_input_nodes if _unmarked(leaf) is value)
    marked, edits = value, {}
    if editable and found.site.units is not None:
        inputs = _edits(graph_module, found, value, name)
        edits = {"unit": found.site.unit}
        marked = _behind(value, ops.intervened, (value, *inputs), edits, name)
        marked.meta |= {"absorbs": "intervention", "rule": "Intervention()"}
        marker = _behind(marked, ops.latent, (marked, *inputs), edits, name)
        marker.meta |= {"absorbs": "condition", "rule": "Condition()"}
    else:
        marker = _behind(value, ops.latent, (value,), {}, name)
    marker.meta[SITE], marker.meta[CHOSEN] = found.site, found.chosen
    for reader in readers:
        reader.replace_input_with(value, marker)


def _unmarked(node: fx.Node) -> fx.Node:
    """The value that is marked."""
    while node.target in ops.LATENT:
        node = node.all_input_nodes[0]
    return node


def _behind(
    value: fx.Node, op: Any, args: tuple[fx.Node, ...], kwargs: dict[str, Any], name: str
) -> fx.Node:
    """A call of an op behind a value, with its provenance."""
    with value.graph.inserting_after(value):
        node = value.graph.call_function(op, args, kwargs)
    node.meta["kind"] = Kind.LINEAR
    inherit(node, value, name)
    return node


def _edits(
    graph_module: fx.GraphModule, found: Found, value: fx.Node, made_by: str
) -> list[fx.Node]:
    """The inputs that say how the units of a site are changed and masked, and where."""
    graph, site = graph_module.graph, found.site
    like = value.meta["val"]
    wide = torch.promote_types(like.dtype, torch.float32)
    places: list[Any] = [
        size if name in PLACES else 1
        for dim, (name, size) in enumerate(zip(site.dims, like.shape, strict=True))
        if dim != site.unit
    ]
    made = []
    shapes: dict[str, list[Any]] = {"units": [3, site.units], "places": [2, *places]}
    for part, shape in shapes.items():
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            node = graph.placeholder(f"{part}_of_{value.name}")
        node.target = node.name
        with fake_mode_of(graph_module):
            fake = torch.empty(shape, dtype=wide, device=like.device)
        node.meta = {"val": fake, "constructed_by": made_by, EDITS: (site, part)}
        made.append(node)
    return made if found.chosen is None else [*made, found.chosen]


def markers_of(graph: fx.Graph) -> dict[str, fx.Node]:
    """The markers of a graph by the names of their sites, in order."""
    return {
        node.meta[SITE].name: node
        for node in graph.nodes
        if node.target in (ops.latent, ops.rejoined) and SITE in node.meta
    }


def value_of(marker: fx.Node) -> fx.Node:
    """What a marker shows: the value that it hands on, or an autoencoder's error."""
    error: Any = marker.args[1] if marker.target is ops.rejoined else marker
    assert isinstance(error, fx.Node)
    return error
