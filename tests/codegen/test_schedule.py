"""The schedule: slots, steps that share programs, and what a run leaves behind."""

from unittest import mock

import pytest
import torch
from test_regions import ANOTHER, Block, X, compiled, counts, pair, relative, same, stack
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, InputError
from attnlrp_fx.codegen import regions
from attnlrp_fx.codegen.programs import Compiled
from attnlrp_fx.codegen.schedule import Values
from attnlrp_fx.graph.operators import placeholders_of

DEPTH = 4


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repetitions are enough, so that small models do."""
    monkeypatch.setattr(regions, "LEAST_SAVED", 24)


@pytest.fixture(scope="module")
def explainer() -> ExplainableGraphModule:
    with mock.patch.object(regions, "LEAST_SAVED", 24):
        return compiled(stack(*(Block() for _ in range(DEPTH))), X, target=1)


def programs(explainer: ExplainableGraphModule) -> Compiled:
    (found,) = explainer._running.programs.compiled.values()
    return found


def started(explainer: ExplainableGraphModule, x: Tensor) -> Values:
    return programs(explainer).start(explainer._running.attributes.values(), {"x": x})


def seeds(explainer: ExplainableGraphModule, rows: int) -> list[Tensor]:
    """One for each place where a seed enters."""
    nodes = programs(explainer).schedule.seeded.values()
    return [torch.ones(rows, *node.meta["val"].shape[1:], dtype=torch.float64) for node in nodes]


def held(values: Values) -> set[int]:
    return {slot for slot, value in enumerate(values) if value is not None}


@torch.no_grad()
def test_slots_are_emptied(explainer: ExplainableGraphModule) -> None:
    run = programs(explainer)
    schedule, values = run.schedule, started(explainer, X)
    assert held(values) == {*schedule.attributes.values(), *schedule.inputs.values()}
    schedule.run_forward(values, run.run)
    read = {slot for step in schedule.relevance for slot in step.arguments}
    assert held(values) <= read | {*schedule.attributes.values()}
    found = schedule.run_relevance(values, seeds(explainer, len(X)), run.run)
    assert held(values) == {*schedule.attributes.values(), *schedule.explained.values()}
    assert found.relevance["x"] is values[schedule.explained["x"]]
    assert not found.postings


@torch.no_grad()
def test_one_forward_serves_many_seeds(explainer: ExplainableGraphModule) -> None:
    run = programs(explainer)
    values = started(explainer, X)
    run.schedule.run_forward(values, run.run)
    entering, kept = seeds(explainer, len(X)), list(values)
    once = run.schedule.run_relevance(list(kept), entering, run.run).relevance["x"]
    again = run.schedule.run_relevance(list(kept), entering, run.run).relevance["x"]
    twice = run.schedule.run_relevance(kept, [2 * s for s in entering], run.run).relevance["x"]
    assert torch.equal(once, again)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=0)


@torch.no_grad()
def test_values_that_slots_held_are_as_they_were(explainer: ExplainableGraphModule) -> None:
    """Adding up makes new tensors: neither inputs nor seeds nor parameters are written to."""
    run, x = programs(explainer), X.clone()
    state = {name: value.clone() for name, value in explainer.model.state_dict().items()}
    values, entering = started(explainer, x), seeds(explainer, len(X))
    given = [seed.clone() for seed in entering]
    run.schedule.run_forward(values, run.run)
    run.schedule.run_relevance(values, entering, run.run)
    assert torch.equal(x, X)
    assert all(map(torch.equal, entering, given))
    assert all(torch.equal(state[n], value) for n, value in explainer.model.state_dict().items())


def test_steps_of_one_program(explainer: ExplainableGraphModule) -> None:
    """Blocks share graphs and read other slots; each step's slots fit its graph."""
    schedule = programs(explainer).schedule
    number, distinct = counts(explainer)
    assert distinct < len(schedule.forward) == number
    assert len(schedule.relevance) in (number, number - 1)  # not where the head alone stands
    for steps in (schedule.forward, schedule.relevance):
        assert len({id(step.graph_module) for step in steps}) in (distinct, distinct - 1)
        assert len({step.arguments for step in steps}) == len(steps)
        for step in steps:
            assert len(step.arguments) == len(placeholders_of(step.graph_module))
    emptied = [s for step in (*schedule.forward, *schedule.relevance) for s in step.emptied]
    assert len(emptied) == len(set(emptied))
    assert not {*emptied} & {*schedule.attributes.values(), *schedule.explained.values()}
    assert all(0 <= slot < schedule.slots for slot in emptied)


def test_compiled_once_for_each_program() -> None:
    """A backend sees a graph for each side of each distinct region, whatever the depth."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: object) -> object:
        seen.append(graph_module)
        return graph_module.forward

    found = attnlrp_fx.compile(stack(*(Block() for _ in range(4))), X, backend=backend)  # type: ignore[arg-type]
    assert len(seen) == len(set(map(id, seen))) <= 2 * counts(found)[1] < counts(found)[0] * 2
    assert len(found(ANOTHER)) == len(ANOTHER)


@pytest.mark.parametrize("weights", ["recompute", "keep"])
@pytest.mark.parametrize("change", ["optimiser", "state dict", "another parameter"])
def test_changes_show_at_once(change: str, weights: str) -> None:
    """In one region of several that share a program, too."""
    model = stack(*(Block() for _ in range(4)))
    explainer = compiled(model, X, target=1, composite="attnlrp-vision", derived_weights=weights)
    before = explainer(X)
    if change == "optimiser":
        model(X).sum().backward()
        torch.optim.SGD(model.blocks[1].parameters(), lr=0.1).step()
        model.zero_grad(set_to_none=True)
    elif change == "state dict":
        model.load_state_dict({name: v * 1.1 for name, v in model.state_dict().items()})
    else:
        model.blocks[2].up.weight = nn.Parameter(model.blocks[2].up.weight.detach() * 1.2)
    after, expected = explainer(X), explainer.with_composite("attnlrp-vision")(X)
    assert not torch.allclose(before.relevance["x"], after.relevance["x"])
    torch.testing.assert_close(after.outputs, model(X), rtol=1e-10, atol=1e-12)
    assert relative(after.relevance["x"], expected.relevance["x"]) <= 1e-12
    assert explainer.compilations == 1


def test_another_dtype_is_an_error() -> None:
    model = stack(*(Block() for _ in range(4)))
    explainer = compiled(model, X)
    model.blocks[2].float()
    with pytest.raises(InputError, match=r"'blocks.2.norm.weight' is torch.float32 now"):
        explainer(X)
    model.double()
    explainer(X)


class Twice(nn.Module):
    """Two outputs, so that a second target is traced anew."""

    def __init__(self) -> None:
        super().__init__()
        self.body = stack(*(Block() for _ in range(4)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return y, y * 2


@pytest.mark.parametrize("cut", [True, False])
def test_one_tensor_under_two_names(cut: bool) -> None:
    """Parameters that are one tensor while a program is traced may be two later, or elsewhere."""
    model = Twice().eval()
    explainer = compiled(model, X, regions=cut, target=lambda o: o[0][:, 1])
    last = model.body.blocks[3]
    own, last.gate.weight = last.gate.weight, last.up.weight
    second = {"target": lambda o: o[1][:, 1]}
    torch.testing.assert_close(explainer(X, **second).outputs, model(X))
    assert explainer.compilations == 2
    last.gate.weight = own
    torch.testing.assert_close(explainer(X, **second).outputs, model(X))
    found = [explainer(X, **second).relevance["x"], 2 * explainer(X).relevance["x"]]
    assert relative(*found) <= 1e-12


def test_costs_are_those_of_one_program() -> None:
    cut, flat = pair(stack(*(Block() for _ in range(4))), X)
    found, expected = cut.cost(ANOTHER), flat.cost(ANOTHER)
    assert found.flops == expected.flops > 0
    assert found.parameters == expected.parameters


class Named(nn.Module):
    """Parameters whose names programs use for something else, around blocks."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.names = names
        for i, name in enumerate(names):
            self.register_parameter(name, nn.Parameter(torch.linspace(0.5, 1.5 + i, 6)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for name in self.names:
            x = x * getattr(self, name) + 0.1
        return x


TAKEN = ("seed_embed", "seed_0", "saved", "derived", "input", "x", "boundary", "output", "add_1")


def named(*names: str) -> None:
    model = Named(*names).double().eval()
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)
    cut, flat = pair(model, x, target=1, composite="attnlrp-vision", derived_weights="keep")
    same(cut(x[:2]), flat(x[:2]))
    torch.testing.assert_close(cut(x).outputs, model(x), rtol=1e-12, atol=1e-12)


def test_names_that_programs_use() -> None:
    named(*TAKEN)


def test_names_of_saved_values() -> None:
    """The sides of a program take `saved_mul`, too."""
    named("saved_mul", "saved_addmm", "saved_gelu", "saved_mul_1")


def test_inductor() -> None:
    """Compiled for real: blocks that share a program, at sizes not seen before."""
    torch.manual_seed(0)
    model = stack(*(Block() for _ in range(4))).float()
    x = torch.randn(3, 4)
    found = attnlrp_fx.compile(model, x, target=1)
    flat = compiled(model, x, target=1, regions=False)
    assert counts(found)[1] < counts(found)[0]
    for batch in (5, 1):
        x = torch.randn(batch, 4)
        explanation, expected = found(x), flat(x)
        assert relative(explanation.relevance["x"], expected.relevance["x"]) <= 1e-5
        torch.testing.assert_close(explanation.outputs, expected.outputs, rtol=1e-5, atol=1e-6)
    assert found.compilations == 1
