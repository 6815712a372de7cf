"""Bad input: our own error type, and a message that says what, where, why and what to do."""

from typing import Any

import pytest
import torch
from models import BY_NAME, POSITIONS, VOCABULARY, Inputs
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import (
    AttnLRPError,
    BackendError,
    CaptureError,
    Composite,
    Epsilon,
    ExplainableGraphModule,
    Gradient,
    Identity,
    InputError,
    Match,
    RuleError,
    TargetError,
    Uniform,
)
from attnlrp_fx import errors as errors_module


@pytest.fixture(scope="module")
def gpt2() -> ExplainableGraphModule:
    case = BY_NAME["gpt2"]
    return attnlrp_fx.compile(case.model(), case.example(), backend="eager")


@pytest.fixture
def inputs() -> Inputs:
    return BY_NAME["gpt2"].example(2, 5)


# Capture


class Branching(nn.Module):
    """Branches on a value of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the user's own line
            return x * 2
        return x


def test_a_data_dependent_branch_shows_the_users_line() -> None:
    with pytest.raises(CaptureError, match="Branching could not be captured") as caught:
        attnlrp_fx.compile(Branching().eval(), torch.ones(2, 3), backend="eager")
    assert "if x.sum() > 0:  # the user's own line" in caught.value.where
    assert "test_errors.py" in caught.value.where
    assert "torch.where or torch.cond" in caught.value.remedy


def test_a_failed_capture_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """torch.export would print the graph so far."""
    with pytest.raises(CaptureError):
        attnlrp_fx.compile(Branching().eval(), torch.ones(2, 3), backend="eager")
    assert capsys.readouterr().err == ""


def test_a_model_in_training_mode() -> None:
    with pytest.raises(CaptureError, match="training mode") as caught:
        attnlrp_fx.compile(nn.Dropout(0.5), torch.ones(2, 3), backend="eager")
    assert "model.eval()" in caught.value.remedy


def test_a_module_that_is_partly_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval()
    model[1].train()
    with pytest.raises(CaptureError, match="training mode"):
        attnlrp_fx.compile(model, torch.ones(2, 3), backend="eager")


def test_inputs_that_the_model_itself_refuses() -> None:
    with pytest.raises(CaptureError, match="Linear could not be captured") as caught:
        attnlrp_fx.compile(nn.Linear(3, 2).eval(), torch.ones(2, 4), backend="eager")
    assert "model(**inputs) runs" in caught.value.remedy


def test_names_and_arguments_that_forward_does_not_have() -> None:
    case = BY_NAME["distilbert"]
    with pytest.raises(InputError, match="forward has no argument 'token_type_ids'"):
        attnlrp_fx.compile(
            nn.Linear(3, 2).eval(), {"input": torch.ones(2, 3), "token_type_ids": torch.ones(2)}
        )
    with pytest.raises(InputError, match="the inputs do not fit the model's forward"):
        attnlrp_fx.compile(nn.Linear(3, 2).eval(), (torch.ones(2, 3), torch.ones(2)))
    with pytest.raises(InputError, match="there are no inputs"):
        attnlrp_fx.compile(case.model(), {}, backend="eager")


def test_no_inputs_at_all() -> None:
    with pytest.raises(InputError, match="inputs"):
        attnlrp_fx.compile(nn.Linear(3, 2).eval(), backend="eager")


# Rules


class Distances(nn.Module):
    """An op on the way that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.i0(x[:, None] * x[..., None])[:, 0] @ self.prototypes.T


@torch.library.custom_op("attnlrp_fx_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda context, gradient: 2 * gradient)


class Custom(nn.Module):
    """A custom op on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return doubled(x) + x


UNKNOWN = [(Distances, "i0", "torch.i0"), (Custom, "doubled", "doubled(x)")]


@pytest.mark.parametrize(("build", "name", "line"), UNKNOWN)
def test_an_op_without_a_rule(build: type[nn.Module], name: str, line: str) -> None:
    with pytest.raises(RuleError, match="no rule of composite 'attnlrp' claims") as caught:
        attnlrp_fx.compile(build().eval(), torch.randn(2, 3), backend="eager")
    assert name in caught.value.what
    assert line in caught.value.where
    assert "test_errors.py" in caught.value.where
    assert "fallback='gradient'" in caught.value.remedy
    assert "Gradient()" in caught.value.remedy


@pytest.mark.parametrize(("build", "name", "line"), UNKNOWN)
def test_the_gradient_fallback_is_reported(build: type[nn.Module], name: str, line: str) -> None:
    x = torch.randn(2, 3)
    model = build().eval()
    explainer = attnlrp_fx.compile(model, x, backend="eager", fallback="gradient")
    (fallback,) = explainer.report().fallbacks
    assert name in fallback
    assert line in fallback
    assert "gradient fallback" in str(explainer.report())
    if build is Custom:
        relevance = explainer(x, target=1).relevance["x"]
        torch.testing.assert_close(relevance, 3 * x * torch.tensor([0.0, 1.0, 0.0]))


def test_the_remedy_of_a_missing_rule_works() -> None:
    composite = attnlrp_fx.COMPOSITES["attnlrp"].with_rules((Match(op="*doubled*"), Gradient()))
    explainer = attnlrp_fx.compile(
        Custom().eval(), torch.randn(2, 3), composite=composite, backend="eager"
    )
    assert explainer.report().fallbacks == ()


def test_a_rule_that_does_not_fit() -> None:
    wrong = Composite("wrong", ((Match(op="aten.silu*"), Uniform()), (Match(), Gradient())))
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU()).eval()
    with pytest.raises(RuleError, match=r"rule Uniform.* cannot stand at an op of kind") as caught:
        attnlrp_fx.compile(model, torch.randn(2, 3), composite=wrong, backend="eager")
    assert "activation" in caught.value.what
    assert "aten.silu" in caught.value.where
    assert "product" in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "kind", "message", "remedy"),
    [
        ({"composite": "atnlrp"}, RuleError, "no composite 'atnlrp'", "attnlrp, cp-lrp, gradient"),
        ({"backend": "indcutor"}, BackendError, "no backend 'indcutor'", "eager, inductor"),
        ({"fallback": "zero"}, InputError, "fallback is 'zero'", "'error' or 'gradient'"),
        ({"explain": ["inputs"]}, InputError, "no input 'inputs' to explain", "input"),
        ({"target": "positive"}, TargetError, "from a str", "Logit, Contrast, LogProb"),
        ({"target": 9}, TargetError, "index 9 is out of range", ""),
    ],
    ids=str,
)
def test_unknown_options(
    options: dict[str, Any], kind: type[AttnLRPError], message: str, remedy: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        attnlrp_fx.compile(
            nn.Linear(3, 2).eval(), torch.ones(2, 3), **{"backend": "eager"} | options
        )
    assert remedy in caught.value.remedy


def test_a_backend_that_fails() -> None:
    def broken(graph_module: Any, inputs: Any) -> Any:
        raise ValueError("no such device")

    with pytest.raises(BackendError, match="no such device") as caught:
        attnlrp_fx.compile(nn.Linear(3, 2).eval(), torch.ones(2, 3), backend=broken)
    assert "backend='eager'" in caught.value.remedy


def test_unknown_kinds_and_negative_epsilons() -> None:
    with pytest.raises(RuleError, match="no kind of op 'lienar'"):
        Match(kind="lienar")
    with pytest.raises(ValueError, match="epsilon must be 0 or more, got -1"):
        Epsilon(-1)
    assert Identity() == Identity()


# Nothing to explain


class Counting(nn.Module):
    """Integers in, and no embedding."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids.float() * 2


def test_an_integer_input_without_an_embedding() -> None:
    with pytest.raises(InputError, match="nothing to explain") as caught:
        attnlrp_fx.compile(Counting().eval(), {"ids": torch.ones(2, 3, dtype=torch.int64)})
    assert "must look up an embedding" in caught.value.why
    assert "inputs_embeds" in caught.value.remedy


def test_a_mask_cannot_be_explained() -> None:
    case = BY_NAME["gpt2"]
    with pytest.raises(InputError, match="relevance cannot reach input 'attention_mask'"):
        attnlrp_fx.compile(
            case.model(), case.example(), explain=["attention_mask"], backend="eager"
        )


# Inputs of a call


def test_a_missing_name(gpt2: ExplainableGraphModule, inputs: Inputs) -> None:
    with pytest.raises(InputError, match="input 'attention_mask' is missing") as caught:
        gpt2(input_ids=inputs["input_ids"])
    assert "input_ids, attention_mask" in caught.value.why


def test_an_unknown_name(gpt2: ExplainableGraphModule, inputs: Inputs) -> None:
    with pytest.raises(InputError, match="there is no input 'token_type_ids'") as caught:
        gpt2(**inputs, token_type_ids=inputs["input_ids"])
    assert "leave it out" in caught.value.remedy


def test_a_wrong_rank(gpt2: ExplainableGraphModule, inputs: Inputs) -> None:
    with pytest.raises(InputError, match=r"input 'input_ids' has shape \(5,\)") as caught:
        gpt2(**{**inputs, "input_ids": inputs["input_ids"][0]})
    assert "1 dimensions, the model was compiled with 2" in caught.value.why


def test_a_wrong_dtype(gpt2: ExplainableGraphModule, inputs: Inputs) -> None:
    with pytest.raises(InputError, match=r"input 'input_ids' is torch\.float32"):
        gpt2(**{**inputs, "input_ids": inputs["input_ids"].float()})


def test_no_tensor(gpt2: ExplainableGraphModule, inputs: Inputs) -> None:
    with pytest.raises(InputError, match="input 'input_ids' is a list, not a tensor") as caught:
        gpt2(**{**inputs, "input_ids": inputs["input_ids"].tolist()})
    assert 'return_tensors="pt"' in caught.value.remedy


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_and_an_empty_text(
    gpt2: ExplainableGraphModule, shape: tuple[int, int]
) -> None:
    empty = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(InputError, match="input 'input_ids' is empty"):
        gpt2(input_ids=empty, attention_mask=empty)


class Tokenizer:
    """As little of a tokenizer as is needed: one token a word."""

    pad_token = "<pad>"
    eos_token = "<eos>"

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Tensor]:
        ids = [[4 + len(word) for word in text.split()] for text in texts]
        return {"input_ids": torch.tensor(ids)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


def test_an_empty_text() -> None:
    model = BY_NAME["gpt2"].model()
    with pytest.raises(InputError, match="text 1 is empty"):
        attnlrp_fx.explain(model, Tokenizer(), ["some words", "  "])
    with pytest.raises(InputError, match="no text to explain"):
        attnlrp_fx.explain(model, Tokenizer(), [])


def test_the_one_liner_works() -> None:
    explanation = attnlrp_fx.explain(BY_NAME["gpt2"].model(), Tokenizer(), "a few words", target=7)
    assert explanation.tokens == {"input_ids": [["<5>", "<7>", "<9>"]]}
    assert explanation.labels == ["<7>"]


@pytest.mark.parametrize("index", [VOCABULARY, -1])
def test_a_token_beyond_the_vocabulary(
    gpt2: ExplainableGraphModule, inputs: Inputs, index: int
) -> None:
    inputs["input_ids"][1, 2] = index
    with pytest.raises(
        InputError, match=f"holds index {index}, its table .* has 61 rows"
    ) as caught:
        gpt2(**inputs)
    assert "transformer.wte" in str(caught.value)
    assert "tokenizer" in caught.value.remedy


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta", "opt"])
def test_a_sequence_longer_than_the_position_table(name: str) -> None:
    case = BY_NAME[name]
    explainer = attnlrp_fx.compile(case.model(), case.example(), backend="eager")
    longest = POSITIONS - 2 if name == "roberta" else POSITIONS
    assert explainer(**case.example(1, longest)).relevance["input_ids"].shape == (1, longest)
    with pytest.raises(InputError, match="the sequence is too long") as caught:
        explainer(**case.example(1, longest + 3))
    assert "shorten the inputs (truncation=True, max_length=" in caught.value.remedy


def test_a_target_out_of_range(gpt2: ExplainableGraphModule, inputs: Inputs) -> None:
    for target, message in [
        (VOCABULARY, f"index {VOCABULARY} is out of range"),
        (attnlrp_fx.Logit(0, position=5), "position 5 is out of range"),
        (attnlrp_fx.Logit(0, output="scores"), "no floating output 'scores'"),
        (lambda out: out.logits.sum(), "must return one value a row"),
        (lambda out: out.logits[:, 0, 0].detach(), "does not depend on the model's floating"),
    ]:
        with pytest.raises(TargetError, match=message):
            gpt2(**inputs, target=target)


# The errors themselves


def test_every_error_is_ours_and_says_all_it_knows() -> None:
    kinds = [
        kind
        for kind in vars(errors_module).values()
        if isinstance(kind, type) and issubclass(kind, AttnLRPError)
    ]
    assert len(kinds) >= 10
    for kind in kinds:
        error = kind("what", where="where", why="why", remedy="remedy")
        assert str(error) == "what\n  where: where\n  why: why\n  what to do: remedy"
        assert kind is AttnLRPError or hasattr(attnlrp_fx, kind.__name__)


class BySize(nn.Module):
    """Takes another path for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.mean(1) if x.shape[1] < 10 else y.amax(1)


def test_another_path_at_other_sizes() -> None:
    """What was captured for short inputs would be silently wrong for long ones."""
    explainer = attnlrp_fx.compile(BySize().eval(), torch.randn(2, 5, 3), backend="eager")
    assert explainer(torch.randn(4, 9, 3)).relevance["x"].shape == (4, 9, 3)
    assert explainer(torch.randn(1, 1, 3)).relevance["x"].shape == (1, 1, 3)
    with pytest.raises(InputError, match="another path") as caught:
        explainer(torch.randn(2, 12, 3))
    assert "compile again" in str(caught.value)


@pytest.mark.parametrize("example", [4, 40])
def test_a_convolution_takes_any_batch(example: int) -> None:
    """PyTorch chooses its kernel by the batch; the model takes the same path."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    explainer = attnlrp_fx.compile(model, torch.rand(example, 1, 6, 6), backend="eager")
    for rows in (1, 15, 33):
        images = torch.rand(rows, 1, 6, 6)
        relevance = explainer(images, target=0).relevance["input"]
        one = explainer(images[-1:], target=0).relevance["input"]
        torch.testing.assert_close(relevance[-1:], one)
