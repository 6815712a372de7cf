"""Seeds are the gradients of their targets, and a head takes them back as its own product would."""

import pytest
import torch
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import Contrast, Logit, LogProb
from attnlrp_fx.codegen.heads import Head, head_of
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.targets import Outputs, Seed, Target

F64 = torch.float64
TARGETS: dict[str, Target] = {
    "highest": Logit(),
    "index": Logit(2),
    "index a row": Logit([3, 0]),
    "contrast with all": Contrast(1),
    "contrast with one": Contrast(1, against=2),
    "contrast with several": Contrast(1, against=[2, 3, 3]),
    "log-probability": LogProb(1),
}
SHAPES = {"row": (2, 4), "sequence": (2, 3, 4), "map": (2, 3, 2, 4)}


def dense(target: Target, name: str, scores: Tensor) -> Tensor:
    chosen = target.choose(Outputs({name: scores}, None))
    found = torch.zeros_like(scores)
    for seed in chosen.seeds:
        assert seed.output == name
        found += seed.dense(scores)
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_seeds_are_the_targets_gradient(target: Target, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(shape, dtype=F64, requires_grad=True)
    value = target.choose(Outputs({"logits": scores}, None)).value
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    torch.testing.assert_close(dense(target, "logits", scores.detach()), gradient)


def test_seeds_of_a_span() -> None:
    start, end = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    chosen = Logit().choose(Outputs({"start_logits": start, "end_logits": end}, None))
    seeds = {seed.output: seed.dense(start).tolist() for seed in chosen.seeds}
    assert seeds == {"start_logits": [[0.0, 1.0, 0.0]], "end_logits": [[1.0, 0.0, 0.0]]}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_head_takes_seeds_back_as_its_product_does(
    target: Target, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    scores, weight = torch.randn(shape, dtype=F64), torch.randn(4, 5, dtype=F64)
    seeds = target.choose(Outputs({"logits": scores}, None)).seeds
    head = Head(None, "weight")  # type: ignore[arg-type]
    expected = dense(target, "logits", scores) @ weight
    torch.testing.assert_close(head.pull(seeds, weight, scores), expected)
    torch.testing.assert_close(head.pull(expected @ weight.pinverse(), weight, scores), expected)


def test_a_head_keeps_the_weights_dtype() -> None:
    weight = torch.randn(4, 5).bfloat16()
    scores = torch.randn(2, 3, 4).bfloat16()
    seed = Seed("logits", torch.tensor([[1], [3]]), torch.ones(2, 1), torch.tensor([0, 2]))
    found = Head(None, "weight").pull([seed], weight, scores)  # type: ignore[arg-type]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0, 0], weight[1])
    assert torch.equal(found[1, 2], weight[3])
    assert float(found.abs().sum()) == float(found[0, 0].abs().sum() + found[1, 2].abs().sum())


class Last(nn.Module):
    """An encoder of one layer and a head, tied to nothing, or to another activation."""

    def __init__(self, capped: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 4)
        self.capped = capped

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.layer(x).relu())
        return logits.tanh() if self.capped else logits


@pytest.mark.parametrize(
    ("capped", "options", "found"),
    [
        (False, {}, True),
        (False, {"composite": "gradient"}, True),
        (False, {"composite": "attnlrp-vision"}, False),  # γ depends on the output
        (False, {"audit": True}, True),
        (True, {}, False),
    ],
)
def test_where_a_seed_enters(capped: bool, options: dict[str, object], found: bool) -> None:
    torch.manual_seed(0)
    model = Last(capped).eval().double()
    x = torch.randn(2, 6, 3, dtype=F64)
    explainer = attnlrp_fx.compile(model, x, backend="eager", **options)  # type: ignore[arg-type]
    (output,) = outputs_of(explainer.rewritten.graph)
    (compiled,) = explainer._running.programs.compiled.values()
    assert (compiled.schedule.seeded[0] is not output) == found
    assert found == (head_of(output) is not None)
    for target in TARGETS.values():
        program = explainer.program
        named = {**dict(model.named_parameters()), "x": x}
        named["seed:0"] = dense(target, "output", explainer.captured(x)[0].detach())
        inputs = [named[n.meta["name"]] for n in program.graph.find_nodes(op="placeholder")]
        expected = program(*inputs)[1]
        relevance = explainer(x, target=target).relevance["x"]
        torch.testing.assert_close(relevance, expected, rtol=1e-12, atol=1e-12)
