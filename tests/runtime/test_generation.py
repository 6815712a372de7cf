"""Every token of a text explained by those before it: as each logit alone, on the whole text."""

import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Explain
from models import BY_NAME, ENCODER, HIDDEN, POSITIONS, Case, Inputs, tokens, transformers_model
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import Explanation, Explanations, InputError, Logit, explain_generation

F64 = torch.float64
CHUNKS = [1, 3, 100]
MODELS = ["llama", "gpt2", "mixtral", "gemma3", "t5", "bart"]
READER = Case(
    "bert-masked",
    functools.partial(transformers_model, "bert", "BertForMaskedLM", **ENCODER),
    tokens,
    lambda outputs, inputs: outputs.logits[:, -1].max(-1).values,
)


def sequence_of(inputs: Inputs) -> str:
    return "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"


def one_by_one(explainer: Any, inputs: Inputs, start: int) -> list[Explanation]:
    """From the definition: each logit on the whole text."""
    ids = inputs[sequence_of(inputs)]
    found = (explainer(inputs, target=Logit(ids[:, t], t - 1)) for t in range(start, ids.shape[1]))
    return list(found)


def assert_equal(found: Explanations, expected: Sequence[Explanation], atol: float) -> None:
    assert len(found) == len(expected)
    for ours, own in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.target_value, own.target_value, rtol=0, atol=atol)
        assert torch.equal(ours.target_index, own.target_index)
        assert ours.relevance.keys() == own.relevance.keys()
        for name, relevance in own.relevance.items():
            torch.testing.assert_close(ours.relevance[name], relevance, rtol=0, atol=atol)


def runs(explainer: Any) -> Any:
    """A spy on the explainer's runs."""
    return mock.patch.object(type(explainer), "explain_many", autospec=True, side_effect=_many)


_many = attnlrp_fx.ExplainableGraphModule.explain_many


def lengths(spy: Any) -> list[int]:
    """How long the text was at each run."""
    return [call.args[2][sequence_of(call.args[2])].shape[1] for call in spy.call_args_list]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", MODELS)
def test_as_each_token_on_the_whole_text(name: str, chunk: int, explain: Explain) -> None:
    case = BY_NAME[name]
    explainer, inputs = explain(case, audit=False), case.example(2, 9, F64)
    expected, compiled = one_by_one(explainer, inputs, 2), explainer.compilations
    with runs(explainer) as spy:
        found = explainer.explain_generation(inputs, start=2, chunk=chunk)
    assert_equal(found, expected, 1e-13)
    assert len(spy.call_args_list) == -(-len(expected) // chunk), "no prefix was refused"
    assert explainer.compilations == compiled


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_as_long_as_its_last_target_needs(name: str, explain: Explain) -> None:
    explainer = explain(BY_NAME[name], audit=False)
    inputs = BY_NAME[name].example(2, 9, F64)
    length = inputs[sequence_of(inputs)].shape[1]
    with runs(explainer) as spy:
        explainer.explain_generation(inputs, start=4, chunk=2)
    assert lengths(spy) == [*range(5, length - 1, 2), length - 1]
    given = [call.args[2] for call in spy.call_args_list]
    assert all(v.is_contiguous() for inputs in given for v in inputs.values()), "as compiled for"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_nothing_at_or_behind_a_token_has_relevance(name: str, explain: Explain) -> None:
    inputs = BY_NAME[name].example(2, 7, F64)
    found = explain(BY_NAME[name], audit=False).explain_generation(inputs, start=1, chunk=2)
    relevance = found.relevance[sequence_of(inputs)]
    for target in range(len(found)):
        assert not relevance[:, target, target + 1 :].any()
        assert relevance[:, target, : target + 1].any()
    assert "input_ids" in found.relevance
    assert found.relevance["input_ids"].abs().sum(-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padded_batches(name: str, side: str, explain: Explain) -> None:
    explainer, inputs = explain(BY_NAME[name], audit=False), BY_NAME[name].example(3, 9, F64)
    for row, padding in enumerate((0, 2, 1)):
        here = slice(0, padding) if side == "left" else slice(9 - padding, 9)
        inputs["attention_mask"][row, here] = 0
        inputs["input_ids"][row, here] = 0
    found = explainer.explain_generation(inputs, start=3, chunk=2)
    assert_equal(found, one_by_one(explainer, inputs, 3), 1e-13)
    if side == "right":
        short = {n: v[1:2, :7] for n, v in inputs.items()}
        for ours, own in zip(found, one_by_one(explainer, short, 3), strict=False):
            a, b = ours.relevance["input_ids"][1:2, :7], own.relevance["input_ids"]
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    relevance = found.relevance["input_ids"]
    hidden = (inputs["attention_mask"] == 0)[:, None].expand(relevance.shape)
    real = inputs["attention_mask"][:, 3:, None].bool().expand(relevance.shape)
    assert not relevance[hidden & real].any()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_model_that_looks_ahead_is_noticed(chunk: int, explain: Explain) -> None:
    explainer, inputs = explain(READER, audit=False), READER.example(2, 8, F64)
    expected = one_by_one(explainer, inputs, 2)
    with runs(explainer) as spy:
        found = explainer.explain_generation(inputs, start=2, chunk=chunk)
    assert_equal(found, expected, 1e-13)
    assert lengths(spy)[-1] == 8
    assert found.relevance["input_ids"][:, 0, 3:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_looking_ahead(dtype: torch.dtype, explain: Explain) -> None:
    explainer = explain(BY_NAME["llama"], dtype=dtype, audit=False, exact=False)
    with runs(explainer) as spy:
        explainer.explain_generation(BY_NAME["llama"].example(4, 20, dtype), start=2, chunk=5)
    assert lengths(spy) == [6, 11, 16, 19]


class Odd(nn.Module):
    """A causal model that takes texts of three tokens or more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        torch._check(input_ids.shape[1] >= 3)
        hidden = self.embed(input_ids).cumsum(1).tanh()
        return {"logits": self.head(hidden)}


def test_where_a_prefix_is_refused_the_whole_text_serves() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    explainer = attnlrp_fx.compile(Odd().eval(), {"input_ids": ids}, backend="eager")
    with pytest.raises(InputError):
        explainer({"input_ids": ids[:, :2]})
    found = explainer.explain_generation({"input_ids": ids}, start=1, chunk=2)
    assert_equal(found, one_by_one(explainer, {"input_ids": ids}, 1), 1e-6)


def test_a_fixed_length_is_explained_on_the_whole_text() -> None:
    case = BY_NAME["llama"]
    inputs = case.example(2, 6, F64)
    explainer = attnlrp_fx.compile(case.model(F64), inputs, backend="eager", dynamic_shapes=None)
    assert explainer.lengths_like("input_ids") == ()
    with runs(explainer) as spy:
        found = explainer.explain_generation(inputs, start=2, chunk=1)
    assert lengths(spy) == [6]
    assert_equal(found, one_by_one(explainer, inputs, 2), 1e-13)


def test_which_inputs_have_a_length(explain: Explain) -> None:
    inputs_of = {"llama": ("input_ids", "attention_mask"), "t5": ("input_ids", "attention_mask")}
    for name, expected in inputs_of.items():
        assert explain(BY_NAME[name], audit=False).lengths_like("input_ids") == expected
    own = explain(BY_NAME["t5"], audit=False).lengths_like("decoder_input_ids")
    assert own == ("decoder_input_ids",)


def test_ids_of_other_integers() -> None:
    case = BY_NAME["llama"]
    inputs = {n: v.int() for n, v in case.example(1, 7).items()}
    explainer = attnlrp_fx.compile(case.model(), inputs, backend="eager")
    found = explainer.explain_generation(inputs, start=2, chunk=2)
    assert_equal(found, one_by_one(explainer, inputs, 2), 1e-6)


def test_the_outputs_of_no_run_are_kept(explain: Explain) -> None:
    inputs = BY_NAME["llama"].example(2, 7, F64)
    found = explain(BY_NAME["llama"], audit=False).explain_generation(inputs, start=2, chunk=2)
    assert found.outputs is None
    assert all(one.outputs is None for one in found)
    assert all(torch.equal(one.inputs["input_ids"], inputs["input_ids"]) for one in found)
    assert repr(found) == "Explanations(targets=5, relevance: input_ids (2, 5, 7))"


def test_each_tokens_ledger_closes(explain: Explain) -> None:
    inputs = BY_NAME["gpt2"].example(2, 6, F64)
    found = explain(BY_NAME["gpt2"], audit=True).explain_generation(inputs, start=2, chunk=3)
    for one in found:
        assert abs(one.ledger.residual) < 1e-9
        assert float(one.target_value.sum()) == pytest.approx(one.ledger.target)


def test_names_of_the_sequence(explain: Explain) -> None:
    explainer, inputs = explain(BY_NAME["llama"], audit=False), BY_NAME["llama"].example(1, 6, F64)
    found = explainer.explain_generation(**inputs, start=3, sequence="input_ids")
    assert_equal(found, one_by_one(explainer, inputs, 3), 1e-13)


# What cannot be explained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0}, r"start is 0, the text has 6 tokens(.|\n)*from 1 to 5"),
        ({"start": -1}, "start is -1"),
        ({"start": 6}, "start is 6, the text has 6 tokens"),
        ({"start": 2, "chunk": 0}, "chunk is 0"),
        ({"start": 2, "sequence": "labels"}, r"no input 'labels'(.|\n)*input_ids, attention_mask"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(
    options: dict[str, Any], message: str, explain: Explain
) -> None:
    inputs = BY_NAME["llama"].example(1, 6, F64)
    with pytest.raises(InputError, match=message):
        explain(BY_NAME["llama"], audit=False).explain_generation(inputs, **options)


def test_a_text_of_one_token(explain: Explain) -> None:
    inputs = BY_NAME["llama"].example(1, 1, F64)
    with pytest.raises(InputError, match="pass a longer text"):
        explain(BY_NAME["llama"], audit=False).explain_generation(inputs, start=1)


@pytest.mark.parametrize("keep", [1, 4])
def test_a_model_that_returns_some_positions_only(keep: int) -> None:
    case = BY_NAME["llama"]
    inputs = case.example(1, 9)
    explainer = attnlrp_fx.compile(
        case.model(), {**inputs, "logits_to_keep": keep}, backend="eager"
    )
    for start in (1, 3, 8):
        with pytest.raises(InputError, match="compile a language model, without logits_to_keep"):
            explainer.explain_generation(inputs, start=start, chunk=3)


def test_a_model_that_predicts_no_tokens(explain: Explain) -> None:
    inputs = BY_NAME["bert"].example(1, 6, F64)
    with pytest.raises(InputError, match="does not return a prediction of every token"):
        explain(BY_NAME["bert"], audit=False).explain_generation(inputs, start=2)


def test_a_text_longer_than_the_models_positions(explain: Explain) -> None:
    case = BY_NAME["gpt2"]
    explainer = explain(case, audit=False)
    found = explainer.explain_generation(case.example(1, POSITIONS, F64), start=POSITIONS - 2)
    assert len(found) == 2
    with pytest.raises(InputError, match="too long"):
        explainer.explain_generation(case.example(1, POSITIONS + 1, F64), start=2, chunk=3)


# In one line


@pytest.mark.parametrize(("name", "chunk"), [("llama", 2), ("t5", 16)])
def test_a_model_writes_and_is_explained(name: str, chunk: int) -> None:
    model = BY_NAME[name].model(F64)
    prompt = tokens(1, 5)
    found = explain_generation(model, None, prompt, max_new_tokens=5, chunk=chunk)
    written = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    start = written.shape[1] - 5
    ids = found.inputs[sequence_of(found.inputs)]
    assert torch.equal(ids, written)
    assert torch.equal(found.target_index, written[:, start:])
    assert found.inputs["attention_mask"].shape == found.inputs["input_ids"].shape
    explainer = attnlrp_fx.compile(model, found.inputs, backend="eager")
    assert_equal(found, one_by_one(explainer, found.inputs, start), 1e-12)


class Words:
    """A tokenizer of numbers."""

    pad_token = "0"

    def __call__(self, texts: list[str], **options: Any) -> Inputs:
        ids = torch.tensor([[int(word) for word in text.split()] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_a_text_is_tokenized_and_named() -> None:
    model = BY_NAME["gpt2"].model()
    found = explain_generation(
        model, Words(), "7 9 4", max_new_tokens=3, generate={"do_sample": False}, audit=True
    )
    assert found.target_index is not None
    written = [str(i) for i in found.target_index[0].tolist()]
    assert [one.labels for one in found] == [[word] for word in written]
    assert found[0].tokens == {"input_ids": [["7", "9", "4", *written]]}
    assert all(abs(one.ledger.residual) < 1e-4 for one in found)


def test_the_end_of_a_text_is_explained_and_the_last() -> None:
    model = BY_NAME["llama"].model()
    prompt = tokens(1, 5)
    end = int(model.generate(**prompt, max_new_tokens=3)[0, -1])
    found = explain_generation(model, None, prompt, generate={"eos_token_id": end})
    assert len(found) <= 3
    assert found[-1].target_index.tolist() == [end]


def test_positions_where_sizes_are_equal_by_chance() -> None:
    model, prompt = BY_NAME["gpt2"].model(F64), tokens(1, HIDDEN - 4)
    together, apart = (
        explain_generation(model, None, prompt, max_new_tokens=4, chunk=chunk, positions=True)
        for chunk in (16, 3)
    )
    assert together.inputs["input_ids"].shape[1] == HIDDEN
    assert_equal(together, apart, 1e-12)


def test_a_decoders_own_prompt() -> None:
    model = BY_NAME["t5"].model()
    for begun in ([[0, 7, 8]], [[7, 8]]):  # with the first token, and without
        prompt = {**tokens(1, 5), "decoder_input_ids": torch.tensor(begun)}
        found = explain_generation(model, None, prompt, max_new_tokens=4)
        assert found.relevance["decoder_input_ids"].shape == (1, 4, 7)


def test_sampling_and_what_it_returns() -> None:
    model = BY_NAME["llama"].model()
    options = {"do_sample": True, "return_dict_in_generate": True}
    found = explain_generation(model, None, tokens(1, 5), max_new_tokens=2, generate=options)
    assert found.relevance["input_ids"].shape == (1, 2, 7)


@pytest.mark.parametrize(
    ("name", "prompt", "options", "message"),
    [
        ("llama", tokens(2, 5), {}, r"the prompt's input_ids are \(2, 5\), not \(1, length\)"),
        ("llama", {"inputs_embeds": torch.zeros(1, 2, 32)}, {}, "input_ids are missing"),
        ("llama", {"input_ids": [[3, 4]]}, {}, "input_ids are missing"),
        ("llama", tokens(1, 5), {"max_new_tokens": 0}, r"could not generate(.|\n)*greater than 0"),
        ("llama", tokens(1, 5), {"generate": {"beans": 4}}, r"could not generate(.|\n)*'beans'"),
        ("bert", tokens(1, 5), {}, "BertForSequenceClassification does not generate text"),
        (
            "llama",
            tokens(1, 5),
            {"generate": {"num_beams": 2, "num_return_sequences": 2}},
            "the model wrote 2 texts",
        ),
    ],
)
def test_prompts_that_do_not_serve(
    name: str, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        explain_generation(BY_NAME[name].model(), None, prompt, **options)


def test_an_empty_prompt() -> None:
    with pytest.raises(InputError, match="text 0 is empty"):
        explain_generation(BY_NAME["llama"].model(), Words(), " ")


def test_a_model_that_writes_nothing() -> None:
    model = BY_NAME["llama"].model()
    prompt = tokens(1, 5)
    with (
        mock.patch.object(type(model), "generate", lambda self, **given: given["input_ids"]),
        pytest.raises(InputError, match="the model wrote nothing"),
    ):
        explain_generation(model, None, prompt)
