"""A data set explained in batches: what each sample alone gives, in its order, and bounded."""

import functools
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Explain
from models import BY_NAME, MLP, VOCABULARY, Case, drawn, randomised, tensors_of
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import attnlrp_fx
from attnlrp_fx import (
    Contrast,
    ExplainableGraphModule,
    Explanation,
    InputError,
    Logit,
    LogProb,
    TargetError,
)
from attnlrp_fx.loading import load
from attnlrp_fx.runtime import loader
from attnlrp_fx.runtime.batching import Batcher
from attnlrp_fx.runtime.layout import Layout
from attnlrp_fx.runtime.mapping import Mapped, map_dataset

F64 = torch.float64
LENGTHS = [7, 2, 5, 1, 9, 5, 3, 7, 4, 6, 2]
TEXTS = [
    "The performances are wonderful, but the story is a mess and far too long.",
    "Dull.",
    "It was a complete waste of time.",
    "A gripping, funny film.",
    "Not bad!",
]

Row = dict[str, Any]


def rows_of(case: Case, lengths: list[int], dtype: torch.dtype = F64) -> list[Row]:
    """Samples of unlike lengths, unbatched."""
    rows = []
    for number, length in enumerate(lengths):
        inputs = case.example(number + 1, length, dtype)
        rows.append({name: value[number] for name, value in inputs.items()})
    return rows


def alone(explainer: ExplainableGraphModule, row: Row, **options: Any) -> Explanation:
    return explainer({name: value[None] for name, value in row.items()}, **options)


def quiet(explainer: ExplainableGraphModule, dataset: Any, **options: Any) -> Mapped:
    return map_dataset(explainer, dataset, **{"progress": False, **options})


def assert_same(found: Explanation, expected: Explanation, tolerance: float = 1e-10) -> None:
    close = functools.partial(torch.testing.assert_close, rtol=10 * tolerance, atol=tolerance)
    assert found.relevance.keys() == expected.relevance.keys()
    for name, relevance in expected.relevance.items():
        close(found.relevance[name], relevance)
    for name, value in expected.inputs.items():
        assert torch.equal(found.inputs[name], value)
    close(found.target_value, expected.target_value)
    assert (found.target_index is None) is (expected.target_index is None)
    if expected.target_index is not None:
        assert torch.equal(found.target_index, expected.target_index)
    for field in ("tokens", "labels", "target"):
        assert getattr(found, field) == getattr(expected, field)


@functools.cache
def sentiment() -> ExplainableGraphModule:
    model, tokenizer = load()
    example = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    return attnlrp_fx.compile(model, example, backend="eager", tokenizer=tokenizer)


@functools.cache
def mlp() -> ExplainableGraphModule:
    return attnlrp_fx.compile(randomised(MLP).eval(), drawn(3, 6), backend="eager")


def one_at_a_time(explainer: ExplainableGraphModule, texts: list[str]) -> list[Explanation]:
    tokenizer = load()[1]
    return [explainer(tokenizer([text], return_tensors="pt")) for text in texts]


# What each sample alone gives

PADDED = "llama qwen3 gemma3 mixtral gpt2 opt bert distilbert roberta modernbert".split()
PADDED += ["albert-token-classification", "bert-question-answering", "t5", "bart"]


@pytest.mark.parametrize("name", PADDED)
def test_each_row_equals_the_sample_alone(name: str, explain: Explain) -> None:
    case, explainer = BY_NAME[name], explain(BY_NAME[name])
    rows = rows_of(case, LENGTHS)
    mapped = quiet(explainer, rows, batch_size=4, outputs=True)
    results = list(mapped)
    assert len(results) == len(rows)
    for row, found in zip(rows, results, strict=True):
        expected = alone(explainer, row)
        assert_same(found, expected, 1e-6 if case.casts else 1e-10)
        assert type(found.outputs) is type(expected.outputs)
        theirs = tensors_of(expected.outputs)
        for ours, own in zip(tensors_of(found.outputs), theirs, strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)
    if name not in ("t5", "bart"):
        assert mapped.throughput.batches == 3, "rows of unlike lengths share batches"


def test_texts_in_float32() -> None:
    explainer = sentiment()
    for found, expected in zip(
        quiet(explainer, TEXTS, batch_size=3), one_at_a_time(explainer, TEXTS), strict=True
    ):
        assert_same(found, expected, 2e-6)
        assert found.outputs is None
        assert len(found) == 1


def test_padding_of_the_samples_own_is_cut_off(explain: Explain) -> None:
    explainer = explain(BY_NAME["bert"])
    rows = rows_of(BY_NAME["bert"], [4, 6])
    longer = [
        {name: torch.cat([value, value.new_zeros(20)]) for name, value in row.items()}
        for row in rows
    ]
    mapped = quiet(explainer, longer)
    for row, found in zip(rows, mapped, strict=True):
        assert_same(found, alone(explainer, row))
    assert mapped.throughput.padded_tokens == 12


def test_what_a_mask_excludes_elsewhere_stays(explain: Explain) -> None:
    explainer = explain(BY_NAME["llama"])
    rows = rows_of(BY_NAME["llama"], [5, 8])
    rows[0]["attention_mask"] = torch.tensor([0, 0, 1, 1, 1])
    for row, found in zip(rows, quiet(explainer, rows), strict=True):
        assert_same(found, alone(explainer, row))


def test_without_a_mask_only_equal_lengths_share_a_batch() -> None:
    model = randomised(lambda: nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3))).eval()
    explainer = attnlrp_fx.compile(model, torch.ones(2, 5, dtype=torch.int64), backend="eager")
    rows = [{"input": torch.arange(1, 1 + length)} for length in LENGTHS]
    mapped = quiet(explainer, rows)
    for row, found in zip(rows, mapped, strict=True):
        assert_same(found, alone(explainer, row), 1e-6)
    assert mapped.throughput.batches == len(set(LENGTHS))
    assert mapped.throughput.padding == 0


def test_pad_false_keeps_lengths_apart(explain: Explain) -> None:
    explainer = explain(BY_NAME["bert"])
    mapped = quiet(explainer, rows_of(BY_NAME["bert"], LENGTHS), pad=False)
    assert len(list(mapped)) == len(LENGTHS)
    assert mapped.throughput.batches == len(set(LENGTHS))


# Targets


def at_the_end(outputs: Any) -> Tensor:
    """Reads padding, where there is some."""
    return outputs.logits[:, -1, 3]


@pytest.mark.parametrize(
    ("target", "batches"),
    [
        (None, 1),
        (7, 1),
        (Logit(7, position=0), 1),
        (Contrast(3, against=[1, 2]), 1),
        (LogProb(11), 1),
        (Logit(7, position=-1), len(set(LENGTHS))),
        (at_the_end, len(set(LENGTHS))),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_target_for_all(target: Any, batches: int, explain: Explain) -> None:
    """A target that may read padding gets none."""
    explainer = explain(BY_NAME["llama"])
    rows = rows_of(BY_NAME["llama"], LENGTHS)
    mapped = quiet(explainer, rows, target=target)
    for row, found in zip(rows, mapped, strict=True):
        assert_same(found, alone(explainer, row, target=target))
    assert mapped.throughput.batches == batches


@pytest.mark.parametrize("target", [Logit(output="end_logits"), LogProb(0, output="start_logits")])
def test_scores_over_the_sequence_get_no_padding(target: Any, explain: Explain) -> None:
    explainer = explain(BY_NAME["bert-question-answering"])
    rows = rows_of(BY_NAME["bert-question-answering"], [3, 5, 3, 8])
    mapped = quiet(explainer, rows, target=target)
    for row, found in zip(rows, mapped, strict=True):
        assert_same(found, alone(explainer, row, target=target))
    assert mapped.throughput.batches == 3


def test_a_classifier_pads_whatever_the_target(explain: Explain) -> None:
    explainer = explain(BY_NAME["bert"])
    rows = rows_of(BY_NAME["bert"], LENGTHS)

    def energy(outputs: Any) -> Tensor:
        return outputs.logits.square().sum(-1)

    mapped = quiet(explainer, rows, target=energy)
    for row, found in zip(rows, mapped, strict=True):
        assert_same(found, alone(explainer, row, target=energy))
    assert mapped.throughput.batches == 1


def test_a_target_for_each_sample(explain: Explain) -> None:
    explainer = explain(BY_NAME["llama"])
    rows = rows_of(BY_NAME["llama"], LENGTHS)
    kinds = [
        3,
        None,
        Logit(5),
        Logit(5, position=0),
        Contrast(1, against=2),
        LogProb(4),
        Logit([6]),
    ]
    targets = [kinds[i % len(kinds)] for i in range(len(rows))]
    expected = [alone(explainer, r, target=t) for r, t in zip(rows, targets, strict=True)]
    for each, one in zip(quiet(explainer, rows, targets=targets), expected, strict=True):
        assert_same(each, one)


@pytest.mark.parametrize("form", ["list", "tensor", "index", "function"])
def test_an_index_for_each_sample(form: str, explain: Explain) -> None:
    explainer = explain(BY_NAME["bert"])
    rows = rows_of(BY_NAME["bert"], LENGTHS)
    index = [number % 3 for number in range(len(rows))]
    options: dict[str, dict[str, Any]] = {
        "list": {"targets": index},
        "tensor": {"targets": torch.tensor(index)},
        "index": {"target": Logit(torch.tensor(index))},
        "function": {"targets": lambda row: len(row["input_ids"]) % 3},
    }
    if form == "function":
        index = [length % 3 for length in LENGTHS]
    mapped = quiet(explainer, rows, batch_size=4, **options[form])
    for row, i, found in zip(rows, index, mapped, strict=True):
        assert_same(found, alone(explainer, row, target=i))
    assert mapped.throughput.batches == 3


# Samples and data sets


class Numbered(Dataset[Row]):
    """Read at any place; has no end of its own."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> Row:
        return {"features": drawn(5, 6)[number]}


class Streamed(IterableDataset[Row]):
    def __iter__(self) -> Iterator[Row]:
        return (Numbered()[i] for i in range(5))


FORMS: dict[str, Any] = {
    "map": Numbered(),
    "stream": Streamed(),
    "list": list(Streamed()),
    "tensors": [row["features"] for row in Streamed()],
    "lists": [{"features": row["features"].tolist()} for row in Streamed()],
    "arrays": [{"features": row["features"].numpy()} for row in Streamed()],
    "batches of one": [{"features": row["features"][None]} for row in Streamed()],
}
LOADED = [(name, 0) for name in FORMS] + [("map", 2), ("stream", 2), ("list", 1)]


@pytest.mark.parametrize(("form", "workers"), LOADED)
def test_every_form_of_samples(form: str, workers: int) -> None:
    whole = mlp()(drawn(5, 6)).relevance["features"]
    mapped = quiet(mlp(), FORMS[form], batch_size=2, window=1, workers=workers)
    found = [each.relevance["features"] for each in mapped]
    torch.testing.assert_close(torch.cat(found), whole)
    assert all(each.shape == (1, 6) for each in found)
    assert mapped.throughput.batches == 3


def test_texts_in_another_process() -> None:
    found = [each.relevance["input_ids"] for each in quiet(sentiment(), TEXTS, workers=1)]
    for ours, own in zip(found, quiet(sentiment(), TEXTS), strict=True):
        assert torch.equal(ours, own.relevance["input_ids"])


def test_the_random_state_is_the_users() -> None:
    state = torch.random.get_rng_state()
    list(quiet(mlp(), drawn(5, 6).unbind()))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_constants_go_with_the_samples() -> None:
    case = BY_NAME["llama"]
    inputs = case.example(2, 5)
    explainer = attnlrp_fx.compile(case.model(), {**inputs, "logits_to_keep": 1}, backend="eager")
    rows = [{**row, "logits_to_keep": 1} for row in rows_of(case, [3, 3, 3], torch.float32)]
    for row, found in zip(rows, quiet(explainer, rows, outputs=True), strict=True):
        del row["logits_to_keep"]
        assert_same(found, alone(explainer, row), 1e-5)
    rows[1]["logits_to_keep"] = 2
    with pytest.raises(InputError, match="constant 1") as raised:
        list(quiet(explainer, rows))
    assert raised.value.where == "sample 1"


def test_it_is_lazy_and_reads_one_window_at_a_time() -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(0)
            yield drawn(1, 6)[0]

    with quiet(mlp(), endless(), batch_size=2, window=3) as mapped:
        assert not read
        for _ in range(7):
            next(mapped)
        assert len(read) == 12
        assert mapped.throughput.samples == 8
    assert list(mapped) == []


def test_an_empty_data_set() -> None:
    mapped = quiet(mlp(), [])
    assert list(mapped) == []
    assert mapped.throughput.samples == 0
    assert str(mapped.throughput).startswith("0 samples")


def test_the_ledger_is_a_batchs(explain: Explain) -> None:
    explainer, rows = explain(BY_NAME["bert"]), rows_of(BY_NAME["bert"], [3, 4])
    assert [each.ledger for each in quiet(explainer, rows)] == [None, None]
    for found in quiet(explainer, rows, batch_size=1):
        assert found.ledger is not None
        assert abs(found.ledger.residual) < 1e-9


def test_results_hold_no_batch() -> None:
    """Keeping one row keeps that row."""
    first, *_ = quiet(mlp(), drawn(5, 6).unbind())
    assert first.relevance["features"].untyped_storage().nbytes() == 6 * 4


# Batches


def batches(explainer: ExplainableGraphModule, rows: list[Any], **options: Any) -> list[list[int]]:
    """The lengths of rows that would share a batch."""
    batcher = Batcher(
        Layout.of(explainer._running.convention), explainer._running.target, **options
    )
    window = batcher(list(enumerate(rows)))
    assert window.error is None
    return [[length["input_ids"] for length in batch.lengths] for batch in window.batches]


def test_rows_are_sorted_by_length(explain: Explain) -> None:
    rows = rows_of(BY_NAME["bert"], LENGTHS)
    assert sorted(batches(explain(BY_NAME["bert"]), rows, batch_size=4)) == [
        [1, 2, 2, 3],
        [4, 5, 5, 6],
        [7, 7, 9],
    ]


def test_a_budget_of_tokens(explain: Explain) -> None:
    explainer, rows = explain(BY_NAME["bert"]), rows_of(BY_NAME["bert"], LENGTHS)
    assert sorted(batches(explainer, rows, max_tokens=8)) == [
        [1, 2, 2],
        [3, 4],
        [5],
        [5],
        [6],
        [7],
        [7],
        [9],
    ]
    results = list(quiet(explainer, rows, max_tokens=8))
    assert [each.relevance["input_ids"].shape[1] for each in results] == LENGTHS


def test_a_budget_counts_both_sequences(explain: Explain) -> None:
    rows = rows_of(BY_NAME["t5"], [3, 3, 3])  # and 5 in the decoder
    assert batches(explain(BY_NAME["t5"]), rows, max_tokens=16) == [[3, 3], [3]]


def test_throughput_counts_padding(explain: Explain) -> None:
    mapped = quiet(explain(BY_NAME["bert"]), rows_of(BY_NAME["bert"], [2, 4, 8, 8]), batch_size=2)
    assert mapped.throughput.samples == 0
    list(mapped)
    found = mapped.throughput
    assert (found.samples, found.batches, found.tokens, found.padded_tokens) == (4, 2, 22, 24)
    assert found.padding == pytest.approx(2 / 24)
    assert found.seconds > 0
    assert found.tokens_per_second == pytest.approx(22 / found.seconds)
    assert "22 tokens" in str(found)


def test_a_fixed_batch_is_filled() -> None:
    model, x = randomised(MLP).eval(), drawn(3, 6)
    explainer = attnlrp_fx.compile(model, x, backend="eager", dynamic_shapes=None)
    mapped = quiet(explainer, drawn(5, 6).unbind(), targets=[0, 1, 0, 1, 0])
    own = [mlp()(row[None], target=i % 2) for i, row in enumerate(drawn(5, 6))]
    for found, expected in zip(mapped, own, strict=True):
        torch.testing.assert_close(found.relevance["features"], expected.relevance["features"])
    assert mapped.throughput.batches == 2
    with pytest.raises(InputError, match="fixed to 3") as raised:
        quiet(explainer, [], batch_size=4)
    assert "batch_size=3" in raised.value.remedy


def test_a_fixed_length_is_padded_to() -> None:
    case = BY_NAME["bert"]
    explainer = attnlrp_fx.compile(
        case.model(F64), case.example(2, 9, F64), backend="eager", dynamic_shapes=None
    )
    free = attnlrp_fx.compile(case.model(F64), case.example(2, 9, F64), backend="eager")
    rows = rows_of(case, [4, 9, 2])
    for row, found in zip(rows, quiet(explainer, rows), strict=True):
        assert_same(found, alone(free, row), 1e-9)
    with pytest.raises(InputError, match="shape") as raised:
        list(quiet(explainer, rows_of(case, [4, 2, 10])))
    assert raised.value.where == "sample 2"
    assert "fixed to 9" in raised.value.why


# What is shown


def test_a_bar_on_a_terminal_and_two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        loader, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=100)
    )
    pairs = zip(
        map_dataset(sentiment(), TEXTS), map_dataset(sentiment(), TEXTS, target=0), strict=True
    )
    assert len(list(pairs)) == len(TEXTS)
    assert "5/5" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()


def test_no_bar_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    list(map_dataset(mlp(), drawn(5, 6).unbind()))
    assert capfd.readouterr() == ("", "")


# Mistakes


@pytest.mark.parametrize("name", ["batch_size", "max_tokens", "window"])
def test_sizes_below_one(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0"):
        quiet(sentiment(), TEXTS, **{name: 0})


@pytest.mark.parametrize("dataset", ["a text", {"input_ids": [1, 2]}, 3], ids=str)
def test_what_is_no_data_set(dataset: Any) -> None:
    with pytest.raises(InputError, match="is not a data set"):
        quiet(sentiment(), dataset)


def test_other_options_that_make_no_sense(explain: Explain) -> None:
    with pytest.raises(InputError, match="workers is -1"):
        quiet(mlp(), [], workers=-1)
    with pytest.raises(InputError, match="max_tokens counts tokens"):
        quiet(mlp(), [], max_tokens=100)
    with pytest.raises(InputError, match="both target and targets"):
        quiet(mlp(), [], target=1, targets=[])
    for options in ({"targets": [1]}, {"target": Logit([1])}):
        with pytest.raises(InputError, match="1 targets for 5 samples"):
            quiet(sentiment(), TEXTS, **options)
    for options in ({"targets": [1]}, {"target": Logit([1])}):
        with pytest.raises(InputError, match="for a sample") as raised:
            list(quiet(sentiment(), iter(TEXTS), **options))
        assert raised.value.where == "sample 1"


def test_inputs_without_rows_are_no_data() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return x @ table

    inputs = {"x": drawn(3, 4), "table": drawn(4, 5)}
    explainer = attnlrp_fx.compile(Table().eval(), inputs, backend="eager", dynamic_shapes=None)
    with pytest.raises(InputError, match="told apart into rows"):
        quiet(explainer, [])


IDS = torch.tensor([5, 6, 7])
MASK = torch.ones(3, dtype=torch.int64)
WRONG = [
    (3.5, "cannot be a float"),
    ({"input_ids": IDS}, "'attention_mask' is missing"),
    ({"input_ids": IDS, "attention_mask": MASK, "label": 1}, "no input 'label'"),
    ({"input_ids": IDS, "attention_mask": MASK[:2]}, "'input_ids' has 3 positions"),
    ({"input_ids": IDS[:0], "attention_mask": MASK[:0]}, "'input_ids' is empty"),
    ({"input_ids": IDS.expand(2, 3), "attention_mask": MASK}, r"shape \(2, 3\)"),
    ({"input_ids": "text", "attention_mask": MASK}, "is a str, not a tensor"),
    ({"input_ids": IDS.double(), "attention_mask": MASK}, "is torch.float64"),
    ({"input_ids": IDS + VOCABULARY, "attention_mask": MASK}, "holds index 68"),
    ("a text", "needs a tokenizer"),
]


@pytest.mark.parametrize(("sample", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_sample_that_does_not_fit_is_named(sample: Any, message: str, explain: Explain) -> None:
    explainer = explain(BY_NAME["bert"])
    good = {"input_ids": IDS[:2], "attention_mask": MASK[:2]}
    mapped = quiet(explainer, [good] * 4 + [sample] + [good], batch_size=4)
    for _ in range(4):
        assert next(mapped).relevance["input_ids"].shape == (1, 2), "those before it are explained"
    with pytest.raises(InputError, match=message) as raised:
        next(mapped)
    assert raised.value.where.startswith("sample 4")


def test_an_empty_text_is_named() -> None:
    mapped = quiet(sentiment(), [*TEXTS, "  "], workers=1)
    with pytest.raises(InputError, match="a text is empty") as raised:
        list(mapped)
    assert raised.value.where == "sample 5"
    assert mapped.throughput.samples == 5


def test_a_sample_that_fails_in_a_batch_is_named(explain: Explain) -> None:
    explainer, rows = explain(BY_NAME["llama"]), rows_of(BY_NAME["llama"], [4, 6, 5])
    with pytest.raises(TargetError, match="out of range") as raised:
        list(quiet(explainer, rows, targets=[1, VOCABULARY, 2]))
    assert raised.value.where == "sample 1"
    long = [*rows, *rows_of(BY_NAME["bert"], [50])]
    with pytest.raises(InputError, match="too long") as longer:
        list(quiet(explain(BY_NAME["bert"]), long))
    assert longer.value.where.startswith("sample 3")


def test_a_mistake_crosses_processes() -> None:
    with pytest.raises(InputError, match="cannot be a float") as raised:
        list(quiet(mlp(), [1.5], workers=1))
    assert raised.value.where == "sample 0"
    assert "mappings" in raised.value.remedy
