"""A node's story: which pass claimed it, its rule, its program; near misses with their reason."""

from dataclasses import replace

import pytest
import torch
from inspected import looked, printed
from torch import nn

import attnlrp_fx
from attnlrp_fx import InputError
from attnlrp_fx.inspection.story import Stories, Story, trace


def story(name: str) -> Story:
    found = looked().explainer.trace(name)
    assert isinstance(found, Story)
    return found


def test_a_node_that_went_into_a_pattern() -> None:
    """The softmax of attention that is written out is part of one attention op now."""
    found = story("softmax_1")
    assert found.claimed_by == "raise_attention"
    assert found.rule == "Attention(weights=0.5)"
    assert found.formula.startswith("R (1 − w) to the value")
    assert found.authority == "kind=attention"
    assert found.source.endswith("x = x + torch.softmax(scores, -1) @ self.value(h)")
    whole = story(found.into)
    assert {"softmax_1", "div_1", "matmul_2"} <= {*whole.parts, whole.node}
    assert whole.rewritten.startswith(f"{whole.node} = ops.attention(")


def test_a_node_that_is_as_it_was() -> None:
    found = story("linear_3")
    assert (found.claimed_by, found.into, found.rule) == ("", "linear_3", "Epsilon()")
    assert found.module == "blocks.0.gate (Linear)"
    sides = {line.constructed_by.split(" of ")[0] for line in found.program}
    assert sides == {"forward", "relevance"}
    text = printed(found)
    for part in (
        "blocks.0.gate",
        "kind=linear",
        "W_ji x_i R_j",
        "relevance",
        "gate = self.gate(x)",
    ):
        assert part in text


def test_a_module() -> None:
    """By its path, and as itself: the nodes in it, in order."""
    explainer = looked().explainer
    by_path = explainer.trace("blocks.1")
    assert isinstance(by_path, Stories)
    assert by_path == explainer.trace(explainer.model.blocks[1])
    assert {"Attention(weights=0.5)", "Identity()", "Uniform()"} <= {s.rule for s in by_path}
    assert all(s.module.startswith("blocks.1") for s in by_path)


def test_near_misses() -> None:
    """A pattern that almost matched says why, at the node; also of a node that was claimed."""
    explainer = looked().explainer
    graphs = explainer._graphs_as_seen
    node = graphs.captured.graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)[
        0
    ]
    result = replace(graphs.results[0], near_misses=[f"node '{node.name}' (x): the mask is odd"])
    missed = replace(graphs, results=(result, *graphs.results[1:]))
    found = trace(missed, node)
    assert isinstance(found, Story)
    assert found.near_misses == ((result.name, f"node '{node.name}' (x): the mask is odd"),)
    assert "the mask is odd" in printed(found)


def test_what_is_not_there() -> None:
    with pytest.raises(InputError, match="no node and no module 'nothing'"):
        looked().explainer.trace("nothing")
    stray = attnlrp_fx.compile(nn.Linear(2, 2).eval(), torch.ones(1, 2), backend="eager")
    with pytest.raises(InputError, match="no node and no module 'Dropout'"):
        stray.trace(nn.Dropout())
