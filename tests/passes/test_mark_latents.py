"""mark_latents: markers behind the values that are asked for."""

import torch
from rewriting import captured
from torch import nn

from attnlrp_fx import ops
from attnlrp_fx.passes import PassContext, assign_rules, mark_latents, mark_sources, run_passes
from attnlrp_fx.passes.mark_latents import SITE


def marked(model, *latent, editable=False):
    name = "input" if isinstance(model, nn.Sequential) else "x"
    graph = captured(model, {name: torch.randn(2, 3, 4)})
    context = PassContext(latent=latent, editable=editable)
    run_passes(graph, context, (mark_sources, mark_latents, assign_rules))
    return graph


def test_a_marker_takes_the_place_of_the_value():
    graph = marked(nn.Sequential(nn.Linear(4, 5), nn.SiLU()), "0")
    (marker,) = (node for node in graph.graph.nodes if node.target is ops.latent)
    assert marker.meta[SITE].dims == ("batch", "position", "feature")
    assert {user.args[0] for user in marker.users} == {torch.ops.aten.silu.default}
    assert set(marker.args[0].users) == {marker}


def test_the_input_side_marks_what_one_module_reads_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = torch.tanh(x)
            return self.a(y) + self.b(y)

    graph = marked(Twice(), "tanh", "input:a")
    outer, inner = (node for node in graph.graph.nodes if node.target is ops.latent)
    assert inner.args == (outer,)
    assert len(outer.users) == 2
    assert len(inner.users) == 1


def test_sites_are_not_in_the_calls():
    graph = marked(nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.SiLU()), "1", "3")
    markers = [node for node in graph.graph.nodes if node.target is ops.latent]
    assert [(len(node.args), node.kwargs) for node in markers] == [(1, {})] * 2


def test_editable_markers_have_inputs_of_their_own():
    graph = marked(nn.Sequential(nn.Linear(4, 5), nn.SiLU()), "1", editable=True)
    _, units, places = graph.graph.find_nodes(op="placeholder")
    assert tuple(units.meta["val"].shape) == (3, 5)
    assert list(map(str, places.meta["val"].shape[1:])) == list(
        map(str, graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape[:2])
    )
