"""Relevance of parameters against an explicit oracle, for every rule at every op that is a layer.

The oracle takes a layer as a matrix M of outputs and inputs, in which every element is one of the
weights. What output j hands to input i, q_ij R_j / (t_j + ε sign t_j), belongs to the weight that
stands there; a weight's relevance is the sum over all places where it stands.
"""

import functools

import layer_references as ref
import pytest
import references
import torch
from test_layers import CASES, RULES, SURROUNDINGS, Net, assigned, captured, draw
from torch import Tensor, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import Rule
from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.calculus.weights import Weighing, Weight

F64 = torch.float64


def oracle(net: Net, rule: Rule, x: Tensor, relevance: Tensor) -> tuple[Tensor, float]:
    """R_W, and what the bias absorbs, shared out element by element."""
    weight = net.weight.detach()
    layer = ref.dense(net.layer, x, weight)
    numbers = torch.arange(1.0, weight.numel() + 1, dtype=F64).reshape(weight.shape)
    at_zero = net.layer(torch.zeros_like(x), numbers)
    stands = ref._columns(lambda unit: net.layer(unit, numbers) - at_zero, x).round().long()
    epsilon, of_bias = getattr(rule, "epsilon", 0.0), 0.0
    found = torch.zeros(weight.numel() + 1, dtype=F64)
    for share, contributions, kept in ref._contributions(rule, layer, x):
        total = contributions.sum(1) + kept
        total = total + epsilon * torch.where(total >= 0, 1.0, -1.0).to(F64)
        per_unit = references.ratio(share * relevance.reshape(-1), total)
        found.index_add_(0, stands.reshape(-1), (contributions * per_unit[:, None]).reshape(-1))
        of_bias += float((kept * per_unit).sum())
    return found[1:].reshape(weight.shape), of_bias


@functools.cache
def names_of(net: Net) -> frozenset[str]:
    return frozenset(name for name, _ in net.named_parameters())


def read(net: Net, rewritten: torch.fx.GraphModule, x: Tensor) -> tuple[dict[str, Weight], Tensor]:
    """What the tape reads of a net's parameters, and the relevance of its output."""
    tape = Tape(rewritten, weighing=Weighing(names_of(net), 1))
    with torch.no_grad():
        (output,) = tape.run(x)
        c = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
        (node,) = rewritten.graph.output_node().args[0]
        return tape.reverse({node: c}).weights, output * c


@pytest.mark.parametrize("name", CASES)
def test_every_rule(name: str) -> None:
    """The weight gets what passes through it, the bias what it absorbs."""
    case = CASES[name]
    for surrounding in SURROUNDINGS:
        net, _ = captured(name, surrounding)
        x = draw(net, case, 3, 2, "mixed")
        given = torch.relu(x) if net.behind else x
        for make in RULES.values():
            for epsilon in (0.0, 0.3):
                rule = make(epsilon)
                _, rewritten = assigned(name, surrounding, rule)
                found, relevance = read(net, rewritten, x)
                with torch.no_grad():
                    weight, bias = oracle(net, rule, given, relevance)
                assert_close(found["weight"].signed, weight, rtol=1e-9, atol=1e-10)
                assert torch.equal(found["weight"].absolute, found["weight"].signed.abs())
                if "bias" in found:
                    assert float(found["bias"].signed.sum()) == pytest.approx(bias, abs=1e-9)


class Convolutions(nn.Module):
    """One of each kind, in branches."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2)
        self.two = nn.ModuleList(
            [
                nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(1, 2)),
                nn.Conv2d(4, 4, 4, padding="same", groups=4),
                nn.ConvTranspose2d(4, 6, (2, 3), stride=2, output_padding=1, padding=1, groups=2),
            ]
        )
        self.three = nn.Conv3d(2, 3, 2, stride=(1, 2, 1))
        self.head = nn.Linear(6 + 6 + 4 + 6 + 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, 6, 7) → (batch, 3)."""
        found = [self.one(x.flatten(2)).relu().mean(2)]
        found += [layer(x).relu().mean((2, 3)) for layer in self.two]
        found += [self.three(x.unflatten(1, (2, 2))).relu().mean((2, 3, 4))]
        return self.head(torch.cat(found, 1))  # type: ignore[no-any-return]


def test_convolutions_row_by_row() -> None:
    """Magnitudes of a batch are those of its rows alone, for strides, paddings, groups and all."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6, 7, dtype=F64)
    model = Convolutions().double().eval()
    explainer = attnlrp_fx.compile(model, x[:2], composite="attnlrp-vision", backend="eager")
    together = explainer.weight_relevance(list(x), batch_size=5, progress=False)
    apart = explainer.weight_relevance(list(x), batch_size=1, progress=False)
    assert set(together) >= {n for n, p in model.named_parameters() if p.dim() > 1}
    (compiled,) = explainer._weighing._running.programs.compiled.values()
    assert all(program.rows_told_apart for program in compiled.schedule.programs)
    for name in together:
        assert_close(together[name], apart[name], rtol=1e-9, atol=1e-12)
        assert_close(together.absolute[name], apart.absolute[name], rtol=1e-9, atol=1e-12)
    assert float((together.absolute["three.weight"] - together["three.weight"].abs()).max()) > 1e-6
