"""Memory: the same explanation whatever is kept, and as little kept as was asked for."""

import collections
import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from models import (
    ENCODER,
    GROUPED,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    LABELS,
    PAD,
    RMS,
    VOCABULARY,
    Case,
    drawn,
    highest_last_logit,
    highest_logit,
    seq2seq_tokens,
    tokens,
    transformers_model,
)
from test_regions import Block, Plain, relative, stack
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, Explanation, InputError, compiler
from attnlrp_fx.capture.capture import Captured, capture
from attnlrp_fx.codegen import memory, regions
from attnlrp_fx.codegen.cost import Cost, schedule_cost
from attnlrp_fx.codegen.memory import MemoryPlan, planned
from attnlrp_fx.codegen.partition import Keeping
from attnlrp_fx.codegen.programs import Programs
from attnlrp_fx.codegen.schedule import Schedule
from attnlrp_fx.torch_private import typical_size

F64 = torch.float64
LAYERS = 3
"""Enough to repeat; one more where the last one differs, since one position of it is read."""
CAPTURED, OTHER = (3, 33), (2, 21)
"""Batch and length that models are captured with, and others."""
MODES = ("fast", "balanced", "small")
CASES_OF = {
    "fast": ("llama", "mixtral", "bert", "t5", "vit"),
    "balanced": ("llama", "bert", "vit"),
    "small": ("llama", "mixtral", "bert", "t5", "vit"),
}
"""Which models are tried; finding a balance takes a second each."""
KEPT = [(name, kept) for kept in MODES for name in CASES_OF[kept]]
LESS = [(name, kept) for name, kept in KEPT if kept != "fast"]


def _case(module: str, name: str, inputs: Any, value: Any, casts: str = "", **config: Any) -> Case:
    build = functools.partial(transformers_model, module, name, **config)
    return Case(module, build, inputs, value, casts, layers=LAYERS)


CASES = {
    case.name: case
    for case in (
        _case(
            "llama",
            "LlamaForCausalLM",
            tokens,
            highest_last_logit,
            RMS,
            **{**GROUPED, "num_hidden_layers": LAYERS},
        ),
        _case(
            "mixtral",
            "MixtralForCausalLM",
            tokens,
            highest_last_logit,
            RMS,
            **{**GROUPED, "num_hidden_layers": LAYERS, "num_local_experts": 5},
            experts_implementation="eager",
        ),
        _case(
            "bert",
            "BertForSequenceClassification",
            tokens,
            highest_logit,
            **{**ENCODER, "num_hidden_layers": LAYERS + 1},
        ),
        _case(
            "t5",
            "T5ForConditionalGeneration",
            seq2seq_tokens,
            highest_last_logit,
            RMS,
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=INTERMEDIATE,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=PAD,
        ),
        _case(
            "vit",
            "ViTForImageClassification",
            lambda batch, length: {"pixel_values": drawn(batch, 3, 16, 16)},
            highest_logit,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS + 1,
            num_attention_heads=HEADS,
            num_labels=LABELS,
            image_size=16,
            patch_size=4,
        ),
    )
}


def unchanged(graph_module: fx.GraphModule, inputs: object) -> Any:
    """A backend that is not "eager": elementwise values may be computed again."""
    return graph_module.forward


@functools.cache
def model(name: str) -> torch.nn.Module:
    return CASES[name].model(F64)


@functools.cache
def captured(name: str) -> Captured:
    return capture(model(name), CASES[name].example(*CAPTURED, F64))


def compiled(name: str, **options: Any) -> ExplainableGraphModule:
    """A case; few repetitions are enough, so that small models do."""
    with (
        mock.patch.object(regions, "LEAST_SAVED", 24),
        mock.patch.object(compiler, "capture", return_value=captured(name)),
    ):
        example = CASES[name].example(*CAPTURED, F64)
        return attnlrp_fx.compile(model(name), example, **{"backend": unchanged, **options})


@functools.cache
def fast(name: str, **options: Any) -> ExplainableGraphModule:
    return compiled(name, **options)


@functools.cache
def explainer(name: str, kept: str | int = "fast", **options: Any) -> ExplainableGraphModule:
    """A compiled case; one that keeps less is made of what was traced for "fast"."""
    if kept == "fast":
        return fast(name, **options)
    found = copy.copy(fast(name, **options))
    traced = schedule_of(found)
    found._running.report = replace(found.report(), compilations=[])
    found._running.programs = Programs(
        found.rewritten,
        found._running.convention,
        found._running.attributes,
        replace(found._running.options.programs, memory=kept),
        found._running.report.compilations,
    )
    found._running.programs._schedule = mock.Mock(return_value=traced)  # type: ignore[method-assign]
    return found.prepare()


def schedule_of(explainer: ExplainableGraphModule) -> Schedule:
    (compiled,) = explainer._running.programs.compiled.values()
    return compiled.schedule


def plan_of(explainer: ExplainableGraphModule) -> MemoryPlan:
    (compilation,) = explainer.report().compilations
    assert compilation.memory is not None
    return compilation.memory


def planned_again(
    explainer: ExplainableGraphModule, kept: str | int
) -> tuple[Schedule, MemoryPlan | None]:
    """What compiling with another memory would run, without tracing anything again."""
    example = explainer._running.convention.given
    return planned(schedule_of(explainer), kept, example, explainer._running.programs.keeping())


def saved(schedule: Schedule) -> Iterator[tuple[int, fx.Node]]:
    """What each region keeps for itself: the region's number, and a placeholder."""
    for number, program in enumerate(schedule.programs):
        for node in program.relevance.graph.find_nodes(op="placeholder"):
            if node.meta["part"] == "saved":
                yield number, node


def ops(graph_module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"]


def peak(schedule: Schedule, explainer: ExplainableGraphModule) -> int:
    return larger(schedule_cost(schedule, explainer._running.convention.given))


def larger(cost: Cost) -> int:
    """The larger peak of both sides."""
    return max(cost.forward_peak, cost.relevance_peak)


def same(found: Explanation, expected: Explanation, tolerance: float = 1e-12) -> None:
    assert found.relevance.keys() == expected.relevance.keys()
    for name, relevance in found.relevance.items():
        assert relative(relevance, expected.relevance[name]) <= tolerance, name
    torch.testing.assert_close(found.target_value, expected.target_value, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("name", "kept"), LESS)
def test_every_mode_explains_alike(name: str, kept: str) -> None:
    """At other sizes than captured; blocks share programs, and nothing is compiled again."""
    inputs = CASES[name].example(*OTHER, F64)
    expected, less = explainer(name)(**inputs), explainer(name, kept)
    found, schedule = less(**inputs), schedule_of(less)
    assert len(schedule.distinct) < len(schedule.programs)
    same(found, expected)
    logits = found.outputs.logits, expected.outputs.logits
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)
    assert less.compilations == 1


@pytest.mark.parametrize(
    ("name", "kept", "options"),
    [
        ("bert", "balanced", {"backend": "eager"}),
        ("bert", "small", {"backend": "eager"}),
        ("vit", "small", {"regions": False}),
        ("vit", "small", {"composite": "attnlrp-vision", "derived_weights": "keep"}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,
)
def test_every_mode_explains_alike_with(name: str, kept: str, options: dict[str, Any]) -> None:
    inputs = CASES[name].example(*OTHER, F64)
    same(explainer(name, kept, **options)(**inputs), explainer(name, **options)(**inputs))


def test_the_ledger_is_the_same_and_closes() -> None:
    """Law 1, with every value computed again."""
    inputs = CASES["vit"].example(*OTHER, F64)
    expected, found = (explainer("vit", kept, audit=True)(**inputs) for kept in ("fast", "small"))
    same(found, expected)
    assert expected.ledger is not None
    assert found.ledger is not None
    for entry, known in zip(found.ledger.entries, expected.ledger.entries, strict=True):
        assert entry.node == known.node
        sums = torch.tensor([[e.received, e.passed, e.absorbed] for e in (entry, known)], dtype=F64)
        torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=1e-12)
    scale = float(found.target_value.abs().sum())
    assert abs(found.ledger.residual) <= 1e-9 * scale
    assert not list(saved(schedule_of(explainer("vit", "small", audit=True))))


def test_many_targets_share_what_is_kept() -> None:
    """Each computes what was not kept again, from the one forward pass."""
    inputs = CASES["llama"].example(*OTHER, F64)
    targets: list[Any] = [3, 5, attnlrp_fx.Contrast(7, 9)]
    expected = explainer("llama")(**inputs, target=targets)
    found = explainer("llama", "small")(**inputs, target=targets)
    for one, another in zip(found, expected, strict=True):
        same(one, another)


@pytest.mark.parametrize("name", CASES)
def test_small_keeps_what_regions_hand_on(name: str) -> None:
    found = explainer(name, "small")
    schedule = schedule_of(found)
    assert not list(saved(schedule))
    cost = found.cost(**found._running.convention.given)
    handed = {node: node.meta["val"] for region in schedule.regions for node in region.outputs}
    tensors = [value for value in handed.values() if isinstance(value, Tensor)]
    sizes = found._running.programs.keeping().sizes
    most = sum(typical_size(t.numel(), 0, sizes) * t.dtype.itemsize for t in tensors)
    assert 0 < cost.saved <= most


def test_what_is_compiled_is_what_was_planned() -> None:
    made, expected = compiled("vit", memory="small"), explainer("vit", "small")
    assert plan_of(made) == plan_of(expected)
    sides = [schedule_of(each).distinct for each in (made, expected)]
    for one, another in zip(*sides, strict=True):
        assert ops(one.forward) == ops(another.forward)
        assert ops(one.relevance) == ops(another.relevance)


@pytest.mark.parametrize("name", CASES)
def test_attention_is_computed_again(name: str) -> None:
    """Under "small", and all that the kernel returns; never under "fast"."""
    for kept, expected in [("fast", 0), ("small", 1)]:
        for program in schedule_of(explainer(name, kept)).distinct:
            forward, relevance = ops(program.forward), ops(program.relevance)
            backward = [op for op in relevance if "attention" in op and "backward" in op]
            again = [op for op in relevance if "attention" in op and "backward" not in op]
            assert len(again) == expected * len(backward)
            assert sum("attention" in op for op in forward) >= len(backward)


@pytest.mark.parametrize(
    ("name", "kept", "backend"),
    [*((name, kept, unchanged) for name, kept in KEPT), ("llama", "fast", "eager")],
)
def test_nothing_grows_with_the_square_of_the_length(name: str, kept: str, backend: Any) -> None:
    """No block keeps length × length; a stem may, once, as T5's keeps its table of distances.

    Nor does one that runs op by op: a mask of floats is made of booleans again.
    """
    schedule = schedule_of(explainer(name, kept, backend=backend))
    counts = collections.Counter(id(program) for program in schedule.programs)
    batch = {str(value.shape[0]) for value in explainer(name)._running.checks.examples.values()}
    for number, node in saved(schedule):
        sizes = getattr(node.meta["val"], "shape", ())
        lengths = [s for s in sizes if not is_concrete_int(s) and str(s) not in batch]
        assert len(lengths) < 2 or counts[id(schedule.programs[number])] == 1, node


@pytest.mark.parametrize("name", CASES)
def test_less_kept_is_less_memory_for_more_operations(name: str) -> None:
    modes = [kept for kept in MODES if name in CASES_OF[kept]]
    costs = [
        explainer(name, kept).cost(**explainer(name)._running.convention.given) for kept in modes
    ]
    fast, *less = costs
    for more, cost in pairwise(costs):
        assert more.saved >= cost.saved
        assert larger(more) >= larger(cost)
        assert more.flops <= cost.flops
    for kept, cost in zip(modes[1:], less, strict=True):
        assert cost.saved < fast.saved
        assert larger(cost) < larger(fast)
        assert fast.flops < cost.flops < 1.5 * fast.flops
        ratio = cost.flops / fast.flops
        assert plan_of(explainer(name, kept)) == MemoryPlan(kept, larger(cost), larger(fast), ratio)


@pytest.mark.parametrize("name", CASES_OF["balanced"])
def test_balanced_is_half_where_it_can_be(name: str) -> None:
    plan, small = (plan_of(explainer(name, kept)) for kept in ("balanced", "small"))
    assert small.peak <= plan.peak <= max(plan.fast_peak // 2, small.peak)


def test_a_budget_is_met() -> None:
    """By the highest price that fits."""
    everything = blocks(backend="eager")
    schedule, keeping = schedule_of(everything), everything._running.programs.keeping()
    prices = memory._prices(schedule, keeping.sizes)
    assert prices == sorted(prices)
    cuts = [Keeping(keeping.elementwise, price, keeping.sizes) for price in (0.0, *prices)]
    peaks = [peak(schedule.keeping(cut), everything) for cut in cuts]
    least, most = peaks[0], peak(schedule, everything)
    found = []
    for budget in (least, (least + most) // 2, most - 1):
        made, plan = planned_again(everything, budget)
        assert plan is not None
        assert least <= plan.peak == peak(made, everything) <= budget
        assert plan.peak == [p for p in peaks if p <= budget][-1]
        found.append(plan.operations)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] >= 1


def test_a_budget_that_fast_is_within_changes_nothing() -> None:
    fast = explainer("vit")
    most = peak(schedule_of(fast), fast)
    schedule, plan = planned_again(fast, most)
    assert schedule is schedule_of(fast)
    assert plan == MemoryPlan(most, most, most, 1.0)


def test_a_budget_that_is_too_small_says_what_it_takes() -> None:
    least = plan_of(explainer("vit", "small")).peak
    with pytest.raises(InputError, match=f"{least - 1} bytes, .* takes {least}") as caught:
        compiled("vit", memory=least - 1)
    assert "example inputs" in caught.value.why
    assert plan_of(explainer("vit", least)).peak == least


@pytest.mark.parametrize("value", [0, -1, True, False, "tiny", "", 1.5, None])
def test_what_memory_cannot_be(value: Any) -> None:
    """Before anything is captured."""
    with (
        mock.patch.object(compiler, "capture", side_effect=AssertionError),
        pytest.raises(InputError, match=f"memory is {value!r}") as caught,
    ):
        attnlrp_fx.compile(torch.nn.Linear(2, 2).eval(), torch.ones(1, 2), memory=value)
    assert "'small'" in caught.value.remedy


def test_the_report_states_it() -> None:
    plan = plan_of(explainer("bert", "small"))
    report = " ".join(str(explainer("bert", "small").report()).split())
    assert "memory small: predicted peak" in report
    assert f"{plan.peak / 2**20:.1f} MiB, {plan.fast_peak / 2**20:.1f} MiB if fast" in report
    assert f"{plan.operations:.2f} times the operations" in report
    assert "predicted peak" not in str(explainer("bert").report())
    assert explainer("bert").report().compilations[0].memory is None


def blocks(**options: Any) -> ExplainableGraphModule:
    """Four alike, and captured at five rows."""
    torch.manual_seed(0)
    model = stack(*(Block() for _ in range(4)))
    with mock.patch.object(regions, "LEAST_SAVED", 24):
        return attnlrp_fx.compile(model, X, target=1, **{"backend": unchanged, **options})


X = torch.linspace(-1, 1, 20, dtype=F64).reshape(5, 4)


def test_a_model_without_memory() -> None:
    """A plan on the meta device is the one of the model itself."""
    found, model = blocks(memory="small"), stack(*(Block() for _ in range(4))).to("meta")
    with mock.patch.object(regions, "LEAST_SAVED", 24):
        bare = attnlrp_fx.compile(model, X.to("meta"), target=1, backend=unchanged, memory="small")
    assert plan_of(bare) == plan_of(found)


def test_what_another_device_would_take() -> None:
    """`cost` plans for it as compiling there would."""
    found = blocks(memory="small")
    with mock.patch.object(regions, "LEAST_SAVED", 24):
        model = stack(*(Block() for _ in range(4))).to("meta")
        bare = attnlrp_fx.compile(model, X.to("meta"), target=1, backend=unchanged, memory="small")
        assert bare.cost(X, device="cpu") == found.cost(X)


def test_changes_show_at_once() -> None:
    """What is computed again reads the parameters that the call began with."""
    found = blocks(memory="small")
    before = found(X)
    with torch.no_grad():
        found.model.blocks[2].up.weight.mul_(1.3)
    after, expected = found(X), found.with_composite("attnlrp")(X)
    assert not torch.allclose(before.relevance["x"], after.relevance["x"])
    torch.testing.assert_close(after.outputs, found.model(X), rtol=1e-12, atol=1e-12)
    same(after, expected)
    assert found.compilations == 1


def test_inductor() -> None:
    """Compiled for real, at sizes not seen before."""
    torch.manual_seed(0)
    model, x = Plain().eval(), torch.randn(3, 6)
    found = attnlrp_fx.compile(model, x, target=1, memory="small")
    plain = attnlrp_fx.compile(model, x, target=1, backend="eager")
    assert not list(saved(schedule_of(found)))
    for batch in (5, 1):
        x = torch.randn(batch, 6)
        same(found(x), plain(x), 1e-5)
        torch.testing.assert_close(found(x).outputs, plain(x).outputs, rtol=1e-5, atol=1e-6)
    assert found.compilations == 1
