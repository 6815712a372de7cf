"""The explainable graph module: one program for every size, target, weight, padding and dtype."""

import copy
from typing import Any

import pytest
import torch
from conftest import Explain
from models import (
    BY_NAME,
    CASES,
    TRANSFORMERS,
    VOCABULARY,
    Case,
    Inputs,
    is_floating,
    tensors_of,
    token_ids,
)
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import Contrast, Explanation, InputError, Logit, LogProb, NonFiniteError
from attnlrp_fx.calculus.tape import Runner

F64 = torch.float64
SIZES = [(1, 1), (1, 6), (4, 1), (5, 13)]


def error(found: Tensor, expected: Tensor) -> float:
    """The difference's norm, relative to the expected one's."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_the_models_own_at_every_size(case: Case, explain: Explain) -> None:
    explainer = explain(case, "gradient", audit=False, exact=False)
    compiled = explainer.compilations
    for batch, length in SIZES:
        inputs = case.example(batch, length, F64)
        explanation = explainer(**inputs)
        with torch.no_grad():
            expected = explainer.model(**inputs)
        assert type(explanation.outputs) is type(expected)
        found, leaves = tensors_of(explanation.outputs), tensors_of(expected)
        for ours, own in zip(found, leaves, strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-6 if case.casts else 1e-12, atol=1e-7)
        for name, relevance in explanation.relevance.items():
            assert relevance.shape == inputs[name].shape
    assert explainer.compilations == compiled


def test_no_target_index_or_position_recompiles(explain: Explain) -> None:
    explainer = explain(BY_NAME["llama"])
    compiled = explainer.compilations
    inputs = BY_NAME["llama"].example(3, 8, F64)
    per_row = torch.tensor([4, 1, 9])
    targets = [
        None,
        7,
        Logit(7),
        Logit(per_row),
        Logit(7, position=2),
        Logit([1, 2, 3], position=[0, 5, -1]),
        Contrast(3, against=5),
        Contrast(3, against=[1, 2]),
        Contrast(per_row, against=None),
        LogProb(11),
        lambda outputs: outputs.logits[:, 0, 3],
        lambda outputs: outputs.logits.square().mean((1, 2)),
    ]
    seen = {
        float(explainer(**inputs, target=target).relevance["input_ids"].sum()) for target in targets
    }
    assert len(seen) == len(targets) - 1, "only 7 and Logit(7) mean the same"
    assert explainer.compilations == len(explainer.report().compilations) == compiled


def test_relevance_is_linear_in_the_target(explain: Explain) -> None:
    explainer = explain(BY_NAME["gpt2"])
    inputs = BY_NAME["gpt2"].example(2, 6, F64)
    three, five, both = (
        explainer(**inputs, target=target).relevance["input_ids"]
        for target in (Logit(3), Logit(5), Contrast(3, against=5))
    )
    torch.testing.assert_close(three - five, both, rtol=0, atol=1e-12)


def test_rows_are_explained_for_targets_of_their_own(explain: Explain) -> None:
    explainer = explain(BY_NAME["qwen3"])
    inputs = BY_NAME["qwen3"].example(3, 6, F64)
    index, position = torch.tensor([5, 0, 60]), torch.tensor([3, 5, 1])
    together = explainer(**inputs, target=Logit(index, position))
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = explainer(**one, target=Logit(int(index[row]), int(position[row])))
        torch.testing.assert_close(
            together.relevance["input_ids"][row],
            alone.relevance["input_ids"][0],
            rtol=0,
            atol=1e-12,
        )
        after = together.relevance["input_ids"][row, position[row] + 1 :]
        assert not after.any(), "a causal model's later tokens have no relevance"


def test_another_output_compiles_one_program_more() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.first(x), "values": self.second(x)}

    model, x = Two().eval(), torch.randn(2, 6)
    explainer = attnlrp_fx.compile(model, {"x": x}, composite="gradient", backend="eager")
    assert explainer.compilations == 1
    for _ in range(2):
        relevance = explainer(x=x, target=Logit(2, output="values")).relevance["x"]
        torch.testing.assert_close(relevance, x * model.second.weight[2])
        assert explainer.compilations == 2
    both = explainer(x=x, target=lambda out: out["logits"][:, 0] + out["values"][:, 0])
    torch.testing.assert_close(
        both.relevance["x"], x * (model.first.weight[0] + model.second.weight[0])
    )
    assert explainer.compilations == 3


# Padding


def padded(case: Case, lengths: list[int], side: str) -> Inputs:
    """A batch of rows of unlike lengths, with a mask."""
    inputs = case.example(len(lengths), max(lengths), F64)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.where(mask == 1, inputs["input_ids"], 0)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


ROTARY = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt_neox")
PADDED = [(case, "right") for case in TRANSFORMERS] + [(BY_NAME[n], "left") for n in ROTARY]


@pytest.mark.parametrize(("case", "side"), PADDED, ids=lambda value: str(value))
def test_each_padded_row_equals_its_unpadded_run(case: Case, side: str, explain: Explain) -> None:
    explainer = explain(case)
    inputs = padded(case, [7, 4, 1], side)
    together = explainer(**inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        one |= {name: one[name][:, mask] for name in ("input_ids", "attention_mask")}
        alone = explainer(**one)
        for name, relevance in alone.relevance.items():
            found = together.relevance[name][row]
            if name == "input_ids":
                assert not found[~mask].any(), "padding has exactly no relevance"
                found = found[mask]
            torch.testing.assert_close(found, relevance[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            together.target_value[row], alone.target_value[0], rtol=1e-9, atol=1e-10
        )


# Weights


def test_an_optimisers_step_shows_at_once() -> None:
    case = BY_NAME["gpt2"]
    model, inputs = case.model(F64), case.example(2, 6, F64)
    explainer = attnlrp_fx.compile(model, inputs, backend="eager")
    before = explainer(**inputs)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs).logits.square().mean().backward()
    optimiser.step()
    stepped = explainer(**inputs)
    assert error(stepped.outputs.logits, model(**inputs).logits.detach()) < 1e-12
    assert error(stepped.relevance["input_ids"], before.relevance["input_ids"]) > 1e-3
    fresh = attnlrp_fx.compile(model, inputs, backend="eager")(**inputs)
    assert torch.equal(fresh.relevance["input_ids"], stepped.relevance["input_ids"])
    model.load_state_dict(case.model(F64).state_dict())
    assert torch.equal(explainer(**inputs).relevance["input_ids"], before.relevance["input_ids"])
    assert explainer.compilations == 1


def test_a_replaced_parameter_shows_at_once() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    x = torch.randn(2, 6)
    explainer = attnlrp_fx.compile(model, x, backend="eager")
    before = explainer(x, target=1).relevance["input"]
    model[2].weight = nn.Parameter(2 * model[2].weight.detach())
    torch.testing.assert_close(explainer(x, target=1).relevance["input"], 2 * before)
    assert explainer.compilations == 1


def test_a_changed_dtype_is_named() -> None:
    model, x = nn.Linear(6, 2).eval(), torch.randn(2, 6)
    explainer = attnlrp_fx.compile(model, x, backend="eager")
    model.double()
    with pytest.raises(InputError, match=r"parameter 'weight' is torch.float64 now"):
        explainer(x)


# Dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "opt", "distilbert", "t5"])
def test_dtypes(name: str, dtype: torch.dtype, explain: Explain) -> None:
    """A short computation is off by some tens of roundings; relevance is float32 or better."""
    case = BY_NAME[name]
    inputs = case.example(2, 7, dtype)
    explanation = explain(case, dtype=dtype, audit=False, exact=False)(**inputs, target=2)
    exact = explain(case)(**inputs, target=2)
    assert explanation.relevance["input_ids"].dtype == torch.float32
    assert explanation.target_value.dtype == torch.float32
    assert explanation.outputs.logits.dtype == dtype
    rounding = 32 * torch.finfo(dtype).eps
    assert error(explanation.relevance["input_ids"], exact.relevance["input_ids"]) < rounding
    assert explain(case)(**inputs).relevance["input_ids"].dtype == F64


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_sdpa_and_eager_attention_agree(name: str) -> None:
    case = BY_NAME[name]
    inputs = padded(case, [7, 4], "right")
    found = {}
    for implementation in ("sdpa", "eager"):
        model = case.model()
        model.set_attn_implementation(implementation)
        explainer = attnlrp_fx.compile(model, case.example(3, 5), backend="eager")
        found[implementation] = explainer(**inputs)
        raised = next(p for p in explainer.report().passes if p.name == "raise_attention")
        assert model.config._attn_implementation == implementation
        if implementation == "eager":
            assert raised.changes == case.layers * (3 if "decoder_input_ids" in inputs else 1), (
                raised
            )
    for key, expected in found["sdpa"].relevance.items():
        assert error(found["eager"].relevance[key], expected) <= 1e-5


def on(inputs: Inputs, device: str) -> Inputs:
    return {name: value.to(device) for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["qwen3", "bart", "mlp"])
def test_a_meta_model_compiles_and_runs(name: str) -> None:
    case = BY_NAME[name]
    model = case.model().to("meta")
    explainer = attnlrp_fx.compile(model, on(case.example(3, 5), "meta"), backend="eager")
    inputs = on(case.example(2, 7), "meta")
    explanation = explainer(**inputs)
    for key, relevance in explanation.relevance.items():
        assert relevance.device.type == "meta"
        assert relevance.shape == inputs[key].shape
    assert explanation.target_value.shape == (2,)


def devices_in(graph: torch.fx.Graph) -> set[str]:
    """The devices that a graph names or computes on."""
    named = {
        str(value)
        for node in graph.nodes
        for value in (*node.args, *node.kwargs.values())
        if isinstance(value, torch.device)
    }
    values = (node.meta.get("val") for node in graph.nodes)
    return named | {str(value.device) for value in values if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", ["gemma3", "bert", "mlp"])
def test_no_device_survives_a_move(name: str) -> None:
    """Compiled on the CPU, moved: the program names no other device, and computes on none."""
    case = BY_NAME[name]
    explainer = attnlrp_fx.compile(case.model(), case.example(3, 5), backend="eager")
    explainer.to("meta")
    explanation = explainer(**on(case.example(2, 7), "meta"))
    assert explainer.compilations == 2
    assert devices_in(explainer.program.graph) == {"meta"}
    assert {r.device.type for r in explanation.relevance.values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_equals_cpu(case: Case) -> None:
    inputs = case.example(2, 7, F64)
    explainer = attnlrp_fx.compile(
        case.model(F64), case.example(3, 5, F64), backend="eager", target=case.target
    )
    expected = explainer(**inputs).relevance
    explainer.to("cuda")
    found = explainer(**on(inputs, "cuda")).relevance
    for name, relevance in found.items():
        assert relevance.device.type == "cuda"
        assert error(relevance.cpu(), expected[name]) <= 1e-6
    explainer.to("cpu")
    for name, relevance in explainer(**inputs).relevance.items():
        assert torch.equal(relevance, expected[name])


def test_inductor_equals_eager() -> None:
    case = BY_NAME["gpt2"]
    model = copy.deepcopy(case.model())
    model.transformer.h = model.transformer.h[:1]
    model.config.n_layer = 1
    found = {
        backend: attnlrp_fx.compile(model, case.example(3, 5), backend=backend)
        for backend in ("eager", "inductor")
    }
    for batch, length in [(2, 7), (1, 4)]:
        inputs = case.example(batch, length)
        eager, compiled = (explainer(**inputs) for explainer in found.values())
        assert error(compiled.relevance["input_ids"], eager.relevance["input_ids"]) <= 1e-5
        assert error(compiled.outputs.logits, eager.outputs.logits) <= 1e-5
    assert found["inductor"].compilations == 1


# The interface


def test_the_ways_to_pass_inputs(explain: Explain) -> None:
    case = BY_NAME["bert"]
    explainer, inputs = explain(case), case.example(2, 5, F64)
    expected = explainer(**inputs).relevance["input_ids"]
    for explanation in (
        explainer(inputs),
        explainer({"input_ids": inputs["input_ids"]}, attention_mask=inputs["attention_mask"]),
        explainer(inputs["input_ids"], inputs["attention_mask"]),
        explainer(input_ids=inputs["input_ids"].int(), attention_mask=inputs["attention_mask"]),
    ):
        assert isinstance(explanation, Explanation)
        assert torch.equal(explanation.relevance["input_ids"], expected)
    with pytest.raises(InputError, match="3 inputs given, the model takes 2"):
        explainer(inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"])


def test_the_three_graphs_and_the_report(explain: Explain) -> None:
    case = BY_NAME["llama"]
    explainer, inputs = explain(case), case.example(2, 5, F64)
    with torch.no_grad():
        captured = explainer.captured(*inputs.values())
        rewritten = explainer.rewritten(*inputs.values())
    expected = explainer(**inputs)
    torch.testing.assert_close(captured[0], expected.outputs.logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(rewritten[0], expected.outputs.logits)
    for graph_module in (explainer.captured, explainer.rewritten, explainer.program):
        graph_module.graph.lint()
    report = explainer.report()
    text = str(report)
    for words in ("attnlrp", "eager", "raise_norms", "Attention(weights=0.5)", "modeling_llama.py"):
        assert words in text
    assert report.fallbacks == ()
    assert sum(row.count for row in report.rules if row.rule.startswith("Attention")) == 2


def test_stages_are_told() -> None:
    stages: list[str] = []
    attnlrp_fx.compile(
        nn.Linear(3, 2).eval(), torch.ones(2, 3), on_stage=stages.append, backend="eager"
    )
    assert [stage.split()[0] for stage in stages] == [
        "capturing",
        "rewriting",
        "tracing",
        "compiling",
    ]


def test_explained_inputs_can_be_chosen() -> None:
    case = BY_NAME["t5"]
    explainer = attnlrp_fx.compile(
        case.model(), case.example(3, 5), explain=["decoder_input_ids"], backend="eager"
    )
    assert set(explainer(**case.example(2, 4)).relevance) == {"decoder_input_ids"}


def test_a_backend_of_ones_own() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def mine(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    model, x = nn.Linear(3, 2).eval(), torch.randn(2, 3)
    explainer = attnlrp_fx.compile(model, x, backend=mine)
    assert len(graphs) == 2, "the forward and the relevance side"
    torch.testing.assert_close(explainer(x, target=1).relevance["input"], x * model.weight[1])


def test_no_gradient_is_left_behind(explain: Explain) -> None:
    case = BY_NAME["gpt2"]
    explanation = explain(case)(**case.example(2, 5, F64))
    leaves = [*tensors_of(explanation.outputs), explanation.target_value]
    assert not any(leaf.requires_grad for leaf in leaves if is_floating(leaf))
    assert not explanation.relevance["input_ids"].requires_grad


# Numbers that are not finite


def test_finite_numbers_pass_the_check(explain: Explain) -> None:
    case = BY_NAME["gpt2"]
    inputs = case.example(2, 5, F64)
    checked = explain(case)(**inputs, check_finite=True)
    assert torch.equal(
        checked.relevance["input_ids"], explain(case)(**inputs).relevance["input_ids"]
    )


def test_nan_in_an_input_is_named() -> None:
    x = torch.randn(2, 3)
    explainer = attnlrp_fx.compile(nn.Linear(3, 2).eval(), x, backend="eager")
    x[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="input 'input' holds NaN or infinity"):
        explainer(x, check_finite=True)
    assert explainer(x, target=1).relevance["input"].isnan().any(), "only on request"


def test_nan_in_a_weight_is_named_where_it_first_arises() -> None:
    case = BY_NAME["llama"]
    model, inputs = case.model(), case.example(2, 5)
    explainer = attnlrp_fx.compile(model, inputs, backend="eager")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 1] = float("nan")
    with pytest.raises(
        NonFiniteError, match="NaN or infinity arises in the forward pass"
    ) as caught:
        explainer(**inputs, target=1, check_finite=True)
    assert "model.layers.1.mlp.up_proj" in caught.value.where
    assert "aten.linear" in caught.value.where


def test_infinity_in_the_relevance_pass_is_named() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).sqrt()

    explainer = attnlrp_fx.compile(
        Root().eval(), {"x": torch.ones(2, 3)}, composite="gradient", backend="eager"
    )
    with pytest.raises(NonFiniteError, match="arises in the relevance pass") as caught:
        explainer(x=torch.zeros(2, 3), target=0, check_finite=True)
    assert "aten.mul" in caught.value.where


def test_ids_are_never_the_same_by_chance() -> None:
    """The tests' own inputs differ between rows, or padding tests would show nothing."""
    ids = token_ids(3, 7)
    assert ids.max() < VOCABULARY
    assert len({tuple(row) for row in ids.tolist()}) == 3


def test_with_composite() -> None:
    """Other rules without another capture; constants still move from where they were captured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.linspace(-1, 1, 6).view(2, 3)
    plain = attnlrp_fx.compile(model, x, backend="eager")
    other = plain.with_composite("attnlrp-vision")
    anew = attnlrp_fx.compile(model, x, composite="attnlrp-vision", backend="eager")
    assert torch.equal(other(x).relevance["input"], anew(x).relevance["input"])
    assert not torch.equal(other(x).relevance["input"], plain(x).relevance["input"])
    assert other.report().capture_seconds == plain.report().capture_seconds
    with pytest.raises(attnlrp_fx.RuleError, match="no composite 'magic'"):
        plain.with_composite("magic")
    model.to("meta")
    assert plain.with_composite("gradient")._running.programs.captured_device == torch.device("cpu")


@pytest.mark.parametrize(
    "target", [Logit(1), Contrast(1, 0), LogProb(1), lambda out: out.logits[:, 1]]
)
def test_the_model_runs_at_compilation_for_functions_alone(
    monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    """Which outputs a function reads, only calling it tells; of a logit their sizes do."""
    graphs, run = [], Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, *x: graphs.append(self.module) or run(self, *x))
    case = BY_NAME["bert"]
    model, inputs = case.model(), case.example(1, 5)
    explainer = attnlrp_fx.compile(model, inputs, target=target, backend="eager")
    assert (explainer.captured in graphs) == callable(target)
    assert explainer(**inputs).relevance["input_ids"].shape == (1, 5)
