"""Roles: what an op is for, by the graph alone, however the model is written."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlrp_fx.capture.capture import capture
from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.provenance import module_path
from attnlrp_fx.passes import NORMALISE, RAISE, PassContext, run_passes
from attnlrp_fx.rules.roles import Role, roles


def roles_of(model: nn.Module, **inputs: Tensor) -> dict[str, set[str]]:
    """Roles by where a node was written: its module's path, or its own name in the root."""
    graph_module = capture(model.eval(), inputs).graph_module
    run_passes(graph_module, PassContext(), (*NORMALISE, *RAISE))
    graph = graph_module.graph
    found: dict[str, set[str]] = {}
    for node, of_node in roles(graph, explained_values(graph)).items():
        where = module_path(node) or node.name
        assert where not in found
        found[where] = {str(role) for role in of_node}
    return found


class Module(nn.Module):
    """Layers by name, and a function of the module and its input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → any shape."""
        return self.function(self, x)


def convolutional(m: nn.Module, x: Tensor) -> Tensor:
    x = F.max_pool2d(torch.relu(m.stem(x)), 2)
    return m.head(torch.relu(m.inner(x)).flatten(1))


def test_convolutional_network() -> None:
    """Convolutions, a dense head, and the first of them, which reads the image."""
    model = Module(
        convolutional, stem=nn.Conv2d(2, 3, 3), inner=nn.Conv2d(3, 4, 2), head=nn.Linear(36, 5)
    )
    assert roles_of(model, x=torch.randn(2, 2, 10, 10)) == {
        "stem": {Role.CONVOLUTION, Role.FIRST},
        "inner": {Role.CONVOLUTION},
        "head": {Role.DENSE},
    }


FIRST: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], nn.Module, bool]] = {
    "itself": (lambda m, x: m.layer(x), nn.Conv2d(2, 3, 3), True),
    "normalised": (lambda m, x: m.layer((x - MEAN) / DEVIATION), nn.Conv2d(2, 3, 3), True),
    "scaled": (lambda m, x: m.layer(x * 2 - 1), nn.Conv2d(2, 3, 3), True),
    "flat": (lambda m, x: m.layer(x.flatten(1)), nn.Linear(32, 3), True),
    "moved": (lambda m, x: m.layer(x.permute(0, 2, 3, 1)[:, 1:]), nn.Linear(2, 3), True),
    "padded": (lambda m, x: m.layer(F.pad(x, (1, 1, 1, 1))), nn.Conv2d(2, 3, 3), True),
    "part": (lambda m, x: m.layer(x.chunk(2, 1)[0]), nn.Conv2d(1, 3, 3), True),
    "transposed": (lambda m, x: m.layer(x), nn.ConvTranspose2d(2, 3, 3), True),
    "behind a rectifier": (lambda m, x: m.layer(torch.relu(x)), nn.Conv2d(2, 3, 3), False),
    "behind a pool": (lambda m, x: m.layer(F.max_pool2d(x, 2)), nn.Conv2d(2, 3, 1), False),
    "behind a norm": (
        lambda m, x: m.layer(F.layer_norm(x, (4,))),
        nn.Conv2d(2, 3, 1),
        False,
    ),
    "of a sum": (lambda m, x: m.layer(x + x.flip(3)), nn.Conv2d(2, 3, 1), False),
}
MEAN, DEVIATION = torch.tensor([0.4, 0.6]).view(2, 1, 1), torch.tensor([0.2, 0.3]).view(2, 1, 1)


@pytest.mark.parametrize("name", FIRST)
def test_first(name: str) -> None:
    """Moves and affine ops of one value may stand between the input and its first layer."""
    function, layer, is_first = FIRST[name]
    found = roles_of(Module(function, layer=layer), x=torch.randn(2, 2, 4, 4))["layer"]
    assert (Role.FIRST in found) == is_first
    assert (Role.CONVOLUTION in found) != isinstance(layer, nn.Linear)
    assert (Role.DENSE in found) == isinstance(layer, nn.Linear)


def test_several_first_layers() -> None:
    """Every layer that reads the input is one; embeddings' readers are, too."""
    model = Module(
        lambda m, x: torch.relu(m.left(x)) * m.right(x), left=nn.Linear(4, 3), right=nn.Linear(4, 3)
    )
    found = roles_of(model, x=torch.randn(2, 4))
    assert found["left"] == found["right"] == {Role.DENSE, Role.FIRST}
    tokens = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    found = roles_of(tokens, input=torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert found == {"1": {Role.DENSE, Role.FIRST}, "2": {Role.DENSE}}


def test_products_that_are_no_layers() -> None:
    """Of two explained values, of parameters alone, or of a weight that the input makes."""
    weight = nn.Linear(3, 3, bias=False)
    model = Module(
        lambda m, x: m.after(x @ x.mT) @ (m.weight.weight @ m.weight.weight).mT,
        weight=weight,
        after=nn.Linear(3, 3),
    )
    found = roles_of(model, x=torch.randn(2, 3, 4))
    assert set(found) == {"after", "matmul_2"}
    assert found["matmul_2"] == {Role.DENSE}


def _heads(x: Tensor, heads: int = 2) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions: elementwise products with tables, halves swapped."""
    angles = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = (table.repeat(1, 2) for table in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def fused(m: nn.Module, x: Tensor) -> Tensor:
    h = m.before(x)
    q, k, v = _heads(m.q(h)), _heads(m.k(h)), _heads(m.v(h))
    return m.after(m.o(_joined(F.scaled_dot_product_attention(q, k, v))))


def joint(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = map(_heads, m.qkv(m.before(x)).chunk(3, -1))
    return m.after(m.o(_joined(F.scaled_dot_product_attention(q, k, v))))


def rotary(m: nn.Module, x: Tensor) -> Tensor:
    h = m.before(x)
    q, k, v = _rotated(_heads(m.q(h))), _rotated(_heads(m.k(h))), _heads(m.v(h))
    return m.after(m.o(_joined(F.scaled_dot_product_attention(q, k, v, is_causal=True))))


def normed(m: nn.Module, x: Tensor) -> Tensor:
    h = m.before(x)
    q, k, v = m.q_norm(_heads(m.q(h))), m.k_norm(_heads(m.k(h))), _heads(m.v(h))
    return m.after(m.o(_joined(F.scaled_dot_product_attention(_rotated(q), k, v))))


def written_out(m: nn.Module, x: Tensor) -> Tensor:
    h = m.before(x)
    q, k, v = _heads(m.q(h)), _heads(m.k(h)), _heads(m.v(h))
    weights = torch.softmax(q @ k.mT * 0.5, -1)
    return m.after(m.o(_joined(weights @ v)))


def with_weights(m: nn.Module, x: Tensor) -> Tensor:
    """The weights are read twice, so that the chain is not fused."""
    h = m.before(x)
    q, k, v = _heads(m.q(h)), _heads(m.k(h)), _heads(m.v(h))
    weights = torch.softmax(q @ k.mT * 0.5, -1)
    return m.after(m.o(_joined(weights @ v))) + weights.sum()


ATTENTIONS = [fused, joint, rotary, normed, written_out, with_weights]


@pytest.mark.parametrize("function", ATTENTIONS)
def test_projections(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Queries, keys, values and outputs, through heads, rotations and norms; no other layer."""
    names = ["qkv"] if function is joint else ["q", "k", "v"]
    sizes = {"qkv": 24}
    layers: dict[str, nn.Module] = {name: nn.Linear(8, sizes.get(name, 8)) for name in names}
    layers |= {"before": nn.Linear(6, 8), "o": nn.Linear(8, 8), "after": nn.Linear(8, 6)}
    if function is normed:
        layers |= {"q_norm": nn.RMSNorm(4), "k_norm": nn.LayerNorm(4)}
    found = roles_of(Module(function, **layers), x=torch.randn(2, 5, 6))
    projections = {where for where, of_node in found.items() if Role.PROJECTION in of_node}
    assert projections == {*names, "o"}
    assert found["before"] == {Role.DENSE, Role.FIRST}
    assert found["after"] == {Role.DENSE}
    for name in projections:
        assert found[name] == {Role.DENSE, Role.PROJECTION}


def test_attention_behind_a_residual_join() -> None:
    """Queries that no layer makes: what made the stream before is no projection."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        h = x + m.mlp(torch.relu(m.up(x)))
        q = _heads(h)
        k, v = _heads(m.k(h)), _heads(m.v(h))
        return m.after(torch.relu(m.o(_joined(F.scaled_dot_product_attention(q, k, v)))))

    layers = {name: nn.Linear(8, 8) for name in ("mlp", "up", "k", "v", "o", "after")}
    found = roles_of(Module(function, **layers), x=torch.randn(2, 5, 8))
    projections = {where for where, of_node in found.items() if Role.PROJECTION in of_node}
    assert projections == {"k", "v", "o"}
    joins = [where for where, of_node in found.items() if Role.JOIN in of_node]
    assert joins == ["add"]


def test_join() -> None:
    """Two explained values of one shape; a bias, a broadcast and a scaled sum are none."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        y = x + m.a(x)
        y = torch.relu(y) + m.a.bias
        y = y + y.mean(1, keepdim=True)
        y = torch.add(y, m.b(y), alpha=2)
        return y + 1 + torch.tanh(y)

    found = roles_of(Module(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x=torch.randn(2, 4))
    joins = [where for where, of_node in found.items() if Role.JOIN in of_node]
    assert joins == ["add", "add_5"]


def squeeze_and_excite(m: nn.Module, x: Tensor) -> Tensor:
    """A gate for each channel, of the mean over the image."""
    signal = F.silu(m.stem(x))
    gate = torch.sigmoid(m.up(F.silu(m.down(signal.mean((2, 3), keepdim=True)))))
    return m.head(signal * gate)


def test_gate_of_squeeze_and_excitation() -> None:
    """Signal and gate are both activations; the one that is broadcast is the gate."""
    layers = {
        "stem": nn.Conv2d(2, 4, 3),
        "down": nn.Conv2d(4, 3, 1),
        "up": nn.Conv2d(3, 4, 1),
        "head": nn.Conv2d(4, 2, 1),
    }
    found = roles_of(Module(squeeze_and_excite, **layers), x=torch.randn(2, 2, 5, 5))
    gates = [where for where, of_node in found.items() if Role.GATE in of_node]
    assert gates == ["sigmoid"]


GATES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "activation and value": (lambda a, b: F.silu(a) * b, ["silu"]),
    "value and activation": (lambda a, b: b * torch.sigmoid(a), ["sigmoid"]),
    "equals": (lambda a, b: torch.tanh(a) * torch.sigmoid(b), []),
    "broadcast": (lambda a, b: torch.tanh(a) * torch.sigmoid(b[:, :1]), ["sigmoid"]),
    "broadcast first": (lambda a, b: torch.tanh(a[:, :1]) * torch.sigmoid(b), ["tanh"]),
    "both broadcast": (lambda a, b: torch.tanh(a[:, :1]) * torch.sigmoid(b[:1]), []),
    "two values": (lambda a, b: a * b, []),
    "weights": (lambda a, b: torch.softmax(a, -1) * F.silu(b), ["softmax"]),
    "a square": (lambda a, b: F.silu(a) * F.silu(a) + b, []),
}


@pytest.mark.parametrize("name", GATES)
def test_gate(name: str) -> None:
    function, expected = GATES[name]

    def whole(m: nn.Module, x: Tensor) -> Tensor:
        return function(m.a(x), m.b(x))

    model = Module(whole, a=nn.Linear(4, 5), b=nn.Linear(4, 5))
    found = roles_of(model, x=torch.randn(3, 4))
    wanted = {Role.GATE, Role.WEIGHTS}
    assert [where for where, of_node in found.items() if of_node & wanted] == expected
    if name == "weights":
        assert found["softmax"] == {Role.WEIGHTS}
