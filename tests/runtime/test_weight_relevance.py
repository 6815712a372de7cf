"""Relevance of parameters over a data set: equal to autograd's, to the ledger, to one row alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Explain
from models import BY_NAME, Case
from torch import Tensor, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, InputError, Logit
from attnlrp_fx.runtime.weight_relevance import WeightRelevance

F64 = torch.float64
BATCH, LENGTH = 4, 6


def rows_of(case: Case) -> list[dict[str, Any]]:
    """A batch, row by row."""
    example = case.example(BATCH, LENGTH, F64)
    return [
        {n: v[i] if isinstance(v, Tensor) else v for n, v in example.items()} for i in range(BATCH)
    ]


def weighed(explainer: ExplainableGraphModule, rows: list[Any], **options: Any) -> WeightRelevance:
    return explainer.weight_relevance(rows, **{"progress": False, **options})


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_gradient_composite_is_weight_times_gradient(explain: Explain, name: str) -> None:
    """Flattened rows, a tied head and slices; rows that experts mix up, and take one at a time."""
    case = BY_NAME[name]
    explainer = explain(case, "gradient", F64)
    found = weighed(explainer, rows_of(case))
    model: nn.Module = explainer.model
    embedded = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    signed = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    absolute = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row in rows_of(case):
        inputs = {n: v[None] if isinstance(v, Tensor) else v for n, v in row.items()}
        value = case.value(model(**inputs), inputs).sum()
        own = dict(model.named_parameters())
        gradients = torch.autograd.grad(value, list(own.values()), allow_unused=True)
        for (n, p), gradient in zip(own.items(), gradients, strict=True):
            if gradient is not None:
                signed[n] += (p * gradient).detach()
                absolute[n] += (p * gradient).detach().abs()
    matrices = [n for n, p in model.named_parameters() if p.dim() > 1 and p not in embedded]
    assert set(matrices) <= set(found)
    scale, most = max(float(value.abs().max()) for value in signed.values()), case.tolerance
    for n in set(found) - {n for n, p in model.named_parameters() if p in embedded}:
        assert_close(found[n], signed[n], rtol=most, atol=most * scale)
        assert_close(found.absolute[n], absolute[n], rtol=most, atol=most * scale)


def test_a_layer_adds_up_to_its_line_in_the_ledger(explain: Explain) -> None:
    """Weights: what the layer's input received; with the bias: what its output did."""
    case = BY_NAME["gpt2"]
    explainer = explain(case)
    ledger = explainer(**case.example(BATCH, LENGTH, F64)).ledger
    assert ledger is not None
    found = weighed(explainer, rows_of(case))
    nodes = {node.name: node for node in explainer.rewritten.graph.nodes}
    layers = 0
    for entry in ledger.entries[:-1]:
        read = [str(n.target) for n in nodes[entry.node].all_input_nodes if n.op == "get_attr"]
        if len(read) < 2 or not set(read) <= set(found):
            continue
        layers += 1
        weight = next(float(found[name].sum()) for name in read if found[name].dim() > 1)
        both = sum(float(found[name].sum()) for name in read)
        assert weight == pytest.approx(entry.passed, abs=1e-9)
        assert both == pytest.approx(entry.received, abs=1e-9)
    assert layers == 8


@pytest.fixture(scope="module")
def attention() -> tuple[ExplainableGraphModule, Case]:
    """Rows are the second dimension of this model's layers, and one weight is read in parts."""
    case = BY_NAME["multihead-attention"]
    example = case.example(3, 5, F64)
    return attnlrp_fx.compile(case.model(F64), example, target=case.target, backend="eager"), case


def test_rows_that_cannot_be_told_apart_are_taken_one_by_one(
    attention: tuple[ExplainableGraphModule, Case],
) -> None:
    explainer, case = attention
    rows = rows_of(case)
    found = weighed(explainer, rows)
    alone = [weighed(explainer, [row]) for row in rows]
    assert set(found) == {n for n, _ in explainer.model.named_parameters()}
    for name in found:
        assert_close(found.absolute[name], torch.stack([one[name].abs() for one in alone]).sum(0))
        assert_close(found[name], torch.stack([one[name] for one in alone]).sum(0))
    assert explainer.compilations == 1


def test_rows_that_only_fill_a_batch_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    fixed = attnlrp_fx.compile(
        model, torch.ones(3, 4, dtype=F64), backend="eager", dynamic_shapes=None
    )
    free = attnlrp_fx.compile(model, torch.ones(3, 4, dtype=F64), backend="eager")
    rows = list(torch.randn(4, 4, dtype=F64))
    expected = weighed(free, rows, target=Logit(torch.tensor([0, 1, 2, 0])))
    found = weighed(fixed, rows, target=Logit(torch.tensor([0, 1, 2, 0])))
    assert found.samples == expected.samples == 4
    for name in expected:
        assert_close(found[name], expected[name])
        assert_close(found.absolute[name], expected.absolute[name])


def test_saved_whole_and_loaded(tmp_path: Path) -> None:
    signed = {"a.weight": torch.randn(3, 2), "b": torch.randn(2)}
    relevance = WeightRelevance(signed, {n: v.abs() for n, v in signed.items()}, 7)
    relevance.save(tmp_path / "w.safetensors")
    found = WeightRelevance.load(tmp_path / "w.safetensors")
    assert found.samples == 7
    assert list(found) == list(relevance)
    assert all(torch.equal(found[n], v) for n, v in signed.items())
    assert all(torch.equal(found.absolute[n], v.abs()) for n, v in signed.items())
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    (tmp_path / "other").write_text("nothing of the kind")
    with pytest.raises(InputError, match="cannot be read"):
        WeightRelevance.load(tmp_path / "other")


def test_nothing_to_sum() -> None:
    explainer = attnlrp_fx.compile(nn.Tanh().eval(), torch.ones(2, 3), backend="eager")
    with pytest.raises(InputError, match="no relevance of weights"):
        weighed(explainer, [torch.ones(3)])
    with pytest.raises(InputError, match="no samples"):
        weighed(explainer, [])


def test_inductor_agrees() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    rows = list(torch.randn(6, 4))
    eager = attnlrp_fx.compile(model, torch.ones(3, 4), backend="eager")
    found = weighed(attnlrp_fx.compile(model, torch.ones(3, 4)), rows)
    expected = weighed(eager, rows)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name in expected:
        assert_close(found[name], expected[name])
        assert_close(found.absolute[name], expected.absolute[name])
