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


def lowest(m, x, mask):
    """A number of float64 fills what numbers and integers made, float32 when it was captured."""
    weight = (1.0 - mask).masked_fill(mask > 1, -7.5)
    filler = weight if weight.dtype == x.dtype else weight * x.new_ones(())
    return x * filler + torch.ones(3, 5)


def test_what_no_op_names_is_promoted_too():
    given = {**example(), "mask": torch.randint(3, (3, 5))}
    graph = captured(Written(lowest), given)
    (expected,) = run(graph, given)
    run_passes(graph, PassContext(), (promote_casts,))
    (rsub,) = [node for node in graph.graph.nodes if "rsub" in node.name]
    fill = next(node for node in graph.graph.nodes if "masked_fill" in node.name)
    assert fill.meta["val"].dtype == torch.float64
    assert rsub.meta["val"].dtype == torch.float32
    fill.args = (*fill.args[:2], torch.finfo(torch.float64).min)
    graph.recompile()
    assert run(graph, given)[0].dtype == torch.float64
    fill.args = (*fill.args[:2], -7.5)
    graph.recompile()
    torch.testing.assert_close(run(graph, given)[0], expected)
    was = text(graph)
    assert run_passes(graph, PassContext(), (promote_casts,))[0].changes == 0
    assert text(graph) == was


def test_a_model_without_casts_is_left_alone():
    graph = captured(Written(lambda m, x: x.softmax(-1)), example())
    was = text(graph)
    (result,) = run_passes(graph, PassContext(), (promote_casts,))
    assert (result.changes, text(graph)) == (0, was)
