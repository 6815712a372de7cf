"""Slow oracles: relevance in the explicit form of Achtibat et al. 2024 (arXiv 2402.05602).

Every function here takes values and the relevance R of the output, and returns the relevance of
each input, output by output and by division, as the equations stand in the paper.
The package works with coefficients c (R = x·c) and never divides; the two must agree. An output
that is exactly zero carries no relevance in this form, so tests keep outputs away from it.

`rewrite` and `explain` are the bridge: a module's rewritten graph, and what the tape reads off it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from attnlrp_fx.calculus.tape import Audited, Tape
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.inspection.ledger import Book
from attnlrp_fx.passes import PassContext, run_passes
from attnlrp_fx.rules.composites import Composite, composite_named


@dataclass
class Explained:
    """What the tape computed, and the ledger's sums."""

    outputs: list[Tensor]
    relevance: dict[str, Tensor]
    coefficient: Tensor
    """The seed at the first output."""
    absorbed: dict[str, float]
    """By node."""

    @property
    def seeded(self) -> Tensor:
        """Relevance of the first output, R = y·c."""
        return self.outputs[0] * self.coefficient

    @property
    def residual(self) -> float:
        """Law 1: output − inputs − absorbed."""
        passed = sum(float(r.double().sum()) for r in self.relevance.values())
        return float(self.seeded.double().sum()) - passed - sum(self.absorbed.values())


class Function(nn.Module):
    """A function of tensors as a module; argument names become input names."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function  # type: ignore[method-assign]


def rewrite(
    module: nn.Module | Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    composite: str | Composite = "attnlrp",
    explain: Sequence[str] | None = None,
) -> fx.GraphModule:
    """A module's rewritten graph, every size dynamic."""
    if not isinstance(module, nn.Module):
        module = Function(module)
    rewritten = capture(module.eval(), dict(inputs)).graph_module
    context = PassContext(tuple(explain) if explain else None, composite_named(composite))
    run_passes(rewritten, context)
    return rewritten


def explain(
    rewritten: fx.GraphModule, inputs: Mapping[str, Tensor], coefficient: Tensor | None = None
) -> Explained:
    """Run the tape on real tensors, seeded at the first output (None: with random numbers)."""
    tape = Tape(rewritten)
    names = [str(node.target) for node in rewritten.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        outputs = tape.run(*(inputs[name] for name in names))
    if coefficient is None:
        generator = torch.Generator().manual_seed(0)
        coefficient = torch.randn(outputs[0].shape, generator=generator, dtype=outputs[0].dtype)
    seeded = rewritten.graph.output_node().args[0][0]  # type: ignore[index]
    read = read_tape(tape, {seeded: coefficient})  # type: ignore[dict-item]
    absorbed = {name: float(sums[2]) for name, sums in read.sums.items()}
    return Explained(outputs, read.relevance, coefficient, absorbed)


@dataclass
class Oracle:
    """What a tape on real tensors reads, every edge of it measured."""

    relevance: dict[str, Tensor]
    sums: dict[str, Tensor]
    """By node (3,): what it received, passed on and absorbed."""


def read_tape(tape: Tape, seeds: Mapping[fx.Node, Tensor]) -> Oracle:
    """A tape that has run, taken back from seeds at nodes."""
    with torch.no_grad():
        reading = tape.reverse(seeds, Audited.EVERY)
    seeded = {node.name: float((tape.env[node] * seed).sum()) for node, seed in seeds.items()}
    ledger = Book(tape.graph).read(
        {key: float(value) for key, value in reading.postings.items()},
        target=sum(seeded.values()),
        seeded=seeded,
        inputs={},
    )
    lines = {e.node: (e.received, e.passed, e.absorbed) for e in ledger.entries[:-1]}
    sums = {name: torch.tensor(line, dtype=torch.float64) for name, line in lines.items()}
    return Oracle(reading.relevance, sums)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is: nothing times nothing."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def share(part: Tensor, whole: Tensor, relevance: Tensor) -> Tensor:
    """What a summand gets of the relevance of a sum; an infinite sum has none to give."""
    finite = torch.isfinite(whole)
    return torch.where(finite, ratio(part * relevance, whole), 0.0)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor, epsilon: float = 0.0
) -> tuple[Tensor, float]:
    """R_i = Σ_j W_ji x_i R_j / (z_j + ε sign z_j), z = W x + b, of one vector (eq. 8).

    Returns the relevance of x and what the bias and ε keep: (b_j + ε sign z_j) R_j / (…).
    """
    received = torch.zeros_like(x)
    kept = 0.0
    for j in range(weight.shape[0]):
        b = 0.0 if bias is None else float(bias[j])
        z = float(weight[j] @ x) + b
        stabiliser = epsilon if z >= 0 else -epsilon
        if z + stabiliser == 0:
            continue
        received += weight[j] * x * relevance[j] / (z + stabiliser)
        kept += (b + stabiliser) * float(relevance[j]) / (z + stabiliser)
    return received, kept


def rows(rule: Callable[..., Tensor], *batched: Tensor) -> Tensor:
    """A rule of vectors, row by row of (..., n) tensors."""
    lead = batched[0].shape[:-1]
    flat = [t.reshape(-1, t.shape[-1]) for t in batched]
    return torch.stack([rule(*row) for row in zip(*flat, strict=True)]).reshape(*lead, -1)


def affine(
    function: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor, epsilon: float = 0.0
) -> Tensor:
    """The ε rule (eq. 8) of any affine function: its explicit matrix has columns f(eᵢ) − f(0)."""
    bias = function(torch.zeros_like(x))
    columns = []
    for i in range(x.numel()):
        unit = torch.zeros(x.numel(), dtype=x.dtype)
        unit[i] = 1
        columns.append((function(unit.reshape(x.shape)) - bias).reshape(-1))
    weight = torch.stack(columns, 1)
    received, _ = linear(x.reshape(-1), weight, bias.reshape(-1), relevance.reshape(-1), epsilon)
    return received.reshape(x.shape)


def softmax(x: Tensor, relevance: Tensor) -> Tensor:
    """R_i = x_i (R_i − s_i Σ_j R_j) of one vector (eq. 13); x = −∞ counts as 0."""
    s = torch.softmax(x, 0)
    total = sum(float(r) for r in relevance)
    received = torch.zeros_like(x)
    for i in range(len(x)):
        if torch.isfinite(x[i]):
            received[i] = x[i] * (relevance[i] - s[i] * total)
    return received


def product(factors: int, relevance: Tensor) -> Tensor:
    """R / N to each of N factors (eq. 14)."""
    return relevance / factors


def matmul(a: Tensor, v: Tensor, relevance: Tensor, factors: int = 2) -> tuple[Tensor, Tensor]:
    """R_A,ji = Σ_p A_ji V_ip R_jp / (2 O_jp) and R_V alike, of matrices O = A V (eq. 15)."""
    out = a @ v
    of_a, of_v = torch.zeros_like(a), torch.zeros_like(v)
    for j in range(a.shape[0]):
        for p in range(v.shape[1]):
            if out[j, p] == 0:
                continue
            part = a[j] * v[:, p] * relevance[j, p] / (factors * out[j, p])
            of_a[j] += part
            of_v[:, p] += part
    return of_a, of_v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relevance: Tensor,
    scale: float,
    mask: Tensor | None = None,
    *,
    constant_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one head as a chain: matmul (15), scale and mask, softmax (13), matmul (15).

    With constant weights (CP-LRP, Ali et al. 2022) the value gets everything by the ε rule.
    """
    product_of_qk = q @ k.T
    scaled = product_of_qk * scale
    scores = scaled if mask is None else scaled + mask
    weights = torch.softmax(scores, -1)
    if constant_weights:
        _, of_v = matmul(weights, v, relevance, factors=1)
        return torch.zeros_like(q), torch.zeros_like(k), of_v
    of_weights, of_v = matmul(weights, v, relevance)
    of_scores = rows(softmax, scores, of_weights)
    of_scaled = of_scores if mask is None else share(scaled, scores, of_scores)
    of_q, of_k = matmul(q, k.T, of_scaled)
    return of_q, of_k.T, of_v


def integrated_attention(
    q: Tensor, k: Tensor, v: Tensor, relevance: Tensor, scale: float, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, softmax integrated from scores of zero: its derivative's mean at αx, α from 0 to 1.

    Of x_ij a_ij query and key get q_id k_jd a_ij / 2 in feature d. Simpson's rule, 2000 pieces.
    """
    scores = q @ k.T * scale
    weights = torch.softmax(scores + mask, -1)
    of_weights, of_v = matmul(weights, v, relevance)
    of_q, of_k = torch.zeros_like(q), torch.zeros_like(k)
    places = torch.linspace(0, 1, 2001, dtype=q.dtype)
    simpson = torch.full_like(places, 2.0)
    simpson[1::2], simpson[[0, -1]] = 4.0, 1.0
    for i in range(len(q)):
        of_one = ratio(of_weights[i], weights[i])  # relevance of a unit of each weight
        s = torch.softmax(places[:, None] * scores[i] + mask[i], -1)
        slopes = s * (of_one - (s * of_one).sum(-1, keepdim=True))
        slope = (simpson[:, None] * slopes).sum(0) / 6000
        for j in range(len(k)):
            parts = q[i] * k[j] * scale * slope[j] / 2
            of_q[i] += parts
            of_k[j] += parts
    return of_q, of_k, of_v


def activation(function: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor) -> Tensor:
    """R_in = R_out (eq. 9), of which f(0)/f(x) stays with the constant f(0)."""
    y, at_zero = function(x), function(torch.zeros_like(x))
    return ratio((y - at_zero) * relevance, y)


def normalisation(relevance: Tensor) -> Tensor:
    """RMS and L2 norm: R_in = R_out (eq. 19)."""
    return relevance


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relevance: Tensor
) -> Tensor:
    """Of one vector: the standard deviation is a constant, then the ε rule (eqs. 8, 19)."""
    n = len(x)
    deviation = float(((x - x.mean()) ** 2).mean() + eps) ** 0.5
    centring = torch.eye(n, dtype=x.dtype) - torch.full((n, n), 1 / n, dtype=x.dtype)
    matrix = centring / deviation if weight is None else weight[:, None] * centring / deviation
    return linear(x, matrix, bias, relevance)[0]


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, relevance: Tensor
) -> Tensor:
    """As layer norm, over the channels and positions of each group; x is (channels, positions)."""
    channels, positions = x.shape
    size = channels // groups
    received = torch.zeros_like(x)
    for g in range(groups):
        span = slice(g * size, (g + 1) * size)
        w = weight[span].repeat_interleave(positions)
        b = bias[span].repeat_interleave(positions)
        of_group = layer_norm(x[span].reshape(-1), w, b, eps, relevance[span].reshape(-1))
        received[span] = of_group.reshape(size, positions)
    return received


def add(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """R_a = a R / (a + b), R_b = b R / (a + b): eq. 8 at a residual connection."""
    return share(a, a + b, relevance), share(b, a + b, relevance)


def winner(x: Tensor, relevance: Tensor) -> Tensor:
    """All of R to the largest element of one vector."""
    received = torch.zeros_like(x)
    received[int(x.argmax())] = relevance.sum()
    return received


def transformer_block(
    x: Tensor, parameters: Mapping[str, Tensor], heads: int, relevance: Tensor, *, cp: bool = False
) -> Tensor:
    """One pre-norm block, x + attention(rms(x)), then + gated MLP(rms(·)), of one sequence.

    The rules of each part in reverse, by hand; `cp` holds attention weights and gate constant.
    """
    p = parameters
    width = x.shape[1] // heads
    rms = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()]
    normed = rms[0] * p["norm1"]
    q, k, v = (normed @ p[name].T for name in ("q", "k", "v"))
    causal = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
    spans = [slice(h * width, (h + 1) * width) for h in range(heads)]
    scores = [q[:, s] @ k[:, s].T * width**-0.5 + causal for s in spans]
    mixed = torch.cat([torch.softmax(scores[h], -1) @ v[:, s] for h, s in enumerate(spans)], 1)
    attended = mixed @ p["o"].T
    middle = x + attended
    normed2 = middle / (middle.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm2"]
    gate, up = normed2 @ p["gate"].T, normed2 @ p["up"].T
    active = gate * torch.sigmoid(gate)
    hidden = active * up
    out = hidden @ p["down"].T

    def back(values: Tensor, weight: Tensor, of_output: Tensor) -> Tensor:
        return rows(lambda a, r: linear(a, weight, None, r)[0], values, of_output)

    of_middle, of_out = add(middle, out, relevance)
    of_hidden = back(hidden, p["down"], of_out)
    of_up = of_hidden if cp else product(2, of_hidden)
    of_normed2 = back(normed2, p["up"], of_up)
    if not cp:
        of_normed2 = of_normed2 + back(normed2, p["gate"], product(2, of_hidden))
    of_middle = of_middle + normalisation(of_normed2)
    of_x, of_attended = add(x, attended, of_middle)
    of_mixed = back(mixed, p["o"], of_attended)
    parts = [
        attention(
            q[:, s], k[:, s], v[:, s], of_mixed[:, s], width**-0.5, causal, constant_weights=cp
        )
        for s in spans
    ]
    of_q, of_k, of_v = (torch.cat([part[i] for part in parts], 1) for i in range(3))
    of_normed = back(normed, p["v"], of_v)
    if not cp:
        of_normed = of_normed + back(normed, p["q"], of_q) + back(normed, p["k"], of_k)
    return of_x + normalisation(of_normed)


def mixture_of_experts(
    x: Tensor, parameters: Mapping[str, Tensor], chosen: int, relevance: Tensor, *, cp: bool = False
) -> Tensor:
    """Mixtral's layer on one token: Σ weight_e · expert_e(x), as Achtibat et al. explain it.

    Half of each product to the weight, half to the expert (eq. 14); the weights by the ε rule of
    the router (eq. 8) and the softmax rule (eq. 13) over the chosen experts, whose renormalised
    probabilities are the softmax of their logits. `cp` holds weights and gates constant.
    """
    logits = parameters["router"] @ x
    best = logits.topk(chosen).indices
    weights = torch.softmax(logits[best], 0)
    hidden, said = [], []
    for e in best:
        gate, up = (parameters["gate_up"][e] @ x).chunk(2)
        hidden.append((gate, up, gate * torch.sigmoid(gate) * up))
        said.append(parameters["down"][e] @ hidden[-1][2])
    out = sum(w * y for w, y in zip(weights, said, strict=True))
    of_weights, of_x = torch.zeros_like(weights), torch.zeros_like(x)
    for i, e in enumerate(best):
        of_product = share(weights[i] * said[i], out, relevance)
        of_expert = of_product if cp else product(2, of_product)
        of_weights[i] = 0 if cp else product(2, of_product).sum()
        of_hidden, _ = linear(hidden[i][2], parameters["down"][e], None, of_expert)
        of_up = of_hidden if cp else product(2, of_hidden)
        of_gate = torch.zeros_like(of_hidden) if cp else product(2, of_hidden)
        of_both = torch.cat([of_gate, of_up])
        of_x = of_x + linear(x, parameters["gate_up"][e], None, of_both)[0]
    if cp:
        return of_x
    of_logits = softmax(logits[best], of_weights)
    return of_x + linear(x, parameters["router"][best], None, of_logits)[0]
