"""The two laws, on every model.

1. The ledger closes: the explained inputs' relevance and what every node absorbs add up to the
   target's value.
2. With every rule set to "gradient", the program is Gradient×Input, equal to torch.autograd on the
   untouched model.

Law 1 is held to float64 on all models: those that cast to float32 run with these casts promoted.
Law 2 compares with the model as it is, so a model that casts is held to float32's precision.
"""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Explain
from models import BY_NAME, CASES, VOCABULARY, Case, Inputs, is_floating
from references import Oracle, read_tape
from torch import Tensor, nn

from attnlrp_fx import ops
from attnlrp_fx.calculus.pullbacks import PULLBACKS, vjp
from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.runtime.explainer import ExplainableGraphModule

F64 = torch.float64
WITHOUT_BIAS = [BY_NAME[name] for name in ("llama", "qwen3", "gemma3", "phi3", "t5")]
SIZES = [(1, 1), (1, 6), (4, 1), (5, 13)]


def gradient_times_input(case: Case, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Gradient×Input by autograd: token inputs at what their embedding returns."""
    explained = {name: x.clone().requires_grad_() for name, x in inputs.items() if is_floating(x)}
    points = dict(explained)

    def cut(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for name, ids in inputs.items():
            if name.endswith("input_ids") and torch.equal(ids, args[0]):
                points[name] = output.detach().requires_grad_()
                return points[name]
        return output

    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tables = [table for table in embeddings if table.num_embeddings == VOCABULARY]
    hooks = [table.register_forward_hook(cut) for table in tables]
    value = case.value(model(**{**inputs, **explained}), inputs)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(value.sum(), list(points.values()))
    relevance = zip(points, points.values(), gradients, strict=True)
    return {
        name: (x * g).detach() if name in explained else (x * g).detach().sum(-1)
        for name, x, g in relevance
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def seeds_of(explainer: ExplainableGraphModule, case: Case, inputs: Inputs) -> dict[Any, Tensor]:
    """The gradient of the target with respect to each output that it reads, by output node."""
    with torch.no_grad():
        flat = explainer.rewritten(*inputs.values())
    watched = [v.detach().requires_grad_() if is_floating(v) else v for v in flat]
    tree = torch.utils._pytree.tree_unflatten(watched, explainer._running.convention.output_spec)
    floating = [i for i, v in enumerate(watched) if is_floating(v)]
    value = case.value(tree, inputs).sum()
    found = torch.autograd.grad(value, [watched[i] for i in floating], allow_unused=True)
    nodes = explainer.rewritten.graph.output_node().args[0]
    return {nodes[i]: g for i, g in zip(floating, found, strict=True) if g is not None}


def on_tape(explainer: ExplainableGraphModule, case: Case, inputs: Inputs) -> Oracle:
    """The slow oracle: the tape on real tensors, no tracer, no program."""
    with torch.no_grad():
        tape = Tape(explainer.rewritten)
        tape.run(*inputs.values())
    return read_tape(tape, seeds_of(explainer, case, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_law_2_gradient_composite_is_gradient_times_input(case: Case, explain: Explain) -> None:
    explainer = explain(case, "gradient", audit=False, exact=False)
    for batch, length in [(2, 7), (1, 4)]:
        inputs = case.example(batch, length, F64)
        explanation = explainer(**inputs)
        expected = gradient_times_input(case, explainer.model, inputs)
        assert explanation.relevance.keys() == expected.keys()
        for name, relevance in explanation.relevance.items():
            assert relative(relevance, expected[name]) <= case.tolerance, name
        value = case.value(explainer.model(**inputs), inputs)
        torch.testing.assert_close(explanation.target_value, value, rtol=case.tolerance, atol=0)


BY_COMPOSITE = [
    *itertools.product(CASES, ["attnlrp", "cp-lrp"]),
    (BY_NAME["llama"], "best"),
]


@pytest.mark.parametrize(("case", "composite"), BY_COMPOSITE, ids=str)
def test_law_1_the_ledger_closes(case: Case, composite: str, explain: Explain) -> None:
    explanation = explain(case, composite)(**case.example(2, 7, F64))
    ledger = explanation.ledger
    scale = float(explanation.target_value.abs().sum())
    assert ledger.target == pytest.approx(float(explanation.target_value.sum()))
    assert abs(ledger.residual) <= 1e-9 * scale
    for name, relevance in explanation.relevance.items():
        assert ledger.inputs[name] == pytest.approx(float(relevance.sum()), abs=1e-12 * scale)
    for entry in ledger.entries:
        size = max(scale, abs(entry.received), abs(entry.passed))
        assert abs(entry.received - entry.passed - entry.absorbed) <= 1e-9 * size, entry
    received = sum(entry.received for entry in ledger.entries) - ledger.target
    passed = sum(entry.passed for entry in ledger.entries) - sum(ledger.inputs.values())
    size = sum(abs(entry.received) for entry in ledger.entries)
    assert abs(received - passed) <= 1e-9 * size, "what is passed on, somebody receives"


def test_law_1_fails_for_a_rule_that_breaks_it(explain: Explain) -> None:
    """A product that gives each factor everything: the ledger must not close."""
    case = BY_NAME["llama"]
    explainer, inputs = explain(case), case.example(2, 7, F64)
    with mock.patch.dict(PULLBACKS, {ops.uniform: vjp}):
        read = on_tape(explainer, case, inputs)
    target = float(case.value(explainer(**inputs).outputs, inputs).sum())
    absorbed = sum(float(sums[2]) for sums in read.sums.values())
    total = sum(float(r.sum()) for r in read.relevance.values())
    assert abs(target - total - absorbed) > 1e-3 * abs(target)


@pytest.mark.parametrize("case", WITHOUT_BIAS, ids=str)
def test_cp_lrp_conserves_without_biases(case: Case, explain: Explain) -> None:
    explanation = explain(case, "cp-lrp")(**case.example(2, 7, F64))
    total = sum(relevance.sum(-1) for relevance in explanation.relevance.values())
    torch.testing.assert_close(total, explanation.target_value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_program_is_the_eager_tape(case: Case, explain: Explain) -> None:
    """At the example's sizes and at others, relevance and ledger; nothing recompiles.

    To the last digits: what a region hands on is contiguous, and kernels may add in another order.
    """
    explainer = explain(case)
    compiled = explainer.compilations
    for batch, length in SIZES:
        inputs = case.example(batch, length, F64)
        explanation, oracle = explainer(**inputs), on_tape(explainer, case, inputs)
        assert explanation.relevance.keys() == oracle.relevance.keys()
        for name, relevance in explanation.relevance.items():
            scale = max(1e-3, float(oracle.relevance[name].abs().max()))
            torch.testing.assert_close(
                relevance, oracle.relevance[name], rtol=0, atol=1e-13 * scale
            )
        size = max(1.0, *(float(sums.abs().max()) for sums in oracle.sums.values()))
        for entry in explanation.ledger.entries[:-1]:
            found = torch.tensor([entry.received, entry.passed, entry.absorbed], dtype=F64)
            expected = oracle.sums[entry.node]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14 * size)
    assert explainer.compilations == compiled
