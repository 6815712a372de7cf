"""What a model casts to float32 is computed in float64, and nothing else changes."""

import torch
from rewriting import Written, captured, run, text

from attnlrp_fx.passes import PassContext, promote_casts, run_passes


def cast(m, x):
    """A softmax in float32, and a mask that is made there."""
    mask = torch.zeros(x.shape[-1], dtype=torch.float32)
    weights = (x + mask).to(torch.float32).softmax(-1, dtype=torch.float32).type_as(x)
    return weights.sum(-1)


def example():
    return {"x": torch.randn(3, 5, dtype=torch.float64)}


def test_golden():
    graph = captured(Written(cast), example())
    (result,) = run_passes(graph, PassContext(), (promote_casts,))
    assert result.changes > 0
    assert "float32" not in text(graph)
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    assert all(v.dtype != torch.float32 for v in values if isinstance(v, torch.Tensor))


def test_what_is_computed_differs_by_the_rounding_only():
    given = example()
    graph = captured(Written(cast), given)
    (was,) = run(graph, given)
    run_passes(graph, PassContext(), (promote_casts,))
    (now,) = run(graph, given)
    exact = given["x"].softmax(-1).sum(-1)
    torch.testing.assert_close(now, exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(was, exact, rtol=1e-6, atol=0)
    assert (was - exact).abs().max() > 1e-10


def test_a_model_without_casts_is_left_alone():
    graph = captured(Written(lambda m, x: x.softmax(-1)), example())
    was = text(graph)
    (result,) = run_passes(graph, PassContext(), (promote_casts,))
    assert (result.changes, text(graph)) == (0, was)
