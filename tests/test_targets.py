"""Targets: the right value of the right output, at the right position, for each kind of model."""

import dataclasses
from typing import Any

import pytest
import torch
from conftest import Explain
from models import BY_NAME, VOCABULARY
from torch import Tensor

from attnlrp_fx import Contrast, Logit, LogProb, TargetError
from attnlrp_fx.targets import Custom, Outputs, Target, as_target, targets_of

F64 = torch.float64


def outputs(**named: Tensor) -> Outputs:
    masks = {name: named.pop(name) for name in list(named) if name.endswith("attention_mask")}
    return Outputs(named, named, masks)


SCORES = torch.tensor([[1.0, 5.0, 2.0, -1.0], [0.0, -3.0, 0.5, 0.25]], dtype=F64)
SEQUENCE = torch.arange(24, dtype=F64).reshape(2, 3, 4).sin()


@pytest.mark.parametrize(
    ("target", "expected", "index"),
    [
        (Logit(), [5.0, 0.5], [1, 2]),
        (Logit(0), [1.0, 0.0], [0, 0]),
        (Logit(-1), [-1.0, 0.25], [3, 3]),
        (Logit([3, 0]), [-1.0, 0.0], [3, 0]),
        (Logit(torch.tensor([1, 1], dtype=torch.int32)), [5.0, -3.0], [1, 1]),
        (Contrast(0, against=1), [-4.0, 3.0], [0, 0]),
        (Contrast(0, against=[1, 3]), [-1.0, 1.375], [0, 0]),
        (Contrast([1, 2]), [5 - 2 / 3, 0.5 + 2.75 / 3], [1, 2]),
        (Contrast(), [5 - 2 / 3, 0.5 + 2.75 / 3], [1, 2]),
    ],
    ids=str,
)
def test_classes(target: Target, expected: list[float], index: list[int]) -> None:
    chosen = target.choose(outputs(logits=SCORES))
    torch.testing.assert_close(chosen.value, torch.tensor(expected, dtype=F64))
    assert chosen.index.tolist() == index


def test_log_probabilities() -> None:
    chosen = LogProb([1, 0]).choose(outputs(logits=SCORES))
    expected = torch.stack([SCORES[0].softmax(0)[1], SCORES[1].softmax(0)[0]]).log()
    torch.testing.assert_close(chosen.value, expected)


@pytest.mark.parametrize(
    ("position", "rows"),
    [(None, [2, 2]), (1, [1, 1]), (-3, [0, 0]), ([0, 2], [0, 2]), (torch.tensor([2, 1]), [2, 1])],
)
def test_positions(position: Any, rows: list[int]) -> None:
    chosen = Logit(3, position=position).choose(outputs(logits=SEQUENCE))
    assert chosen.value.tolist() == [float(SEQUENCE[i, row, 3]) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        ([[1, 1, 0], [1, 1, 1]], [1, 2]),
        ([[0, 1, 1], [1, 0, 0]], [2, 0]),
        ([[0, 1, 0], [1, 0, 1]], [1, 2]),
    ],
)
def test_the_last_position_is_the_masks(mask: list[list[int]], rows: list[int]) -> None:
    given = outputs(logits=SEQUENCE, attention_mask=torch.tensor(mask))
    assert Logit(3).choose(given).value.tolist() == [
        float(SEQUENCE[i, row, 3]) for i, row in enumerate(rows)
    ]


def test_a_decoders_own_mask_decides() -> None:
    masks = {
        "attention_mask": torch.tensor([[1, 0, 0], [1, 0, 0]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    chosen = Logit(3).choose(outputs(logits=SEQUENCE, **masks))
    assert chosen.value.tolist() == [float(SEQUENCE[0, 1, 3]), float(SEQUENCE[1, 2, 3])]


def test_an_encoders_mask_is_not_a_decoders() -> None:
    """Even where source and target are of one length by chance."""
    given = outputs(
        logits=SEQUENCE,
        encoder_last_hidden_state=SEQUENCE,
        attention_mask=torch.tensor([[1, 0, 0], [1, 1, 0]]),
    )
    assert Logit(3).choose(given).value.tolist() == SEQUENCE[:, -1, 3].tolist()


def test_short_floats_are_widened() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        chosen = Contrast(0).choose(outputs(logits=SCORES.to(dtype)))
        assert chosen.value.dtype == torch.float32
    assert Logit(0).choose(outputs(logits=SCORES)).value.dtype == F64


def test_other_outputs_by_name() -> None:
    given = outputs(logits=SCORES, values=SCORES + 1)
    assert Logit(0, output="values").choose(given).value.tolist() == [2.0, 1.0]
    with pytest.raises(TargetError, match="choose output= from: logits, values"):
        Logit(0, output="absent").choose(given)


def test_outputs_with_other_shapes() -> None:
    one_score = outputs(output=torch.tensor([0.5, 2.0]))
    assert Logit().choose(one_score).value.tolist() == [0.5, 2.0]
    maps = outputs(output=torch.arange(16.0).reshape(2, 2, 2, 2))
    assert Logit().choose(maps).value.tolist() == [7.0, 15.0]
    with pytest.raises(TargetError, match="a single number"):
        Logit().choose(outputs(output=torch.tensor(1.0)))


def test_an_answer_does_not_lie_in_padding() -> None:
    start = torch.tensor([[1.0, 2.0, 9.0], [3.0, 2.0, 4.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    chosen = Logit().choose(outputs(start_logits=start, end_logits=-start, attention_mask=mask))
    assert chosen.value.tolist() == [2.0 - 1.0, 4.0 - 2.0]


def test_what_a_target_is_made_of() -> None:
    assert as_target(None) == Logit()
    assert as_target(4) == Logit(4)
    assert as_target(LogProb(2)) == LogProb(2)
    function = torch.nn.Identity()
    assert as_target(function) == Custom(function)
    with pytest.raises(TargetError, match="a target cannot be made from a str"):
        as_target("positive")  # type: ignore[arg-type]


# Out of range


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Logit(4), r"index 4 is out of range.*\n.*it must lie in \[-4, 3\]"),
        (Logit([0, -5]), "index -5 is out of range"),
        (Logit([0, 1, 2]), r"index has shape \(3,\)\n.*the batch has 2 rows"),
        (Logit(1.0), "index must be an integer, got torch.float32"),
        (Logit(True), "index must be an integer, got torch.bool"),
        (Contrast(0, against=9), "against 9 is out of range"),
        (Contrast(0, against=[]), "'against' is empty"),
        (LogProb(17), "index 17 is out of range"),
    ],
    ids=str,
)
def test_classes_out_of_range(target: Target, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        target.choose(outputs(logits=SCORES))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Logit(0, position=3), r"position 3 is out of range.*\n.*\[-3, 2\]"),
        (Logit(0, position=[0, 1, 2]), r"position has shape \(3,\)"),
    ],
    ids=str,
)
def test_positions_out_of_range(target: Target, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        target.choose(outputs(logits=SEQUENCE))


def test_a_position_where_there_is_none_is_an_error() -> None:
    with pytest.raises(TargetError, match="position"):
        Logit(0, position=1).choose(outputs(logits=SCORES))


def test_one_class_has_no_contrast() -> None:
    with pytest.raises(TargetError, match="nothing to contrast with"):
        Contrast(0).choose(outputs(logits=SCORES[:, :1]))


def test_a_row_that_is_all_padding_has_no_last_token() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(TargetError, match="a row of the attention mask is all zero"):
        Logit(0).choose(outputs(logits=SEQUENCE, attention_mask=mask))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda out: out["logits"].sum(), r"expected a tensor of shape \(2,\), got \(\)"),
        (lambda out: out["logits"], r"got \(2, 4\)"),
        (lambda out: 3.0, "got float"),
    ],
)
def test_functions_return_one_value_a_row(function: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        as_target(function).choose(outputs(logits=SCORES))


# Several


COLUMNS = torch.tensor([[1, 0, 3], [2, 2, 0]])
"""(batch, M)."""


def columns(targets: list[Any], *names: str) -> list[list[Any]]:
    return [[torch.as_tensor(getattr(t, name)).tolist() for name in names] for t in targets]


def test_one_target_is_not_several() -> None:
    for target in (3, Logit(3), Logit([0, 1]), Logit(COLUMNS[:, 0]), LogProb(), len):
        assert targets_of(target, Logit()) == ([as_target(target)], False)
    assert targets_of(None, LogProb(2)) == ([LogProb(2)], False)


def test_several_in_a_list() -> None:
    given = [3, Contrast(1, against=0), len, None]
    for several in (given, tuple(given)):
        assert targets_of(several, LogProb(2)) == (
            [Logit(3), Contrast(1, against=0), Custom(len), Logit()],
            True,
        )
    assert targets_of([3], Logit()) == ([Logit(3)], True)


@pytest.mark.parametrize("kind", [Logit, Contrast, LogProb])
def test_several_by_a_tensor(kind: Any) -> None:
    found, are_several = targets_of(kind(COLUMNS, output="logits"), Logit())
    assert are_several
    assert all(type(target) is kind and target.output == "logits" for target in found)
    assert columns(found, "index") == [[[1, 2]], [[0, 2]], [[3, 0]]]
    one, are_several = targets_of(kind(COLUMNS[:, :1]), Logit())
    assert are_several
    assert columns(one, "index") == [[[1, 2]]]


def test_several_positions() -> None:
    found, _ = targets_of(Logit([5, 6], position=COLUMNS), Logit())
    assert columns(found, "index", "position") == [[[5, 6], c] for c in COLUMNS.T.tolist()]
    both, _ = targets_of(Logit(COLUMNS + 1, position=COLUMNS), Logit())
    assert columns(both, "index", "position") == [
        [[i + 1 for i in c], c] for c in COLUMNS.T.tolist()
    ]


def test_the_default_may_be_several() -> None:
    assert len(targets_of(None, Logit(COLUMNS))[0]) == 3


def test_a_target_of_ones_own_may_be_several() -> None:
    @dataclasses.dataclass(frozen=True)
    class Doubled:
        index: Any
        factor: float = 2.0

        def choose(self, outputs: Outputs) -> Any:
            chosen = Logit(self.index).choose(outputs)
            return dataclasses.replace(chosen, value=self.factor * chosen.value, seeds=())

    found, are_several = targets_of(Doubled(COLUMNS, factor=3.0), Logit())
    assert are_several
    assert [one.factor for one in found] == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("target", [[], (), Logit(COLUMNS[:, :0])], ids=str)
def test_none_is_an_error(target: Any) -> None:
    with pytest.raises(TargetError, match="there is no target to explain"):
        targets_of(target, Logit())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            Logit(COLUMNS, position=COLUMNS[:, :2]),
            r"unlike numbers of targets: index \(2, 3\), position \(2, 2\)",
        ),
        ([Logit(1), "positive"], "cannot be made from a str"),
        ([[1, 2]], "cannot be made from a list"),
    ],
    ids=str,
)
def test_several_that_make_no_sense(target: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        targets_of(target, Logit())


def test_several_for_another_batch() -> None:
    found, _ = targets_of(Logit(torch.zeros(5, 3, dtype=torch.int64)), Logit())
    with pytest.raises(TargetError, match=r"index has shape \(5,\)"):
        found[0].choose(outputs(logits=SCORES))


# On models


def test_sequence_classification(explain: Explain) -> None:
    case = BY_NAME["bert"]
    inputs = case.example(3, 6, F64)
    logits = explain(case).model(**inputs).logits.detach()
    torch.testing.assert_close(explain(case)(**inputs).target_value, logits.max(1).values)
    torch.testing.assert_close(explain(case)(**inputs, target=2).target_value, logits[:, 2])


def test_token_classification(explain: Explain) -> None:
    case = BY_NAME["albert-token-classification"]
    inputs = case.example(3, 6, F64)
    logits = explain(case).model(**inputs).logits.detach()
    found = explain(case)(**inputs, target=Logit(1, position=[0, 2, 5]))
    torch.testing.assert_close(found.target_value, logits[[0, 1, 2], [0, 2, 5], 1])
    assert found.relevance["input_ids"].shape == (3, 6)


def test_question_answering_explains_start_plus_end(explain: Explain) -> None:
    case = BY_NAME["bert-question-answering"]
    explainer, inputs = explain(case), case.example(3, 6, F64)
    own = explainer.model(**inputs)
    start, end = own.start_logits.detach(), own.end_logits.detach()
    both, compiled = explainer(**inputs), explainer.compilations
    torch.testing.assert_close(both.target_value, start.max(1).values + end.max(1).values)
    parts = [
        explainer(**inputs, target=Logit(index, output=name))
        for name, index in (("start_logits", start.argmax(1)), ("end_logits", end.argmax(1)))
    ]
    total = sum(part.relevance["input_ids"] for part in parts)
    torch.testing.assert_close(both.relevance["input_ids"], total, rtol=0, atol=1e-12)
    span = explainer(**inputs, target=lambda out: out.start_logits[:, 1] + out.end_logits[:, 3])
    torch.testing.assert_close(span.target_value, start[:, 1] + end[:, 3])
    assert explainer.compilations == compiled


def test_causal_language_model(explain: Explain) -> None:
    case = BY_NAME["qwen2"]
    explainer, inputs = explain(case), case.example(2, 6, F64)
    logits = explainer(**inputs).outputs.logits
    found = explainer(**inputs, target=LogProb([3, VOCABULARY - 1], position=4))
    expected = logits[:, 4].log_softmax(-1)[[0, 1], [3, VOCABULARY - 1]]
    torch.testing.assert_close(found.target_value, expected)
    assert not found.relevance["input_ids"][:, 5:].any()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_sequence_to_sequence(name: str, explain: Explain) -> None:
    case = BY_NAME[name]
    explainer, inputs = explain(case), case.example(2, 6, F64)
    found = explainer(**inputs, target=Logit(7, position=3))
    torch.testing.assert_close(found.target_value, found.outputs.logits[:, 3, 7])
    assert found.relevance["input_ids"].abs().sum() > 0
    assert not found.relevance["decoder_input_ids"][:, 4:].any()


def test_labels_say_what_was_explained(explain: Explain) -> None:
    case = BY_NAME["bert"]
    found = explain(case)(**case.example(2, 6, F64), target=2)
    assert found.labels == ["LABEL_2", "LABEL_2"]
    assert found.target == "logit"
