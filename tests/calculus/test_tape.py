"""The tape: what it reads off a graph, and that the traced program is the same to the last bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from references import Function, explain, read_tape, rewrite
from torch import Tensor, fx, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import Logit, ops
from attnlrp_fx.calculus.pullbacks import PULLBACKS
from attnlrp_fx.calculus.tape import Reading, Tape

DOUBLE = torch.float64


class Tangle(nn.Module):
    """Values used several times, several inputs and outputs, ops with several results."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 18)
        self.head = nn.Linear(6, 5)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))

    def forward(self, ids: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """(batch, length), (batch, length, 6) → hidden, logits and the largest values."""
        x = self.embedding(ids) + bias
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        hidden = x + F.gelu(mixed) * torch.sigmoid(x)
        values, _ = hidden.topk(2, -1)
        return {"hidden": hidden, "logits": self.head(hidden), "largest": values.sum(-1)}


def example(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * 10 + length)
    return {
        "ids": torch.randint(0, 11, (batch, length), generator=generator),
        "bias": torch.randn(batch, length, 6, generator=generator, dtype=DOUBLE),
    }


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Tangle().eval()


@pytest.fixture(scope="module")
def rewritten(model: nn.Module) -> fx.GraphModule:
    return rewrite(model, example(2, 3))


def outputs_of(rewritten: fx.GraphModule) -> list[fx.Node]:
    return list(rewritten.graph.output_node().args[0])  # type: ignore[arg-type]


def read(rewritten: fx.GraphModule, inputs: dict[str, Tensor], seeds: dict[int, Tensor]) -> Reading:
    tape = Tape(rewritten)
    with torch.no_grad():
        tape.run(*inputs.values())
        nodes = outputs_of(rewritten)
        return tape.reverse({nodes[i]: seed for i, seed in seeds.items()})


def audited(
    rewritten: fx.GraphModule, inputs: dict[str, Tensor], seeds: dict[int, Tensor]
) -> dict[str, Tensor]:
    """What each node receives, passes on and absorbs."""
    tape = Tape(rewritten)
    with torch.no_grad():
        tape.run(*inputs.values())
    nodes = outputs_of(rewritten)
    return read_tape(tape, {nodes[i]: seed for i, seed in seeds.items()}).sums


def test_outputs_are_the_model_s(model: nn.Module, rewritten: fx.GraphModule) -> None:
    """The rewritten graph and the tape compute what the model does, at any size."""
    for batch, length in ((2, 3), (1, 7), (4, 1)):
        inputs = example(batch, length)
        with torch.no_grad():
            wanted = list(model(**inputs).values())
            for found in (Tape(rewritten).run(*inputs.values()), rewritten(*inputs.values())):
                for one, other in zip(found, wanted, strict=True):
                    assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp", "gradient"])
def test_program_is_the_tape(model: nn.Module, composite: str) -> None:
    """The traced and split program gives the eager tape's numbers exactly, also at other sizes."""
    explainer = attnlrp_fx.compile(
        model, example(2, 3), composite=composite, backend="eager", target=Logit(2, -1)
    )
    for batch, length in ((2, 3), (3, 5), (1, 1)):
        inputs = example(batch, length)
        explanation = explainer(**inputs)
        seed = torch.zeros_like(explanation.outputs["logits"])
        seed[:, -1, 2] = 1
        reading = read(explainer.rewritten, inputs, {1: seed})
        for name, relevance in reading.relevance.items():
            assert_close(explanation.relevance[name], relevance, rtol=1e-12, atol=1e-12)


def test_gradient_is_autograd(model: nn.Module) -> None:
    """Law 2: with plain gradients everywhere, Gradient×Input of the untouched model."""
    inputs = example(3, 4)
    rewritten = rewrite(model, example(2, 3), "gradient")
    result = explain(rewritten, inputs)
    embedded = model.embedding(inputs["ids"]).detach().requires_grad_()  # type: ignore[operator]
    bias = inputs["bias"].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.embedding, "forward", lambda ids: embedded)
        hidden = model(inputs["ids"], bias)["hidden"]
    of_x, of_bias = torch.autograd.grad(hidden, [embedded, bias], result.coefficient)
    assert_close(result.relevance["ids"], (embedded * of_x).sum(-1).detach())
    assert_close(result.relevance["bias"], (bias * of_bias).detach())


def test_seeds_add_up(rewritten: fx.GraphModule) -> None:
    """Relevance is linear in the seed, over outputs too: one pass for a sum of targets."""
    inputs = example(3, 4)
    outputs = Tape(rewritten).run(*inputs.values())
    seeds = {i: torch.randn_like(output) for i, output in enumerate(outputs)}
    together = read(rewritten, inputs, seeds).relevance
    apart = [read(rewritten, inputs, {i: seed}).relevance for i, seed in seeds.items()]
    tripled = read(rewritten, inputs, {i: 3 * seed for i, seed in seeds.items()}).relevance
    for name, relevance in together.items():
        assert_close(relevance, sum(part[name] for part in apart))
        assert_close(tripled[name], 3 * relevance)


def test_rows_are_independent(rewritten: fx.GraphModule) -> None:
    inputs = example(3, 4)
    seed = torch.zeros(3, 4, 6, dtype=DOUBLE)
    seed[1] = 1.0
    for relevance in read(rewritten, inputs, {0: seed}).relevance.values():
        assert relevance[1].any()
        assert not relevance[[0, 2]].any()


def test_audit(rewritten: fx.GraphModule) -> None:
    """Sums only when asked for, for every node that relevance passes, and law 1 on them."""
    inputs = example(2, 3)
    seed = torch.ones(2, 3, 5, dtype=DOUBLE)
    assert read(rewritten, inputs, {1: seed}).postings == {}
    sums = audited(rewritten, inputs, {1: seed})
    passed = [n for n in rewritten.graph.nodes if n.target in PULLBACKS and n.name in sums]
    assert len(passed) == len(sums) > 8
    for received, handed_on, absorbed in sums.values():
        assert_close(received, handed_on + absorbed, rtol=1e-10, atol=1e-10)


def test_indices_have_no_relevance(rewritten: fx.GraphModule) -> None:
    """Of top-k only the values carry relevance; its indices have none."""
    inputs = example(2, 3)
    seed = torch.ones(2, 3, dtype=DOUBLE)
    sums = audited(rewritten, inputs, {2: seed})
    (topk,) = [n for n in rewritten.graph.nodes if n.target is ops.winner]
    received, passed, absorbed = sums[topk.name].tolist()
    assert received == pytest.approx(passed)
    assert absorbed == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.unbind(1)[1],
        lambda x: x.chunk(2, 1)[0].sum(1),
        lambda x: x.topk(2, 1).values[:, 0],
    ],
    ids=["unbind", "chunk", "topk"],
)
def test_program_of_parts_that_nobody_uses(function: Callable[[Tensor], Tensor]) -> None:
    """The zeros that stand for the others' coefficients depend on no seed; the program has them."""
    model = Function(function).eval()
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    explainer = attnlrp_fx.compile(model, torch.ones(2, 4, 3), backend="eager", target=2)
    explanation = explainer(x)
    seed = torch.zeros_like(explanation.outputs)
    seed[:, 2] = 1
    relevance = read(explainer.rewritten, {"x": x}, {0: seed}).relevance["x"]
    assert relevance.any()
    assert_close(explanation.relevance["x"], relevance)


def test_unreached_output_and_unused_input() -> None:
    """An input that the seeded output does not depend on has no relevance in the reading."""
    rewritten = rewrite(lambda a, b: (a * 2, b * 3), {"a": torch.ones(2, 3), "b": torch.ones(2, 3)})
    reading = read(rewritten, {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, {0: torch.ones(2, 3)})
    assert list(reading.relevance) == ["a"]


def test_an_input_called_like_a_builtin() -> None:
    """Python's own names are renamed in a graph; relevance goes by the model's."""
    model = nn.Linear(3, 2).eval()
    explainer = attnlrp_fx.compile(model, {"input": torch.ones(2, 3)}, backend="eager")
    assert explainer(input=torch.ones(4, 3)).relevance["input"].shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_relevance_is_summed_in_float32_or_better(dtype: torch.dtype) -> None:
    """A thousand features of 0.1 and one of 1000 do not drown in bfloat16."""
    table = torch.full((3, 1001), 0.1).index_fill(1, torch.tensor([0]), 1000.0)
    module = nn.Embedding(3, 1001, _weight=table).to(dtype)
    rewritten = rewrite(module, {"input": torch.tensor([[0, 1]])})
    ids = torch.tensor([[2, 1, 0]])
    relevance = read(rewritten, {"input": ids}, {0: torch.ones(1, 3, 1001, dtype=dtype)}).relevance
    assert relevance["input"].dtype == torch.promote_types(dtype, torch.float32)
    exact = module.weight.detach().double()[ids].sum(-1)
    assert_close(relevance["input"].double(), exact, rtol=1e-6, atol=0)


def test_attributes_replace_the_module_s_own(rewritten: fx.GraphModule) -> None:
    """Parameters are read from what is given, by name; the others from the graph."""
    inputs = example(2, 3)
    zeros = {"head.weight": torch.zeros(5, 6, dtype=DOUBLE)}
    _, logits, _ = Tape(rewritten, zeros).run(*inputs.values())
    head = rewritten.get_parameter("head.bias")
    assert_close(logits, head.expand(2, 3, 5))


def test_watch_and_annotate(rewritten: fx.GraphModule) -> None:
    """Every explained op is announced forward in order, and its coefficient in reverse order."""
    seen: dict[str, list[str]] = {"forward": [], "relevance": []}
    entered: list[tuple[str, str]] = []

    def watch(node: fx.Node, phase: str, value: object) -> None:
        seen[phase].append(node.name)
        assert (node.name, phase) == entered[-1]

    @contextmanager
    def annotate(node: fx.Node, phase: str) -> Iterator[None]:
        entered.append((node.name, phase))
        yield

    tape = Tape(rewritten, annotate=annotate, watch=watch)
    outputs = tape.run(*example(2, 3).values())
    tape.reverse({outputs_of(rewritten)[0]: torch.ones_like(outputs[0])})
    order = [node.name for node in rewritten.graph.nodes if node.target in PULLBACKS]
    assert seen["forward"] == order
    assert seen["relevance"] == [name for name in reversed(order) if name in seen["relevance"]]
    assert len(seen["relevance"]) > 8


def test_a_tape_runs_twice(rewritten: fx.GraphModule) -> None:
    """Nothing is left over from a reverse pass or from another input."""
    first, second = example(2, 3), example(3, 5)
    tape = Tape(rewritten)
    node = outputs_of(rewritten)[0]
    readings = []
    for inputs in (first, second, first):
        output = tape.run(*inputs.values())[0]
        readings.append(tape.reverse({node: torch.ones_like(output)}).relevance)
        readings.append(tape.reverse({node: torch.ones_like(output)}).relevance)
    for name in ("ids", "bias"):
        for i in (1, 4, 5):
            assert_close(readings[i][name], readings[0][name], rtol=0, atol=0)
