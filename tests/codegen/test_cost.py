"""The cost of an explanation: operations by hand, memory against the allocator's own record."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from models import BY_NAME, HIDDEN, INTERMEDIATE, LABELS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, InputError
from attnlrp_fx.codegen.cost import FORMULAS, Cost, schedule_cost, seed_like
from attnlrp_fx.codegen.programs import Served
from attnlrp_fx.passes import PIPELINE, push_selections


@functools.cache
def compiled(name: str, **options: Any) -> ExplainableGraphModule:
    case = BY_NAME[name]
    return attnlrp_fx.compile(case.model(), case.example(2, 6), **{"backend": "eager", **options})


def on_meta(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("meta") for name, value in inputs.items()}


def allocated_at_most(function: Callable[[], None]) -> int:
    """The most bytes that the CPU's allocator has handed out at a time while a function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def storages(tensors: Any) -> dict[int, int]:
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor)
    }


def measured_peaks(explainer: ExplainableGraphModule, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """What the forward and the relevance side allocate when they run on the CPU."""
    compilation = explainer._running.programs.example(
        explainer._running.default_seeds(), torch.device("cpu")
    )
    schedule, attributes = compilation.schedule, explainer._running.attributes.values()
    values = compilation.start(attributes, inputs)
    own = storages([*attributes.values(), *inputs.values()])
    flat: list[Any] = []

    def forward() -> None:
        flat[:] = schedule.run_forward(values, compilation.run)

    def relevance() -> None:
        schedule.run_relevance(values, seeds, compilation.run)

    with torch.no_grad():
        forward_peak = allocated_at_most(forward)
        seeds = [seed_like(flat[i], node) for i, node in schedule.seeded.items()]
        left = storages([*values, *flat, *seeds])
        held = sum(count for storage, count in left.items() if storage not in own)
        return forward_peak, held + allocated_at_most(relevance)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bert", "t5", "transformer-encoder"])
def test_the_estimated_peak_is_what_the_allocator_gives(name: str) -> None:
    """Kernels with buffers of their own take a little more."""
    explainer = compiled(name)
    inputs = BY_NAME[name].example(16, 33)
    cost = explainer.cost(**inputs)
    forward, relevance = measured_peaks(explainer, inputs)
    assert cost.forward_peak == pytest.approx(forward, rel=0.02)
    assert cost.relevance_peak == pytest.approx(relevance, rel=0.02)
    assert cost.forward_peak <= forward
    assert cost.relevance_peak <= relevance


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "mlp"])
def test_a_model_without_memory_costs_the_same(name: str) -> None:
    case = BY_NAME[name]
    inputs = case.example(3, 9)
    with torch.device("meta"):
        model = case.build().eval()
    explainer = attnlrp_fx.compile(model, on_meta(case.example(2, 6)), backend="eager")
    programs, device = compiled(name)._running.programs, torch.device("cpu")
    served = Served(
        explainer._running.default_seeds(), device
    )  # without values, masks are not known
    expected = schedule_cost(programs.planned(served)[0], inputs)
    assert explainer.cost(inputs, device="cpu") == expected
    assert explainer.cost(on_meta(inputs), device="cpu") == expected
    assert explainer.compilations == 1


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "t5"])
def test_forward_operations_are_those_of_the_model(name: str) -> None:
    """Mixtral in PyTorch's grouped product, the program in that of transformers.

    Without the pass that leaves out what a classifier does not read.
    """
    case = BY_NAME[name]
    model, inputs = case.model(), case.example(3, 9)
    passes = tuple(step for step in PIPELINE if step is not push_selections)
    explainer = attnlrp_fx.compile(model, inputs, backend="eager", passes=passes)
    if name == "mixtral":
        model.set_experts_implementation("grouped_mm")
    formulas = {op: formula for op, formula in FORMULAS.items() if not isinstance(op, str)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model(**inputs)
    assert explainer.cost(**inputs).forward_flops == counter.get_total_flops()


def test_operations_of_a_multilayer_perceptron() -> None:
    cost = compiled("mlp").cost(**BY_NAME["mlp"].example(5))
    assert cost.forward_flops == 2 * 5 * (6 * 16 + 16 * 12 + 12 * 4)
    # A seed of one class is one row of the last layer's weights.
    assert cost.relevance_flops == cost.forward_flops - 2 * 5 * 12 * 4
    assert cost.flops == cost.forward_flops + cost.relevance_flops


def test_operations_of_a_grouped_product() -> None:
    """Each token meets two experts of three matrices, which a batch of all experts would not."""
    batch, length = 3, 9
    costs = [compiled("mixtral").cost(**BY_NAME["mixtral"].example(b, length)) for b in (1, batch)]
    experts = 2 * batch * length * 2 * 3 * HIDDEN * INTERMEDIATE
    assert experts < costs[1].forward_flops < 2 * experts
    assert costs[1].flops == batch * costs[0].flops


def test_parameters_and_peak() -> None:
    model = nn.Linear(4, LABELS).eval()
    explainer = attnlrp_fx.compile(model, torch.ones(2, 4), backend="eager")
    cost = explainer.cost(torch.ones(7, 4))
    logits, relevance = 7 * LABELS * 4, 7 * 4 * 4
    assert cost == Cost(
        forward_flops=2 * 7 * 4 * LABELS,
        relevance_flops=0,
        parameters=4 * (4 * LABELS + LABELS),
        saved=0,
        forward_peak=logits,
        relevance_peak=logits + 2 * relevance,
    )
    assert cost.peak == cost.parameters + cost.relevance_peak


def test_inputs_are_checked() -> None:
    explainer = compiled("mlp")
    with pytest.raises(InputError, match="is missing"):
        explainer.cost()
    with pytest.raises(InputError, match="was fixed to 6"):
        explainer.cost(torch.ones(2, 5))


def test_a_model_without_memory_compiles_for_any_backend_and_runs() -> None:
    case = BY_NAME["mlp"]
    model = case.model().to("meta")
    given = on_meta(case.example(2))
    explainer = attnlrp_fx.compile(model, given)
    assert explainer(**on_meta(case.example(5))).relevance["features"].shape == (5, 6)
    assert "mm" in explainer.program.code


@pytest.mark.parametrize("needs_values", ["audit", "check_finite"])
def test_what_needs_values_says_so_without_them(needs_values: str) -> None:
    case = BY_NAME["mlp"]
    model, given = case.model().to("meta"), on_meta(case.example(2))
    audit = needs_values == "audit"
    explainer = attnlrp_fx.compile(model, given, backend="eager", audit=audit)
    with pytest.raises(InputError, match="meta device") as caught:
        explainer(**given, check_finite=not audit)
    assert "to_empty" in caught.value.remedy


@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_a_long_example_burns_nothing_in(name: str) -> None:
    """Captured at thousands of tokens or at six, a program takes the same for any other length."""
    case = BY_NAME[name]
    costs = []
    for batch, length in [(3, 4096), (2, 6)]:
        model = case.model().to("meta")
        given = on_meta(case.example(batch, length))
        explainer = attnlrp_fx.compile(model, given, backend="eager")
        costs += [explainer.cost(**case.example(*sizes)) for sizes in [(1, 1), (4, 33), (2, 5000)]]
    assert costs[:3] == costs[3:]
    assert costs[0].flops < costs[1].flops < costs[2].flops
