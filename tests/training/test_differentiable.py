"""Relevance that is differentiated: exact, by finite differences in float64, whatever the rule."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import BY_NAME, Case, is_floating, randomised, transformers_model
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import (
    COMPOSITES,
    SAE,
    AlphaBeta,
    Contrast,
    Epsilon,
    Flat,
    Gamma,
    InputError,
    Join,
    Keep,
    Logit,
    LogProb,
    Match,
    Neuron,
    RuleError,
    Scale,
    WSquare,
    ZPlus,
    epsilon_gamma_box,
)
from attnlrp_fx.passes import PIPELINE, drop_assertions, promote_casts

EXACT = (drop_assertions, promote_casts, *PIPELINE)


class Convolutional(nn.Module):
    """Norms of three kinds, a join, unlike activations, and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.batch, self.group, self.layer = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(9)
        self.last = nn.Linear(36, 5)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.batch(self.first(image)))
        hidden = hidden + F.elu(self.group(self.second(hidden)))
        hidden = self.layer(F.max_pool2d(hidden, 2).flatten(2))
        return self.last(F.silu(hidden).flatten(1))


def image(batch: int, size: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, size, size, generator=generator, dtype=dtype) * 2 - 1


def vit() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "intermediate_size": 24, "num_labels": 5}
    return transformers_model("vit", "ViTForImageClassification", **sizes, **more)


CONVOLUTIONAL = Case(
    "convolutional", Convolutional, lambda batch, _: {"image": image(batch)}, lambda *_: image(1)
)
VIT = Case("vit", vit, lambda batch, _: {"pixel_values": image(batch, 8)}, lambda *_: image(1))
JOINS = COMPOSITES["epsilon-plus"].with_rules((Match(role="join"), Join("magnitude")))
STABLE = COMPOSITES["attnlrp"].with_rules(
    (Match(role="first"), WSquare()), (Match(kind="linear"), Epsilon(1e-2))
)
ALONE = [
    COMPOSITES["attnlrp"].with_rules((Match(kind="linear"), rule))
    for rule in (AlphaBeta(), Flat(), WSquare(), ZPlus(), Gamma(0.3), Epsilon(0.1))
]
"""Each rule in every layer."""
CHECKED = [
    (BY_NAME["llama"], "attnlrp", None),
    (BY_NAME["llama"], "gradient", LogProb(3)),
    (BY_NAME["bert"], "attnlrp", Contrast(1)),
    (BY_NAME["mlp"], "cp-lrp", lambda outputs: outputs.square().sum(-1)),
    (VIT, "attnlrp-vision", LogProb(2)),
    *(
        (CONVOLUTIONAL, composite, 1)
        for composite in (
            "attnlrp",
            "gradient",
            "attnlrp-vision",
            "epsilon-plus-flat",
            "epsilon-alpha2-beta1",
            epsilon_gamma_box(-1.0, 1.0),
            JOINS,
            STABLE,
            *ALONE,
        )
    ),
]


def compiled(model: nn.Module, inputs: Any, **options: Any) -> Any:
    options = {"backend": "eager", "dynamic_shapes": None, "differentiable": True, **options}
    return attnlrp_fx.compile(model, inputs, **options)


def weighed(explanation: Any) -> Tensor:
    """A loss of relevance that is not linear in it, with unlike weights."""
    total = torch.zeros((), dtype=torch.float64)
    for value in explanation.relevance.values():
        weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        total = total + (weights * (value + value.square())).sum()
    return total


def along(leaves: list[Tensor], loss: Any, step: float = 1e-5) -> tuple[Tensor, float]:
    """The derivative of a loss along one random direction: by autograd, by central differences."""
    generator = torch.Generator().manual_seed(0)
    found = torch.autograd.grad(loss(), leaves, materialize_grads=True, allow_unused=True)
    ways = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in leaves]
    ways = [way / way.norm() for way in ways]
    exact = sum((g * way).sum() for g, way in zip(found, ways, strict=True))

    @torch.no_grad()
    def at(multiple: float) -> float:
        moved = list(zip(leaves, ways, strict=True))
        for leaf, way in moved:
            leaf.add_(way, alpha=multiple * step)
        value = float(loss())
        for leaf, way in moved:
            leaf.sub_(way, alpha=multiple * step)
        return value

    return exact, (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@pytest.mark.parametrize(("case", "composite", "target"), CHECKED)
def test_gradients_are_those_of_finite_differences(case, composite, target):
    """By all parameters and all float inputs at once."""
    model, inputs = case.model(torch.float64), case.example(2, 3, torch.float64)
    explainer = compiled(model, inputs, composite=composite, target=target, passes=EXACT)
    floating = [v.requires_grad_() for v in inputs.values() if is_floating(v)]
    leaves = [*model.parameters(), *floating]
    exact, expected = along(leaves, lambda: weighed(explainer(inputs)), 1e-6)
    assert abs(float(exact) - expected) <= 1e-6 * abs(expected)


def test_formulations_that_detach_are_wrong():
    """The tolerance tells: with the statistics of norms constant the gradient is another."""
    model, inputs = VIT.model(torch.float64), VIT.example(2, 3, torch.float64)
    explainer = compiled(model, inputs, composite="attnlrp", target=1)
    leaves = list(model.parameters())
    exact, _ = along(leaves, lambda: weighed(explainer(inputs)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnlrp_fx.codegen.derivatives.WRITTEN_OUT", ())
        patch.setattr("attnlrp_fx.codegen.emit.check_differentiable", lambda *_: None)
        silent = compiled(model, inputs, composite="attnlrp", target=1)
    wrong, expected = along(leaves, lambda: weighed(silent(inputs)))
    assert abs(float(exact) - expected) <= 1e-6 * abs(expected)
    assert abs(float(wrong) - expected) > 1e-2 * abs(expected)


# Inside the model


class Autoencoder(nn.Module):
    """A sparse autoencoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def encode(self, x: Tensor) -> Tensor:
        return F.silu(self.up(x))

    def decode(self, features: Tensor) -> Tensor:
        return self.down(features)


NEURONS = "model.layers.0.mlp:neurons"


@pytest.mark.parametrize(
    ("target", "edits"),
    [
        (None, {}),
        (LogProb(3), {"conditions": {NEURONS: Keep([1, 5, 9])}}),
        (Logit(4), {"interventions": {NEURONS: Scale(0.5, [2, 3])}}),
        (Neuron(NEURONS, unit=7, position=2), {}),
    ],
    ids=["plain", "condition", "intervention", "neuron"],
)
def test_gradients_of_latent_relevance(target, edits):
    """Of neurons, heads and an autoencoder's features, by all parameters, the autoencoder's too."""
    case = BY_NAME["llama"]
    model, inputs = case.model(torch.float64), case.example(2, 3, torch.float64)
    autoencoder = randomised(lambda: Autoencoder(32)).double().eval()
    latent = ["mlp.neurons", "attention.heads", SAE(autoencoder, at="model.layers.0")]
    explainer = compiled(
        model, inputs, latent=latent, editable=True, target=target, passes=EXACT, audit=True
    )

    def loss() -> Tensor:
        explanation = explainer(inputs, **edits)
        assert abs(explanation.ledger.residual) < 1e-9
        found = [one.relevance for one in explanation.latent.values()]
        return weighed(explanation) + sum(r.square().sum() + r.sum() for r in found)

    leaves = [*model.parameters(), *autoencoder.parameters()]
    exact, expected = along(leaves, loss, 1e-6)
    assert abs(float(exact) - expected) <= 1e-6 * abs(expected)


# What a training loop does with it


def network() -> nn.Module:
    """With dropout, which the explanation leaves out, and a value that the model detaches."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.gelu(self.first(x))
            return self.last(self.dropout(hidden) * hidden.detach().sigmoid())

    return randomised(Gated).eval()


X = torch.linspace(-2, 2, 24).reshape(4, 6)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **how: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **how)


def test_outputs_have_the_models_gradients():
    """One program gives both terms of a loss; what the model detaches has no gradient."""
    model = network()
    explainer = compiled(model, X)
    labels = torch.tensor([0, 1, 2, 1])
    loss = F.cross_entropy(explainer(X).outputs, labels)
    assert_same(gradients(model, loss), gradients(model, F.cross_entropy(model(X), labels)))


def test_the_model_trains_while_it_is_explained_without_dropout():
    model = network()
    explainer = compiled(model, X, dynamic_shapes="auto")
    model.train()
    other = explainer.with_composite("gradient")
    assert model.training
    assert model.dropout.training
    assert torch.equal(explainer(X).outputs, explainer(X).outputs)
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    sizes = []
    for _ in range(5):
        explanation = explainer(X, target=1)
        loss = F.cross_entropy(model(X), torch.tensor([0, 1, 2, 1]))
        term = explanation.relevance["x"].square().sum()
        optimiser.zero_grad()
        (loss + term).backward()
        optimiser.step()
        sizes.append(float(term.detach()))
    assert sizes[-1] < sizes[0] / 2
    assert explainer.compilations == 1
    with torch.no_grad():
        fresh = attnlrp_fx.compile(copy.deepcopy(model).eval(), X, backend="eager")(X, target=1)
    torch.testing.assert_close(explainer(X, target=1).relevance["x"], fresh.relevance["x"])
    assert not other.model.dropout.training or other.model is model


def test_gradients_accumulate():
    model = network()
    explainer = compiled(model, X, dynamic_shapes="auto")
    whole = gradients(model, both_terms(explainer(X, target=1)))
    model.zero_grad()
    for part in X.split(2):
        both_terms(explainer(part, target=1)).backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, whole)


def both_terms(explanation: Any) -> Tensor:
    """A loss of the outputs and of relevance, summed over rows."""
    return explanation.relevance["x"].square().sum() + explanation.outputs.square().sum()


def test_several_targets_share_a_graph():
    model = network()
    explainer = compiled(model, X)
    both = explainer(X, target=[0, LogProb(2)])
    found = gradients(model, both.relevance["x"].square().sum() + both.target_value.sum())
    apart = [explainer(X, target=one) for one in (0, LogProb(2))]
    terms = [one.relevance["x"].square().sum() + one.target_value.sum() for one in apart]
    assert_same(found, gradients(model, terms[0] + terms[1]))


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "small", "target_slice": True},
        {"memory": "small", "backend": lambda graph, inputs: graph.forward},  # by torch.compile
        {"regions": False, "audit": True},
    ],
    ids=["small, sliced", "small, compiled", "flat, audited"],
)
@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor:UserWarning")  # Dynamo's own look
def test_options_leave_gradients_as_they_are(options):
    model, inputs = BY_NAME["gpt2"].model(), BY_NAME["gpt2"].example(2, 5)
    plain = _gradients_of_gpt2(compiled(model, inputs))
    found = _gradients_of_gpt2(compiled(model, inputs, **options))
    assert_same(found, plain, rtol=1e-4, atol=1e-5)


def _gradients_of_gpt2(explainer: Any) -> dict[str, Tensor]:
    inputs = BY_NAME["gpt2"].example(2, 5)
    explanation = explainer(inputs, target=Logit(3))
    if explanation.ledger is not None:
        assert abs(explanation.ledger.residual) < 1e-4
    return gradients(explainer.model, explanation.relevance["input_ids"].square().sum())


def test_small_memory_is_a_checkpoint_each_block():
    """Autograd keeps fewer bytes, since blocks are run again."""
    model, inputs = BY_NAME["gpt2"].model(), BY_NAME["gpt2"].example(2, 30)
    kept = {}
    for memory in ("fast", "small"):
        explainer = compiled(model, inputs, memory=memory)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            explanation = explainer(inputs)
        kept[memory] = sum(sizes.values())
        del explanation
    assert kept["small"] < kept["fast"] / 2


def test_no_graph_where_none_is_wanted():
    explainer = compiled(network(), X)
    with torch.no_grad():
        assert not explainer(X).relevance["x"].requires_grad
    with torch.inference_mode():
        assert not explainer(X).relevance["x"].requires_grad
    assert not next(explainer.map([X[0]])).relevance["x"].requires_grad
    explanation = explainer(X)
    assert explanation.relevance["x"].requires_grad
    assert explanation.target_value.requires_grad
    kept = explanation.detach()
    assert not kept.relevance["x"].requires_grad
    assert not kept.outputs.requires_grad
    assert kept.to_dict() == explanation.to_dict()
    plain = attnlrp_fx.compile(network(), X, backend="eager")(X, target=lambda y: y.sum(-1))
    assert not plain.relevance["x"].requires_grad
    assert not plain.target_value.requires_grad


# Precision


def test_autocast_is_captured():
    """Compiled under autocast, a program has its casts, whatever surrounds a call."""
    case = BY_NAME["bert"]
    model, inputs = case.model(), case.example(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        explainer = compiled(model, inputs, target=1)
        inside = explainer(inputs)
        expected = model(**inputs).logits
    outside = explainer(inputs)
    assert outside.outputs.logits.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(outside.outputs.logits, expected, rtol=0.05, atol=0.05)
    assert torch.equal(inside.relevance["input_ids"], outside.relevance["input_ids"])
    found = gradients(model, outside.relevance["input_ids"].square().sum())
    assert {value.dtype for value in found.values()} == {torch.float32}
    full = compiled(model, inputs, target=1)
    exact = gradients(model, full(inputs).relevance["input_ids"].square().sum())
    half = copy.deepcopy(model).bfloat16()
    halved = compiled(half, inputs, target=1)(inputs).relevance["input_ids"]
    assert halved.dtype == torch.float32
    for one in (found, gradients(half, halved.square().sum())):
        assert _distance(one, exact) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        again = full(inputs).relevance["input_ids"]
    assert torch.equal(again, full(inputs).relevance["input_ids"])


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat = [torch.cat([v.flatten().double() for v in one.values()]) for one in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def test_a_model_with_autocast_inside():
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.linear(x)

    model = randomised(Halved).eval()
    explanation = attnlrp_fx.compile(model, X, backend="eager")(X)
    assert explanation.outputs.dtype == torch.bfloat16
    assert torch.equal(explanation.outputs, model(X))


# Compilers and processes


@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor:UserWarning")  # Dynamo's own look
def test_inductor():
    """Gradients as in eager mode; another batch size and another step compile nothing more."""
    model = network()
    eager = compiled(model, X, dynamic_shapes="auto")
    explainer = compiled(model, X, dynamic_shapes="auto", backend="inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (X, X[:3], X[:2] * 2):
            found, expected = (
                gradients(model, both_terms(one(rows, target=1))) for one in (explainer, eager)
            )
            assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor:UserWarning")
def test_compiled_steps():
    """A step around the explainer is compiled in parts; one around its program as a whole."""
    model = network()
    explainer = compiled(model, X)
    expected = gradients(model, explainer(X, target=1).relevance["x"].square().sum())

    def step(x: Tensor) -> Tensor:
        return (explainer(2 * x / 2, target=1).relevance["x"] * 1).square().sum()

    assert_same(gradients(model, torch.compile(step, backend="aot_eager")(X)), expected)
    program = explainer.program
    names = [n.meta["name"] for n in program.graph.find_nodes(op="placeholder")]
    seed = F.one_hot(torch.ones(4, dtype=torch.int64), 3).float()
    parameters = [model.get_parameter(name) for name in names[: names.index("x")]]

    def whole(x: Tensor, seed: Tensor) -> Tensor:
        return program(*parameters, x, seed)[1].square().sum()

    fused = torch.compile(whole, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, fused(X, seed)), expected)


def test_two_processes(tmp_path):
    """DDP around the explainer, or around the model beside it: gradients of the whole batch."""
    processes = torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2, join=False)
    deadline = time.monotonic() + 240
    while not processes.join(timeout=5):
        assert time.monotonic() < deadline, "the processes do not end"
    model = network()
    explanation = compiled(model, X)(X, target=1)
    expected = gradients(model, both_terms(explanation) / 2)  # DDP takes a mean over processes
    assert_same(torch.load(tmp_path / "explainer.pt"), expected)
    assert_same(torch.load(tmp_path / "model.pt"), expected)


def _process(rank: int, directory: Path) -> None:
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    for wrapped in ("explainer", "model"):
        found = _in_parallel(wrapped, slice(2 * rank, 2 * rank + 2))
        if rank == 0:
            torch.save(found, directory / f"{wrapped}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _in_parallel(wrapped: str, rows: slice) -> dict[str, Tensor]:
    """Gradients of some rows' loss; what DDP holds of the process group is gone afterwards."""
    model = network()
    explainer = compiled(model, X[rows])
    if wrapped == "explainer":
        parallel: Any = nn.parallel.DistributedDataParallel(explainer)
        loss = both_terms(parallel(X[rows], target=1))
    else:
        parallel = nn.parallel.DistributedDataParallel(model)
        loss = parallel(X[rows]).square().sum()
        loss = loss + explainer(X[rows], target=1).relevance["x"].square().sum()
    return gradients(model, loss)


# Errors


def test_errors():
    with pytest.raises(InputError, match="keeps values from call to call"):
        compiled(network(), X, derived_weights="keep")
    for memory in ("balanced", 10**9):
        with pytest.raises(InputError, match="autograd keeps what no program knows of"):
            compiled(network(), X, memory=memory)


@pytest.mark.parametrize(
    ("layer", "why"),
    [(nn.SiLU(), "no derivative of it"), (nn.LayerNorm(6), "takes what it returns for a constant")],
)
def test_an_op_without_an_exact_derivative_is_named(monkeypatch, layer, why):
    """Those that are known are written out; of the rest, none passes."""
    monkeypatch.setattr("attnlrp_fx.codegen.derivatives.WRITTEN_OUT", ())
    model = nn.Sequential(layer).eval()
    composite = "gradient" if isinstance(layer, nn.SiLU) else "attnlrp"
    with pytest.raises(RuleError, match="cannot be differentiated") as caught:
        compiled(model, X, composite=composite)
    assert why in caught.value.why
    assert "layer" in caught.value.where or "silu" in caught.value.where
