"""Several targets from one forward pass: as each alone, and what their sequence offers."""

import io
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Explain
from models import BY_NAME, VOCABULARY, drawn
from rich.console import Console
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import (
    Contrast,
    Explanation,
    Explanations,
    InputError,
    Logit,
    LogProb,
    NonFiniteError,
    TargetError,
)
from attnlrp_fx.runtime.running import Running

F64 = torch.float64


def assert_equal(found: Sequence[Explanation], expected: Sequence[Explanation]) -> None:
    assert len(found) == len(expected)
    for ours, own in zip(found, expected, strict=True):
        assert ours.target == own.target
        assert ours.labels == own.labels
        assert torch.equal(ours.target_value, own.target_value)
        assert (ours.target_index is None) is (own.target_index is None)
        if own.target_index is not None:
            assert torch.equal(ours.target_index, own.target_index)
        assert list(ours.relevance) == list(own.relevance)
        for name, relevance in own.relevance.items():
            torch.testing.assert_close(ours.relevance[name], relevance, rtol=0, atol=1e-14)


def squares(outputs: Any) -> Tensor:
    return outputs.logits.square().mean((1, 2))


OF_CAUSAL = [
    None,
    7,
    Logit(7, position=2),
    Logit([1, 2, 3], position=[0, 5, -1]),
    Contrast(3, against=5),
    Contrast(torch.tensor([4, 1, 9])),
    LogProb(11, position=3),
    squares,
]


# As one at a time


@pytest.mark.parametrize("audit", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral", "bart"])
def test_as_one_at_a_time(name: str, audit: bool, explain: Explain) -> None:
    explainer, inputs = explain(BY_NAME[name], audit=audit), BY_NAME[name].example(3, 6, F64)
    expected = [explainer(inputs, target=target) for target in OF_CAUSAL]
    compiled = explainer.compilations
    found = explainer(inputs, target=OF_CAUSAL)
    assert isinstance(found, Explanations)
    assert_equal(found, expected)
    assert_equal(explainer(inputs, target=tuple(OF_CAUSAL[::-1])), expected[::-1])
    assert explainer.compilations == compiled
    for one, own in zip(found, expected, strict=True):
        if audit:
            assert abs(one.ledger.residual) < 1e-9
            assert one.ledger.by_cause() == pytest.approx(own.ledger.by_cause())


@pytest.mark.parametrize("kind", [Logit, Contrast, LogProb])
def test_columns_of_a_tensor(kind: Any, explain: Explain) -> None:
    explainer, inputs = explain(BY_NAME["llama"], audit=False), BY_NAME["llama"].example(3, 6, F64)
    index = torch.randint(VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(0))
    position = torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2], [2, -1, -1, 0]])
    assert_equal(
        explainer(inputs, target=kind(index, position=position)),
        [explainer(inputs, target=kind(index[:, m], position=position[:, m])) for m in range(4)],
    )
    assert_equal(
        explainer(inputs, target=kind(index)),
        [explainer(inputs, target=kind(index[:, m])) for m in range(4)],
    )
    assert_equal(
        explainer(inputs, target=kind(position=position)),
        [explainer(inputs, target=kind(position=position[:, m])) for m in range(4)],
    )


def test_padded_rows(explain: Explain) -> None:
    explainer, inputs = explain(BY_NAME["gpt2"], audit=False), BY_NAME["gpt2"].example(2, 7, F64)
    inputs["attention_mask"][1, 4:] = 0
    found = explainer(inputs, target=Logit(torch.tensor([[1, 2, 3], [4, 5, 6]])))
    short = {name: value[1:, :4] for name, value in inputs.items()}
    for m, index in enumerate((4, 5, 6)):
        alone = explainer(short, target=Logit(index)).relevance["input_ids"]
        row = found[m].relevance["input_ids"][1:]
        torch.testing.assert_close(row[:, :4], alone, rtol=0, atol=1e-12)
        assert not row[:, 4:].any()


@pytest.mark.parametrize("composite", ["gradient", "cp-lrp"])
def test_rules_of_other_composites(composite: str, explain: Explain) -> None:
    explainer = explain(BY_NAME["bert"], composite, audit=False)
    inputs = BY_NAME["bert"].example(2, 6, F64)
    targets = [0, 1, LogProb(2)]
    expected = [explainer(inputs, target=target) for target in targets]
    assert_equal(explainer(inputs, target=targets), expected)


def test_relevance_of_one_target_is_no_start_for_the_next(explain: Explain) -> None:
    """Each run of the relevance side begins with slots that hold none."""
    explainer, inputs = explain(BY_NAME["llama"]), BY_NAME["llama"].example(2, 5, F64)
    found = explainer(inputs, target=[5] * 4).relevance["input_ids"]
    assert all(torch.equal(found[:, 0], found[:, m]) for m in range(4))


def test_there_is_one_forward_pass(explain: Explain) -> None:
    explainer, inputs = explain(BY_NAME["llama"]), BY_NAME["llama"].example(1, 5, F64)
    forward = Running._run_forward
    with mock.patch.object(Running, "_run_forward", autospec=True, side_effect=forward) as spy:
        explainer(inputs, target=list(range(1, 9)))
    assert spy.call_count == 1


class Heads(nn.Module):
    """Three outputs of unlike sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.first, self.second, self.third = (nn.Linear(8, n) for n in (4, 3, 5))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        hidden = self.body(features).tanh()
        return {
            "logits": self.first(hidden),
            "values": self.second(hidden),
            "more": self.third(hidden),
        }


def of_several(outputs: Any) -> Tensor:
    return outputs["logits"][:, 0] * outputs["more"][:, 1]


OF_HEADS: list[Any] = [
    Logit(2),
    Logit(1, output="values"),
    Contrast(1, against=0, output="more"),
    of_several,
    lambda outputs: outputs["values"].sum(1),
]


@pytest.mark.parametrize("order", [1, -1])
def test_targets_that_read_other_outputs(order: int) -> None:
    x = {"features": drawn(3, 6).double()}
    model = Heads().double().eval()
    targets = OF_HEADS[::order]
    alone = [attnlrp_fx.compile(model, x, backend="eager")(x, target=t) for t in targets]
    explainer = attnlrp_fx.compile(model, x, backend="eager")
    for _ in range(2):
        found = explainer(x, target=targets)
        compiled = explainer.compilations
        for ours, own in zip(found, alone, strict=True):
            assert torch.equal(ours.target_value, own.target_value)
            torch.testing.assert_close(
                ours.relevance["features"], own.relevance["features"], rtol=0, atol=1e-14
            )
    assert explainer(x, target=targets) is not None
    assert explainer.compilations == compiled, "nothing is compiled twice"


def test_images_of_several_classes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.rand(2, 3, 6, 6)
    explainer = attnlrp_fx.compile(model, images, composite="attnlrp-vision", backend="eager")
    found = explainer(images, target=[0, 1, 2])
    assert found.relevance["input"].shape == (2, 3, 3, 6, 6)
    assert_equal(found, [explainer(images, target=m) for m in range(3)])
    assert found.to_html().count("data:image/png") >= 2 * 3


def test_a_backend_that_compiles(explain: Explain) -> None:
    case = BY_NAME["mlp"]
    inputs = case.example(2, 5)
    explainer = attnlrp_fx.compile(case.model(), inputs, backend="inductor")
    expected = explain(case, dtype=torch.float32, audit=False, exact=False)(inputs, target=[0, 1])
    for ours, own in zip(explainer(inputs, target=[0, 1]), expected, strict=True):
        torch.testing.assert_close(ours.relevance["features"], own.relevance["features"])


# What is wrong


@pytest.mark.parametrize("target", [[], (), Logit(torch.zeros(2, 0, dtype=torch.int64))], ids=str)
def test_no_target_at_all(target: Any, explain: Explain) -> None:
    with pytest.raises(TargetError, match="there is no target to explain"):
        explain(BY_NAME["bert"])(BY_NAME["bert"].example(2, 5, F64), target=target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([0, 9], "index 9 is out of range"),
        ([0, Logit(1, position=2)], "position"),
        ([0, Logit(torch.zeros(2, 3, dtype=torch.int64))], r"index has shape \(2, 3\)"),
        (Logit(torch.zeros(3, 2, dtype=torch.int64)), r"index has shape \(3,\)"),
        (Logit(torch.zeros(2, 2)), "index must be an integer"),
        ([lambda outputs: outputs.logits], "one value a row"),
    ],
)
def test_one_of_several_that_is_wrong(target: Any, message: str, explain: Explain) -> None:
    explainer, inputs = explain(BY_NAME["bert"]), BY_NAME["bert"].example(2, 5, F64)
    with pytest.raises(TargetError, match=message):
        explainer(inputs, target=target)
    assert_equal([explainer(inputs, target=1)], explainer(inputs, target=[1]))


def test_each_target_is_checked_for_finiteness() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            nn.init.ones_(self.linear.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    x = torch.ones(1, 3)
    explainer = attnlrp_fx.compile(Root().eval(), x, backend="eager")
    explainer(x, target=[0, 1], check_finite=True)

    def steep(outputs: Tensor) -> Tensor:
        return (outputs - outputs.detach()).abs().sqrt().sum(1)

    assert isinstance(explainer(x, target=[0, steep]), Explanations)
    for targets in ([0, steep], [steep, 0]):
        with pytest.raises(NonFiniteError):
            explainer(x, target=targets, check_finite=True)


# The sequence


def explanation(seed: int = 0, index: Tensor | None = None, **more: Any) -> Explanation:
    relevance = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    fields = {
        "relevance": {"input_ids": relevance},
        "outputs": {"logits": relevance},
        "target_value": relevance.sum(1),
        "target": "logit",
        "inputs": {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]])},
        "tokens": {"input_ids": [["a", "b", "c"], ["d", "e", "[PAD]"]]},
        "mask": {"input_ids": torch.tensor([[1, 1, 1], [1, 1, 0]])},
        "target_index": index,
    }
    return Explanation(**(fields | more))


def explanations(count: int = 3) -> Explanations:
    return Explanations(tuple(explanation(i, torch.tensor([i, i + 1])) for i in range(count)))


def test_it_is_a_sequence() -> None:
    found = explanations()
    assert len(found) == 3
    assert list(found) == [found[0], found[1], found[-1]]
    assert isinstance(found[1:], Explanations)
    assert list(found[1:]) == [found[1], found[2]]
    assert next(reversed(found)) is found[2]
    assert found[1] in found
    assert found.index(found[1]) == 1
    with pytest.raises(IndexError):
        found[3]


def test_what_is_stacked() -> None:
    found = explanations()
    assert found.relevance["input_ids"].shape == (2, 3, 3)
    for m, one in enumerate(found):
        assert torch.equal(found.relevance["input_ids"][:, m], one.relevance["input_ids"])
    assert torch.equal(found.target_value, torch.stack([one.target_value for one in found], 1))
    assert found.target_index is not None
    assert found.target_index.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert found.outputs is found[0].outputs
    assert found.inputs is found[0].inputs
    assert repr(found) == "Explanations(targets=3, relevance: input_ids (2, 3, 3))"


def test_an_index_that_one_target_lacks() -> None:
    found = Explanations((explanation(0, torch.tensor([1, 2])), explanation(1)))
    assert found.target_index is None


def test_there_is_at_least_one() -> None:
    with pytest.raises(InputError, match="there is no target to explain"):
        Explanations(())
    with pytest.raises(InputError, match="there is no target to explain"):
        explanations()[3:]


def test_a_table() -> None:
    pd = pytest.importorskip("pandas")
    found = explanations(2)
    table = found.to_pandas()
    assert list(table.columns) == ["target", "row", "input", "position", "token", "relevance"]
    assert table["target"].tolist() == [0] * 5 + [1] * 5
    for number, one in enumerate(found):
        part = table[table["target"] == number].drop(columns="target").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, one.to_pandas())


def test_pages_have_each_target(tmp_path: Any) -> None:
    found = explanations()
    page = found.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    assert page.count("<section>") == 3 * 2
    assert "<title>Relevance for 3 targets</title>" in page
    assert found._repr_html_().count("<section>") == 6
    with pytest.raises(OSError):
        found.to_html(tmp_path / "absent" / "page.html")


def test_a_matrix_has_a_line_a_target(tmp_path: Any) -> None:
    found = Explanations(tuple(explanation(i, labels=[f" <{i}>", "\n"]) for i in range(4)))
    page = found.matrix_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    first, second = page.split("<section>")[1:]
    assert first.startswith("<h4>Row 0 · 4 targets</h4>")
    assert "<th>&lt;2&gt;</th>" in first
    for section, tokens in ((first, 3), (second, 2)):  # padding is left out
        assert section.count("<th><span>") == tokens
        assert section.count("<td") == 4 * tokens
        assert section.count("<tr>") == 5
    largest = max(float(one.relevance["input_ids"][0].abs().max()) for one in found)
    assert f"+{largest:.4g}</span>" in first
    assert "<script" not in page


def test_a_matrix_of_several_inputs() -> None:
    more = {
        "relevance": {"input_ids": torch.ones(1, 2), "decoder_input_ids": -torch.ones(1, 4)},
        "inputs": {
            "input_ids": torch.ones(1, 2).long(),
            "decoder_input_ids": torch.ones(1, 4).long(),
        },
        "target_value": torch.ones(1),
        "tokens": None,
        "mask": None,
    }
    page = Explanations((explanation(**more), explanation(**more))).matrix_html()
    assert page.count("<table>") == 2
    assert page.count("<td") == 2 * (2 + 4)
    assert [page.count(f"<tr><th>{i}</th>") for i in range(3)] == [2, 2, 0]
    assert 'class="name dim">decoder_input_ids</div>' in page


def test_a_matrix_needs_tokens() -> None:
    x = torch.ones(2, 3)
    explainer = attnlrp_fx.compile(nn.Linear(3, 2).eval(), x, backend="eager")
    with pytest.raises(InputError, match="no tokens to make a table of"):
        explainer(x, target=[0, 1]).matrix_html()


def test_a_terminal_has_each_target() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(explanations())
    assert out.getvalue().count("Row 0 · logit") == 3
