"""Relevance that has no factor, R = x·c + r, in the middle of networks, against R taken literally.

The rules that give relevance to zeros (flat, w², zᴮ, equal joins) stand behind layers, rectifiers,
pools and rearrangements here; `layer_references` takes R through the same, step by step.
"""

from collections.abc import Callable, Mapping

import layer_references as ref
import pytest
import references
import torch
import torch.nn.functional as F
from layer_references import Affine, Layer, MaxPool, Moved, Network, Relu, Step
from references import Explained, explain, rewrite
from torch import Tensor, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import (
    COMPOSITES,
    AlphaBeta,
    Composite,
    Epsilon,
    Flat,
    Gamma,
    Join,
    Match,
    Pass,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
)
from attnlrp_fx.calculus.relevance import factored, relevance_of

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def filled(module: nn.Module) -> nn.Module:
    """Random parameters, of biases too."""
    module = module.double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i + 1) / parameter[0].numel() ** 0.5)
    return module


def conv(inputs: int, outputs: int, size: int = 3, **options: int) -> nn.Module:
    return filled(nn.Conv2d(inputs, outputs, size, **options))


def linear(inputs: int, outputs: int) -> nn.Module:
    return filled(nn.Linear(inputs, outputs))


def _with(entries: Mapping[str, Rule]) -> Composite:
    """AttnLRP with rules for modules by path, and for ops by a name with a dot."""
    return COMPOSITES["attnlrp"].with_rules(
        *(
            (Match(op=f"{at}*") if "." in at[:5] else Match(module=at), rule)
            for at, rule in entries.items()
        )
    )


def of(result: Explained, name: str = "x") -> Tensor:
    """Relevance, once law 1 is checked."""
    scale = 1.0 + float(result.seeded.abs().sum())
    assert abs(result.residual) <= 1e-11 * scale
    return result.relevance[name]


FLATTEN = Moved(lambda x: x.flatten(1))
NETWORKS: dict[str, Callable[[], tuple[Step, ...]]] = {
    "flat behind a rectifier": lambda: (
        Layer(linear(5, 6), Epsilon()),
        Relu(),
        Layer(linear(6, 7), Flat()),
        Relu(),
        Layer(linear(7, 4), Gamma(0.5)),
    ),
    "w² twice": lambda: (
        Layer(linear(5, 6), WSquare()),
        Relu(),
        Layer(linear(6, 7), WSquare(epsilon=0.1)),
        Relu(),
        Layer(linear(7, 4), ZPlus()),
    ),
    "flat without activations": lambda: (
        Layer(linear(5, 6), Gamma(0.25)),
        Layer(linear(6, 7), Flat()),
        Layer(linear(7, 4), Epsilon()),
    ),
    "flat behind a max-pool": lambda: (
        Layer(conv(2, 3, padding=1), ZPlus()),
        Relu(),
        MaxPool(2),
        Layer(conv(3, 4, 2), Flat()),
        Relu(),
        FLATTEN,
        Layer(linear(4, 3), Epsilon()),
    ),
    "flat on views": lambda: (
        Layer(conv(2, 4, padding=1), Gamma(0.25)),
        Relu(),
        Moved(lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)[:, 5:37].flip(1)),
        Layer(linear(32, 3), Flat()),
    ),
    "w² behind an average": lambda: (
        Layer(conv(2, 4, padding=1), AlphaBeta(2, 1)),
        Relu(),
        Affine(lambda x: F.avg_pool2d(x, 2)),
        FLATTEN,
        Layer(linear(16, 3), WSquare()),
    ),
    "flat on padded pixels": lambda: (
        Layer(conv(2, 4, padding=1), Epsilon()),
        Relu(),
        Moved(lambda x: F.pad(x, (1, 1, 1, 1))),
        Layer(conv(4, 3), Flat()),
    ),
    "flat on repeated pixels": lambda: (
        Layer(conv(2, 4, padding=1), Epsilon()),
        Relu(),
        Moved(lambda x: F.pixel_shuffle(F.interpolate(x, scale_factor=2), 2)),
        Layer(conv(1, 2, 2, stride=3), Flat()),
    ),
    "flat, then the box": lambda: (
        Layer(conv(2, 4, padding=1), ZBox(-4.0, (4.0, 5.0))),
        Relu(),
        Layer(conv(4, 3, 2), Flat()),
        Relu(),
        FLATTEN,
        Layer(linear(27, 3), Epsilon()),
    ),
    "a stabiliser below": lambda: (
        Layer(conv(2, 4, padding=1), Epsilon(0.2)),
        Relu(),
        Layer(conv(4, 3, 2), Flat(epsilon=0.3)),
    ),
}


def entries_of(steps: tuple[Step, ...]) -> dict[str, Rule]:
    layers = [step for step in steps if isinstance(step, Layer)]
    return {f"layers.{i}": layer.rule for i, layer in enumerate(layers)}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    """Rule by rule, through whatever lies between; relevance at zeros included."""
    steps = NETWORKS[name]()
    shape = (5,) if isinstance(Network(*steps).layers[0], nn.Linear) else (2, 4, 4)
    x = randn(2, *shape)
    rewritten = rewrite(Network(*steps), {"x": randn(3, *shape)}, _with(entries_of(steps)))
    x[0, 0] = 0.0
    result = explain(rewritten, {"x": x})
    assert_close(of(result), ref.propagate(steps, x, result.seeded), rtol=1e-9, atol=1e-11)


def test_relevance_at_zeros_counts() -> None:
    """What the test above holds is more than rounding: without zeros the numbers are others."""
    steps = NETWORKS["flat behind a rectifier"]()
    x = randn(2, 5)
    result = explain(rewrite(Network(*steps), {"x": x}, _with(entries_of(steps))), {"x": x})
    hidden = torch.relu(steps[0](x))
    assert (hidden == 0).any()
    kept = [*steps[:2], Affine(lambda h: h * 1.0), *steps[2:]]
    blocked = ref.propagate(kept, x, result.seeded)
    assert (of(result) - blocked).abs().max() > 1e-3


class Branches(nn.Module):
    """Halves of a layer's channels go their own ways and come together again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(2, 4, padding=1), conv(2, 3), conv(2, 2)
        self.head = linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2, 4, 4) → (batch, 3)."""
        left, right = torch.relu(self.stem(x)).chunk(2, 1)
        return self.head(torch.cat([torch.relu(self.left(left)), self.right(right)], 1).flatten(1))


@pytest.mark.parametrize("right", [Epsilon(), Flat(), ZPlus()], ids=str)
def test_branches(right: Rule) -> None:
    """Parts of one value, of which one, both or none gets relevance that has no factor."""
    net = Branches().double().eval()
    rules: dict[str, Rule] = {"stem": Gamma(0.5), "left": Flat(), "right": right, "head": ZPlus()}
    x = randn(2, 2, 4, 4)
    result = explain(rewrite(net, {"x": randn(3, 2, 4, 4)}, _with(rules)), {"x": x})
    stem, left, way, head = (Layer(getattr(net, name), rule) for name, rule in rules.items())
    with torch.no_grad():
        halves = torch.relu(stem(x)).chunk(2, 1)
        made = torch.relu(left(halves[0])), way(halves[1])
        joined = torch.cat(made, 1)
        of_joined = head.back(joined.flatten(1), result.seeded).view(joined.shape)
        of_left = left.back(halves[0], of_joined[:, :3])
        of_right = way.back(halves[1], of_joined[:, 3:])
        expected = stem.back(x, torch.cat([of_left, of_right], 1))
    assert_close(of(result), expected, rtol=1e-9, atol=1e-11)


class Residual(nn.Module):
    """A block with a skip connection, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = conv(2, 3, padding=1), conv(3, 3, padding=1), conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2, 4, 4) → (batch, 2, 2, 2)."""
        skip = torch.relu(self.stem(x))
        return self.head(torch.relu(skip + self.inner(skip)))


@pytest.mark.parametrize("split", ["magnitude", "equal"])
@pytest.mark.parametrize("below", [Epsilon(), Gamma(0.5), Flat()], ids=str)
def test_join(split: str, below: Rule) -> None:
    """Halves, or shares by magnitude, of whatever arrives: with a factor or without."""
    net = Residual().double().eval()
    composite = _with(
        {"stem": Gamma(0.25), "inner": ZPlus(), "head": below, "aten.add": Join(split)}
    )
    x = randn(2, 2, 4, 4)
    result = explain(rewrite(net, {"x": randn(3, 2, 4, 4)}, composite), {"x": x})
    stem, inner = Layer(net.stem, Gamma(0.25)), Layer(net.inner, ZPlus())
    with torch.no_grad():
        skip = torch.relu(stem(x))
        branch = inner(skip)
        of_sum = Layer(net.head, below).back(torch.relu(skip + branch), result.seeded)
        of_skip, of_branch = ref.join(split, skip, branch, of_sum)
        expected = stem.back(x, of_skip + inner.back(skip, of_branch))
    assert_close(of(result), expected, rtol=1e-9, atol=1e-11)


def test_join_of_a_value_with_itself() -> None:
    for split in ("magnitude", "equal"):
        composite = _with({"aten.add": Join(split)})
        result = explain(
            rewrite(lambda x: x + x, {"x": randn(3, 4)}, composite), {"x": randn(2, 4)}
        )
        assert_close(of(result), result.seeded)


def test_a_broadcast_sum_is_no_join() -> None:
    """Then the shapes differ, and shares go by contribution."""
    composite = _with({"aten.add": Join("equal")})
    inputs = {"a": randn(2, 4), "b": randn(2, 1, seed=1)}
    result = explain(
        rewrite(lambda a, b: a + b, {"a": randn(3, 4), "b": randn(3, 1)}, composite), inputs
    )
    of_a, of_b = references.add(inputs["a"], inputs["b"], result.seeded)
    assert_close(of(result, "a"), of_a)
    assert_close(of(result, "b"), of_b.sum(1, keepdim=True))


MIDDLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "sigmoid": (torch.sigmoid, lambda h, r: r),
    "gelu": (F.gelu, lambda h, r: r),
    "shift and scale": (lambda h: 3 * h + 1, lambda h, r: r),
    "product": (lambda h: h * h.flip(1), lambda h, r: r / 2 + r.flip(1) / 2),
    "softmax": (
        lambda h: torch.softmax(h, -1),
        lambda h, r: references.rows(references.softmax, h, r),
    ),
    "layer norm": (
        lambda h: F.layer_norm(h, (6,), eps=1e-3),
        lambda h, r: references.rows(
            lambda a, b: references.layer_norm(a, None, None, 1e-3, b), h, r
        ),
    ),
    "largest": (
        lambda h: h.topk(6, -1).values,
        lambda h, r: torch.zeros_like(h).scatter(1, h.argsort(-1, descending=True), r),
    ),
    "parts": (
        lambda h: torch.cat(h.split([1, 2, 3], 1)[::-1], 1),
        lambda h, r: torch.cat([r[:, 5:], r[:, 3:5], r[:, :3]], 1),
    ),
    "sum": (
        lambda h: h.sum(1, keepdim=True).expand(-1, 6),
        lambda h, r: references.ratio(h * r.sum(1, keepdim=True), h.sum(1, keepdim=True)),
    ),
    "masked": (
        lambda h: h.masked_fill(torch.tensor([True, False] * 3), 2.0),
        lambda h, r: r * torch.tensor([0.0, 1.0] * 3, dtype=DOUBLE),
    ),
}
"""What may stand before a layer with the flat rule: h → values, and (h, R of them) → R of h."""


@pytest.mark.parametrize("name", MIDDLE)
def test_before_a_flat_layer(name: str) -> None:
    """Before an op that needs a coefficient, R / value is one; elsewhere R is handed on."""
    function, back = MIDDLE[name]
    stem, head = linear(5, 6), linear(6, 4)

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = stem, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(function(self.stem(x)))

    composite = _with({"stem": Gamma(0.5), "head": Flat()})
    x = randn(2, 5)
    result = explain(rewrite(Middle().eval(), {"x": randn(3, 5)}, composite), {"x": x})
    with torch.no_grad():
        h = stem(x)
        of_values = Layer(head, Flat()).back(function(h), result.seeded)
        expected = Layer(stem, Gamma(0.5)).back(x, back(h, of_values))
    assert_close(of(result), expected, rtol=1e-9, atol=1e-11)


def test_what_is_lost_at_zeros_is_absorbed() -> None:
    """A sum of zeros has nothing to take relevance to: the ledger enters it there."""
    head = linear(4, 3)

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(x).cumsum(1))

    rewritten = rewrite(Summed().eval(), {"x": randn(3, 4)}, _with({"head": Flat()}))
    result = explain(rewritten, {"x": -randn(2, 4).abs()})
    assert not of(result).any()
    assert result.absorbed["cumsum"] == pytest.approx(float(result.seeded.sum()))


def test_pass() -> None:
    """Element by element at a norm and at activations, whatever the values are."""
    stem, norm, head = conv(2, 3, padding=1), filled(nn.BatchNorm2d(3)), conv(3, 2)
    model = nn.Sequential(stem, nn.ReLU(), norm, nn.Sigmoid(), head).eval()
    composite = _with({"0": Gamma(0.25), "[123]": Pass(), "4": Flat()})
    x = randn(2, 2, 4, 4)
    result = explain(rewrite(model, {"input": randn(3, 2, 4, 4)}, composite), {"input": x})
    with torch.no_grad():
        of_active = Layer(head, Flat()).back(model[:4](x), result.seeded)
        expected = Layer(stem, Gamma(0.25)).back(x, of_active)
    assert_close(of(result, "input"), expected, rtol=1e-9, atol=1e-11)
    assert sum(result.absorbed[n] for n in ("relu", "sigmoid")) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(1),
        lambda x: torch.narrow(x, 1, 0, 2),
        lambda x: x.mean((1, 2), keepdim=True),
        lambda x: x + x.flip(1),
        lambda x: x + 2 * x.sum(1, keepdim=True),
    ],
    ids=["sum", "slice", "mean", "two inputs", "broadcast"],
)
def test_pass_where_it_means_nothing(function: Callable[[Tensor], Tensor]) -> None:
    """Where shapes differ or inputs are several: an error, or the ε rule; no other number."""
    passing, epsilon = (
        COMPOSITES["attnlrp"].with_rules((Match(kind="linear"), rule))
        for rule in (Pass(), Epsilon())
    )
    example, inputs = {"x": randn(3, 3, 4)}, {"x": randn(2, 3, 4)}
    try:
        rewritten = rewrite(function, example, passing)
    except attnlrp_fx.RuleError:
        return
    result = explain(rewritten, inputs)
    expected = explain(rewrite(function, example, epsilon), inputs)
    assert_close(of(result), of(expected))


class Normalised(nn.Module):
    """A network that normalises its image itself, or is given it so."""

    def __init__(self, is_own: bool) -> None:
        super().__init__()
        self.stem, self.head = conv(2, 4, padding=1), conv(4, 3)
        self.is_own = is_own

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2, 4, 4) → (batch, 3, 2, 2)."""
        return self.head(torch.relu(self.stem(normalised(x) if self.is_own else x)))


def normalised(x: Tensor) -> Tensor:
    mean = torch.tensor([0.5, 0.25], dtype=DOUBLE).view(2, 1, 1)
    deviation = torch.tensor([0.25, 0.5], dtype=DOUBLE).view(2, 1, 1)
    return (x - mean) / deviation


def _image() -> Tensor:
    """Pixels in [0, 1], one of them the mean, one nearly."""
    x = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    x[0, 0, 1, 1], x[0, 0, 2, 2] = 0.5, 0.5 + 1e-9
    return x


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("first", [Flat(), WSquare(), ZBox((-2.0, -0.5), (2.0, 1.5))], ids=str)
def test_normalisation_before_the_first_layer(first: Rule, passes: bool) -> None:
    """A pixel gets what its normalised value gets; near the mean nothing is divided by zero.

    So by itself, and if the user says so with `Pass`.
    """
    entries = [(Match(role="first"), first)]
    if passes:
        entries += [(Match(op=f"aten.{op}.*"), Pass()) for op in ("sub", "div")]
    composite = COMPOSITES["attnlrp"].with_rules(*entries)
    x = _image()
    own, given = (
        explain(
            rewrite(Normalised(is_own).double().eval(), {"x": x[:1].repeat(3, 1, 1, 1)}, composite),
            {"x": image},
        )
        for is_own, image in ((True, x), (False, normalised(x)))
    )
    assert_close(own.seeded, given.seeded)
    assert_close(of(own), of(given), rtol=1e-9, atol=1e-12)


def test_tokens_get_relevance_without_a_factor() -> None:
    """A flat layer on embeddings: each token gets its share, summed over its features."""
    table, head = nn.Embedding(7, 3).double(), linear(12, 2)
    with torch.no_grad():
        table.weight.copy_(randn(7, 3))
        table.weight[4] = 0.0

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = table, head

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).flatten(1))

    ids = torch.tensor([[1, 4, 4, 6], [0, 2, 5, 3]])
    result = explain(rewrite(Bag().eval(), {"ids": ids}, _with({"head": Flat()})), {"ids": ids})
    assert_close(of(result, "ids"), result.seeded.sum(1, keepdim=True).expand(2, 4) / 4)


def test_relevance_of() -> None:
    """R = x·c + r, of one value or of several."""
    x, c, r = randn(3), randn(3, seed=1), randn(3, seed=2)
    assert_close(relevance_of(x, c, r), x * c + r)
    assert_close(relevance_of(x, c, None), x * c)
    assert_close(relevance_of(x, None, r), r)
    assert_close(relevance_of(x, None, None), torch.zeros_like(x))
    both = relevance_of([x, c], None, [r, x])
    assert_close(both, [r, x])


def test_factored() -> None:
    """c + r/x, and of zeros what is lost."""
    x, r = torch.tensor([2.0, 0.0, -4.0]), torch.tensor([1.0, 5.0, 2.0])
    c, lost = factored(x, None, r)
    assert c.tolist() == [0.5, 0.0, -0.5]
    assert (lost.item(), lost.dtype) == (5.0, torch.float32)
    c, lost = factored(x, torch.ones(3), r)
    assert c.tolist() == [1.5, 1.0, 0.5]
    parts, lost = factored((x, x), None, [r, 2 * r])
    assert [part.tolist() for part in parts] == [[0.5, 0.0, -0.5], [1.0, 0.0, -1.0]]
    assert lost.item() == 15.0


@pytest.mark.parametrize("audit", [False, True])
def test_program(audit: bool) -> None:
    """The compiled program does the same as the tape, at other batches too."""
    steps = NETWORKS["flat behind a max-pool"]()
    model = Network(*steps).eval()
    explainer = attnlrp_fx.compile(
        model,
        {"x": randn(3, 2, 4, 4)},
        composite=_with(entries_of(steps)),
        backend="eager",
        target=1,
        audit=audit,
    )
    for batch in (1, 2, 5):
        x = randn(batch, 2, 4, 4, seed=batch)
        explanation = explainer(x)
        seeded = explanation.outputs * torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)
        expected = ref.propagate(steps, x, seeded)
        assert_close(explanation.relevance["x"], expected, rtol=1e-9, atol=1e-11)
        if audit:
            assert abs(explanation.ledger.residual) <= 1e-11
    assert explainer.compilations == 1
