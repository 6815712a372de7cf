"""Capture: whatever comes in, one graph comes out, and the model is left as it was."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Captures
from models import BY_NAME, TRANSFORMERS, Case, tensors_of, transformers_model
from torch import Tensor, fx, nn

import attnlrp_fx
from attnlrp_fx import InputError
from attnlrp_fx.capture.capture import capture


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that compiling it could change."""
    configs = {
        name: module.config.to_dict()
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forwards": [module.forward.__func__ for module in model.modules()],
        "parameters": [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
        "values": [tensor.tolist() for tensor in model.state_dict().values()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "configs": configs,
        "caches": [
            getattr(module.config, "use_cache", None)
            for module in model.modules()
            if hasattr(module, "config")
        ],
    }


@pytest.mark.parametrize("name", ["qwen3", "bart", "transformer-encoder"])
def test_the_model_is_left_exactly_as_it_was(name: str) -> None:
    case = BY_NAME[name]
    model, inputs = case.model(), case.example()
    first = next(model.parameters())
    first.requires_grad_(False)
    with torch.no_grad():
        before = tensors_of(model(**inputs))
    state = state_of(model)
    for _ in range(2):
        attnlrp_fx.compile(model, inputs, backend="eager", composite="gradient")(**inputs)
        after = state_of(model)
        for key, value in state.items():
            assert after[key] == value, key
    with torch.no_grad():
        for own, now in zip(before, tensors_of(model(**inputs)), strict=True):
            assert torch.equal(own, now)
    assert torch.is_grad_enabled()


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    case = BY_NAME["llama"]
    model = case.model()
    state = state_of(model)
    with pytest.raises(attnlrp_fx.CaptureError):
        capture(model, {"input_ids": torch.zeros(2, 3)})
    assert state_of(model) == state


def test_a_saved_and_reloaded_model_compiles_twice(tmp_path: Path) -> None:
    case = BY_NAME["qwen3"]
    model, inputs = case.model(), case.example()
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    expected = attnlrp_fx.compile(model, inputs, backend="eager")(**inputs).relevance["input_ids"]
    for _ in range(2):
        explainer = attnlrp_fx.compile(reloaded, inputs, backend="eager")
        assert torch.equal(explainer(**inputs).relevance["input_ids"], expected)


def test_an_attention_of_ones_own_is_replaced_for_the_capture_only() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("attention_of_ones_own", sdpa_attention_forward)
    AttentionMaskInterface.register("attention_of_ones_own", sdpa_mask)
    case = BY_NAME["qwen3"]
    model, inputs = case.model(), case.example()
    expected = attnlrp_fx.compile(model, inputs, backend="eager")(**inputs).relevance["input_ids"]
    model.set_attn_implementation("attention_of_ones_own")
    explainer = attnlrp_fx.compile(model, inputs, backend="eager")
    assert torch.equal(explainer(**inputs).relevance["input_ids"], expected)
    assert model.config._attn_implementation == "attention_of_ones_own"
    assert any("attention_of_ones_own" in note for note in explainer.report().notes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_experts_are_a_grouped_product_for_the_capture_only(dtype: torch.dtype) -> None:
    """In float64 it is transformers' op, in bfloat16 PyTorch's."""
    case = BY_NAME["mixtral"]
    model, inputs = case.model(dtype), case.example(2, 6)
    found = {}
    # Captured as grouped products, "eager" is one of them.
    own = ("eager",) if dtype == torch.float64 else ()
    for implementation in (*own, "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        state = state_of(model)
        explainer = attnlrp_fx.compile(model, inputs, backend="eager")
        assert state_of(model) == state
        assert model.config._experts_implementation == implementation
        notes = " ".join(explainer.report().notes)
        assert ("experts are captured as 'grouped_mm'" in notes) == (implementation == "eager")
        products = [n for n in explainer.captured.graph.nodes if "grouped_mm" in str(n.target)]
        assert len(products) == (0 if implementation == "batched_mm" else 2)
        found[implementation] = explainer(**case.example(3, 9)).relevance["input_ids"]
    largest = float(found["batched_mm"].abs().max())
    if own:
        assert torch.equal(found["eager"], found["grouped_mm"])
    tolerance = largest * max(1e-9, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(found["grouped_mm"], found["batched_mm"], rtol=0, atol=tolerance)


def test_experts_that_cannot_be_grouped_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["mixtral"]
    model, inputs = case.model(), case.example(2, 6)
    expected = attnlrp_fx.compile(model, inputs, backend="eager")(**inputs).relevance["input_ids"]

    def refuse() -> None:
        raise ValueError("no grouped product here")

    monkeypatch.setattr(model, "_grouped_mm_can_dispatch", refuse)
    explainer = attnlrp_fx.compile(model, inputs, backend="eager")
    assert "experts are captured as 'batched_mm'" in explainer.report().notes
    assert model.config._experts_implementation == "eager"
    torch.testing.assert_close(explainer(**inputs).relevance["input_ids"], expected)


# Doors


class Net(nn.Module):
    """Two inputs, one of them a list, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, others: list[Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        hidden = self.linear(x) + self.linear(others[0]) * others[1]
        return hidden * scale, hidden.sum(-1)


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double().eval()


def expected_of(model: nn.Module, x: Tensor) -> Tensor:
    """Gradient×Input of logit 1."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    return (x * gradient).detach()


@pytest.mark.parametrize("door", ["module", "tensor", "tuple", "symbolic_trace", "exported"])
def test_every_door(door: str) -> None:
    model = plain()
    x, other = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    given: Any = {"input": x}
    dynamic = {"input": {0: torch.export.Dim("batch", min=2)}}
    subject: Any = model
    match door:
        case "tensor":
            given = x
        case "tuple":
            given = (x,)
        case "symbolic_trace":
            subject = fx.symbolic_trace(model)
        case "exported":
            subject = torch.export.export(model, (), {"input": x}, dynamic_shapes=dynamic)
            given = None
    explainer = attnlrp_fx.compile(subject, given, composite="gradient", backend="eager")
    torch.testing.assert_close(
        explainer(other, target=1).relevance["input"], expected_of(model, other), rtol=1e-12, atol=0
    )


def test_an_exported_program_saves_and_loads(tmp_path: Path) -> None:
    model, x = plain(), torch.randn(3, 4).double()
    exported = torch.export.export(model, (x,))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    explainer = attnlrp_fx.compile(loaded, composite="gradient", backend="eager")
    torch.testing.assert_close(explainer(x, target=1).relevance["input"], expected_of(model, x))
    with pytest.raises(InputError, match="was fixed to 3"):
        explainer(torch.randn(5, 4).double())


def test_nested_inputs_and_constants() -> None:
    model = Net().eval()
    x, a, b = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 3)
    given = {"x": x, "others": [a, b], "scale": 2.0}
    explainer = attnlrp_fx.compile(model, given, backend="eager", composite="gradient")
    explanation = explainer(**given, target=Logit0)
    assert set(explanation.relevance) == {"x", "others_0", "others_1"}
    torch.testing.assert_close(explanation.relevance["x"], 2 * x * model.linear.weight[0])
    torch.testing.assert_close(
        explanation.relevance["others_0"], 2 * a * model.linear.weight[0] * b[:, :1]
    )
    assert explainer(x=x, others=[a, b], target=Logit0).relevance.keys()
    with pytest.raises(InputError, match=r"compiled as the constant 2\.0"):
        explainer(x=x, others=[a, b], scale=3.0)


def Logit0(outputs: Any) -> Tensor:
    return outputs[0][:, 0]


def test_a_constant_flag_is_part_of_the_graph() -> None:
    case = BY_NAME["opt"]
    model, inputs = case.model(), {**case.example(), "output_hidden_states": True}
    explainer = attnlrp_fx.compile(model, inputs, backend="eager")
    explanation = explainer(**inputs)
    assert len(explanation.outputs.hidden_states) == 2
    hidden = explainer(**case.example(), target=lambda out: out.hidden_states[1][:, -1, 0])
    assert hidden.relevance["input_ids"].shape == (2, 7)


def test_float_inputs_of_a_transformer_are_explained_themselves() -> None:
    case = BY_NAME["qwen3"]
    model, inputs = case.model(torch.float64), case.example(2, 6, torch.float64)
    by_ids = attnlrp_fx.compile(model, inputs, backend="eager")(**inputs)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    by_values = attnlrp_fx.compile(model, given, backend="eager")(**given)
    assert set(by_values.relevance) == {"inputs_embeds"}
    torch.testing.assert_close(
        by_values.relevance["inputs_embeds"].sum(-1), by_ids.relevance["input_ids"]
    )


def test_token_types_get_relevance_of_their_own() -> None:
    case = BY_NAME["bert"]
    model, inputs = case.model(torch.float64), case.example()
    given = {**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])}
    explanation = attnlrp_fx.compile(model, given, backend="eager", audit=True)(**given)
    assert set(explanation.relevance) == {"input_ids", "token_type_ids"}
    scale = float(explanation.target_value.abs().sum())
    assert abs(explanation.ledger.residual) <= 1e-9 * scale


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (4, 4), (61, 3)])
def test_the_examples_sizes_do_not_matter(batch: int, length: int) -> None:
    """Not a batch or length of one, not two equal sizes, not one that equals the vocabulary."""
    case = BY_NAME["distilbert"]
    explainer = attnlrp_fx.compile(case.model(), case.example(batch, length), backend="eager")
    for sizes in [(1, 1), (2, 7), (4, 4)]:
        assert explainer(**case.example(*sizes)).relevance["input_ids"].shape == sizes
    assert explainer.compilations == 1


def test_fixed_shapes_on_request() -> None:
    case = BY_NAME["distilbert"]
    explainer = attnlrp_fx.compile(
        case.model(), case.example(2, 5), backend="eager", dynamic_shapes=None
    )
    assert explainer(**case.example(2, 5)).relevance["input_ids"].shape == (2, 5)
    with pytest.raises(InputError, match="dimension 1 was fixed to 5"):
        explainer(**case.example(2, 6))
    assert any("is fixed to" in note for note in explainer.report().notes)


def test_a_size_that_the_model_fixes_is_an_error_and_not_a_crash() -> None:
    model = nn.Sequential(nn.MaxPool1d(2), nn.Flatten(), nn.Linear(15, 2)).eval()
    explainer = attnlrp_fx.compile(model, torch.randn(2, 3, 10), backend="eager")
    assert explainer(torch.randn(4, 3, 10)).relevance["input"].shape == (4, 3, 10)
    with pytest.raises(InputError, match="dimension 2 was fixed to 10"):
        explainer(torch.randn(4, 3, 12))


def test_a_length_that_the_model_fixes_is_noted() -> None:
    """A recurrent network is unrolled over the length of its example."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2, batch_first=True)).eval()
    explainer = attnlrp_fx.compile(
        model, torch.randn(2, 5, 3), backend="eager", target=lambda outputs: outputs[0][:, -1, 0]
    )
    assert "input 'input' is fixed to dimension 1 = 5" in explainer.report().notes
    with pytest.raises(InputError, match="dimension 1 was fixed to 5") as caught:
        explainer(torch.randn(2, 6, 3))
    assert "example inputs of this size" in caught.value.remedy


class StraightThrough(torch.autograd.Function):
    """Has the derivative of another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Function(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x * 2)  # type: ignore[no-any-return]


def test_a_backward_of_the_models_own_is_noted() -> None:
    apply = torch.autograd.Function.__dict__["apply"]
    x = torch.randn(2, 3)
    explainer = attnlrp_fx.compile(Function().eval(), x, composite="gradient", backend="eager")
    (note,) = explainer.report().notes
    assert "'StraightThrough' has a backward of its own" in note
    assert torch.autograd.Function.__dict__["apply"] is apply
    expected = 2 * x * (2 * x).cos() * torch.tensor([0, 1, 0])
    torch.testing.assert_close(explainer(x, target=1).relevance["x"], expected)


def test_sizes_that_must_agree_are_checked() -> None:
    case = BY_NAME["bert"]
    explainer = attnlrp_fx.compile(case.model(), case.example(), backend="eager")
    inputs = case.example(2, 6)
    with pytest.raises(InputError, match=r"dimension 1 must equal input_ids\[1\], which is 6"):
        explainer(**{**inputs, "attention_mask": inputs["attention_mask"][:, :4]})


@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
def test_captured_graphs_share_the_models_parameters(case: Case, captures: Captures) -> None:
    model, found = captures(case)
    captured = found.graph_module
    own = {id(p) for p in model.parameters()}
    shared = list(captured.parameters())
    assert shared
    assert {id(p) for p in shared} <= own
    inputs = case.example(2, 6, torch.float64)
    with torch.no_grad():
        outputs = captured(*inputs.values())
        expected = tensors_of(model(**inputs))
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["t5", "roberta", "qwen2"])
def test_graphs_run_with_gradients_on(name: str) -> None:
    """Another attention kernel is chosen then, whose outputs may lie otherwise in memory."""
    case = BY_NAME[name]
    model, inputs = case.model(), case.example(2, 6)
    explainer = attnlrp_fx.compile(model, case.example(3, 5), backend="eager")
    expected = case.value(model(**inputs), inputs)
    for graph_module in (explainer.captured, explainer.rewritten):
        flat = graph_module(*inputs.values())
        tree = torch.utils._pytree.tree_unflatten(flat, explainer._running.convention.output_spec)
        torch.testing.assert_close(case.value(tree, inputs), expected)


def test_the_same_model_twice_in_one_is_captured_once_more() -> None:
    """Weights that are tied stay tied."""
    tied = transformers_model(
        "gpt2",
        "GPT2LMHeadModel",
        vocab_size=61,
        n_embd=32,
        n_layer=1,
        n_head=4,
        n_positions=40,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    ).eval()
    inputs = BY_NAME["gpt2"].example()
    explainer = attnlrp_fx.compile(tied, inputs, backend="eager")
    twin = copy.deepcopy(tied)
    with torch.no_grad():
        tied.transformer.wte.weight.mul_(1.5)
        twin.transformer.wte.weight.mul_(1.5)
    fresh = attnlrp_fx.compile(twin, inputs, backend="eager")(**inputs)
    found = explainer(**inputs)
    assert torch.equal(found.relevance["input_ids"], fresh.relevance["input_ids"])
