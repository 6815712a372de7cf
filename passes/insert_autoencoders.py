"""Insert sparse autoencoders, so that their features are latent values.

    h  →  f = encode(h)                  features, a site
          e = h − decode(f)              what the autoencoder misses, a constant
          y = rejoined(decode(f), e)     h again, to rounding

The model goes on with h as it was. Relevance goes back through decoder, features and encoder; the
error term keeps its share, e·c, which the ledger names and which is a site too. Where features can
be changed, what they decode to as changed is added to the error of what they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnlrp_fx import ops
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.errors import CaptureError, InputError
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.graph.sites import SAE, Found, Site
from attnlrp_fx.passes.base import PassContext, PassResult, compute, finish, inherit
from attnlrp_fx.passes.mark_latents import CHOSEN, SITE, mark_site
from attnlrp_fx.rules.latent_sites import find_sites
from attnlrp_fx.torch_private import fake_mode_of

PASS = "insert_autoencoders"


def insert_autoencoders(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Insert each sparse autoencoder that is asked for behind the values that it reads.

    Raises:
        InputError: the value that it is to read is not there, or is none of its kind.
        CaptureError: it cannot be captured.
    """
    result = PassResult(PASS)
    graph = graph_module.graph
    if any(node.target is ops.rejoined for node in graph.nodes):
        return result
    wanted = [one for one in context.latent if isinstance(one, SAE)]
    for number, autoencoder in enumerate(wanted):
        for found in find_sites(graph, [autoencoder.at]):
            _insert(graph_module, found, autoencoder, f"autoencoder_{number}", context.editable)
            result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


class _Whole(nn.Module):
    """Features of a value, and what they decode to."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        autoencoder: Any = self.autoencoder
        features = autoencoder.encode(value)
        return features, autoencoder.decode(features)


def _insert(
    graph_module: fx.GraphModule, found: Found, sae: SAE, prefix: str, editable: bool
) -> None:
    value = found.value
    readers = list(value.users) if found.readers is None else list(found.readers)
    captured = _captured(sae, value)
    writer = _Writer(graph_module, value, captured, prefix)
    with graph_module.graph.inserting_before(value.next):
        features, decoded = writer.write({})
        error = _like(ops.reconstruction_error, value, (value, decoded))
        reading = set(features.users)
        if editable:  # what changed features decode to, beside what they would have
            decoded = writer.write({writer.features: features})[1]
            reading = features.users.keys() - reading
        joined = _like(ops.rejoined, value, (decoded, error))
    name, dims = found.site.name, found.site.dims
    joined.meta |= {"absorbs": "reconstruction error", "rule": "Error()", CHOSEN: None}
    joined.meta[SITE] = Site(f"{name}:error", "error", dims, found.site.units)
    for reader in readers:
        reader.replace_input_with(value, joined)
    count = int(features.meta["val"].shape[-1])
    site = Site(f"{name}:{sae.name}", "sae", (*dims[:-1], "feature"), count)
    mark_site(graph_module, Found(site, features, tuple(reading)), editable, PASS)


def _like(op: Any, value: fx.Node, args: tuple[fx.Node, ...]) -> fx.Node:
    node = value.graph.call_function(op, args)
    inherit(node, value, PASS)
    node.meta.pop("kind", None)
    return node


def _captured(sae: SAE, value: fx.Node) -> fx.GraphModule:
    """The autoencoder's graph: a value → its features and what they decode to."""
    for method in ("encode", "decode"):
        if not callable(getattr(sae.module, method, None)):
            raise InputError(
                f"the autoencoder at '{sae.at}' has no method {method}",
                remedy="give it encode(values) → features and decode(features) → values",
            )
    like = value.meta["val"]
    shape = [2 + d for d in range(like.dim() - 1)]
    example = torch.zeros(*shape, like.shape[-1], dtype=like.dtype)
    tensors = [*sae.module.parameters(), *sae.module.buffers()]
    example = example.to(tensors[0].device) if tensors else example
    try:
        return capture(_Whole(sae.module).eval(), (example,), "auto").graph_module
    except CaptureError as error:
        raise CaptureError(
            f"the autoencoder at '{sae.at}' cannot be captured", where=error.where, why=str(error)
        ) from error


@dataclass
class _Writer:
    """Writes an autoencoder's nodes into a graph, its tensors beside the model's."""

    graph_module: fx.GraphModule
    value: fx.Node
    captured: fx.GraphModule
    prefix: str

    @property
    def features(self) -> fx.Node:
        """The features, in the autoencoder's own graph."""
        node: fx.Node = outputs_of(self.captured.graph)[0]
        return node

    def write(self, known: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """Its nodes, those apart that are known; returns features and what they decode to."""
        results = outputs_of(self.captured.graph)
        values = dict(known)
        needed, stack = set[fx.Node](), [results[1]]
        while stack:
            node = stack.pop()
            if node not in needed and node not in values:
                needed.add(node)
                stack += node.all_input_nodes
        for node in self.captured.graph.nodes:
            if node in needed:
                values[node] = self._copied(node, values)
        features, decoded = (values[node] for node in results)
        return features, decoded

    def _copied(self, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        graph = self.graph_module.graph
        if node.op == "placeholder":
            return self.value
        if node.op == "get_attr":
            return self._tensor(str(node.target))
        new = graph.node_copy(node, values.__getitem__)
        kept = {key: entry for key, entry in node.meta.items() if key == "stack_trace"}
        new.meta = {**self.value.meta, **kept, "constructed_by": PASS}
        new.meta.pop("kind", None)
        compute(new)
        return new

    def _tensor(self, target: str) -> fx.Node:
        """A parameter or buffer of the autoencoder, shared with it."""
        module, graph = self.graph_module, self.graph_module.graph
        name = f"{self.prefix}_{target.replace('.', '_')}"
        tensor: Any = self.captured
        for part in target.split("."):
            tensor = getattr(tensor, part)
        if not hasattr(module, name):
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(name, tensor)
            else:
                module.register_buffer(name, tensor)
        node = graph.get_attr(name)
        node.meta["val"] = fake_mode_of(module).from_tensor(tensor, static_shapes=True)
        return node
