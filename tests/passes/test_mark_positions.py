"""What positions contribute is added to their tokens: learned, sinusoidal and rotary ones."""

import pytest
import torch
from models import BY_NAME, Case, token_ids
from rewriting import captured, run, text
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import COMPOSITES, InputError, Logit
from attnlrp_fx.passes import NORMALISE, PassContext, mark_positions, mark_sources, run_passes

WORDS, WIDTH, LONGEST = 61, 8, 20
MARK = (*NORMALISE, mark_sources, mark_positions)


def both(case: Case, composite="attnlrp"):
    """Explanations with positions held constant, and with positions explained."""
    model, inputs = case.model(torch.float64), case.example(3, 5, torch.float64)
    given = case.example(2, 7, torch.float64)
    return [
        attnlrp_fx.compile(
            model, inputs, composite=composite, backend="eager", audit=True, positions=positions
        )(**given)
        for positions in (False, True)
    ]


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bart"])
def test_the_share_of_learned_positions(name):
    """It is Gradient×Input of what the table of positions returned, token by token."""
    case = BY_NAME[name]
    constant, explained = both(case, "gradient")
    model, inputs = case.model(torch.float64), case.example(2, 7, torch.float64)
    found: list[Tensor] = []

    def watch(module, args, output):
        rows = output.expand(2, *output.shape[-2:]).detach().clone().requires_grad_()
        found.append(rows)
        return rows

    for part, module in model.named_modules():
        if isinstance(module, nn.Embedding) and ("position" in part or "wpe" in part):
            module.register_forward_hook(watch)
    case.value(model(**inputs), inputs).sum().backward()
    tokens = [n for n in constant.relevance if n.endswith("input_ids")]
    assert len(found) == len(tokens)
    for input_name, rows in zip(tokens, found, strict=True):
        share = explained.relevance[input_name] - constant.relevance[input_name]
        torch.testing.assert_close(share, (rows * rows.grad).sum(-1), rtol=1e-9, atol=1e-12)
        assert share.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bert", "bart"])
def test_the_ledger_closes(name):
    for explanation in both(BY_NAME[name]):
        scale = float(explanation.target_value.abs().sum())
        assert abs(explanation.ledger.residual) < 1e-9 * scale


class Rotary(nn.Module):
    """One attention score with rotary positions: q · k, both turned by their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.query, self.key = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def tables(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length).to(like.dtype)[:, None] / torch.arange(1, WIDTH // 2 + 1)
        angles = torch.cat([angles, angles], -1)[None]
        return angles.cos(), angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        cos, sin = self.tables(ids.shape[1], x)
        q, k = self.turned(self.query(x), cos, sin), self.turned(self.key(x), cos, sin)
        return q[:, -1] @ k[0].T


def test_the_share_of_rotary_positions():
    """Half of what each product with a table gets, by the uniform rule: straight from eq. 14."""
    torch.manual_seed(0)
    model = Rotary().double().eval()
    ids = token_ids(1, 6)
    example = {"ids": token_ids(1, 5)}
    context = COMPOSITES["attnlrp"]
    constant, explained = (
        attnlrp_fx.compile(
            model, example, composite=context, backend="eager", positions=p, target=Logit(2)
        )(ids=ids)
        for p in (False, True)
    )
    x = model.words(ids).detach()
    cos, sin = model.tables(6, x)
    q, k = model.query(x), model.key(x)
    swap = [torch.cat([-v.chunk(2, -1)[1], v.chunk(2, -1)[0]], -1) for v in (q, k)]
    turned = [q * cos + swap[0] * sin, k * cos + swap[1] * sin]
    expected = torch.zeros(1, 6, dtype=torch.float64)
    terms = turned[0][0, 5] * turned[1][0, 2] / 2  # the score, half to the query, half to the key
    for i, (position, value) in enumerate(((5, q), (2, k))):
        of_cos = (value * cos)[0, position] / turned[i][0, position] * terms
        of_sin = (swap[i] * sin)[0, position] / turned[i][0, position] * terms
        expected[0, position] += (of_cos.sum() + of_sin.sum()) / 2
    share = explained.relevance["ids"] - constant.relevance["ids"] / 2
    torch.testing.assert_close(share, expected.detach(), rtol=1e-9, atol=1e-12)
    total = explained.relevance["ids"].sum()
    torch.testing.assert_close(total, explained.target_value[0], rtol=1e-12, atol=0)


class Sinusoidal(nn.Module):
    """Positions from a buffer, cut to the length, and a type of tokens, the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(WORDS, WIDTH), nn.Embedding(2, WIDTH)
        self.register_buffer("positions", torch.randn(1, LONGEST, WIDTH))
        self.register_buffer("type_ids", torch.zeros(1, LONGEST, dtype=torch.int64))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.words(ids) + self.positions[:, :length]
        return self.head((x + self.types(self.type_ids[:, :length])).mean(1))


def test_golden():
    """The buffer is a position; the type of a token is not, though it has the length."""
    graph = captured(Sinusoidal(), {"ids": token_ids(2, 7)})
    run_passes(graph, PassContext(positions=True), MARK)
    assert (
        text(graph)
        == """\
embedding = aten.embedding(words_weight, ids)
source = ops.source(embedding, name='ids', ids=ids)
slice = aten.slice(positions, 1, 0, 7)
expand_as = aten.expand_as(slice, source)
source_1 = ops.source(expand_as, name='ids', ids=ids, keep=[0, 1])
add = aten.add(source, source_1)
slice_1 = aten.slice(type_ids, 1, 0, 7)
embedding_1 = aten.embedding(types_weight, slice_1)
add_1 = aten.add(add, embedding_1)
mean = aten.mean(add_1, [1])
linear = aten.linear(mean, head_weight, head_bias)
return [linear]"""
    )


def test_marking_changes_nothing_that_is_computed():
    given = {"ids": token_ids(2, 7)}
    graph = captured(Sinusoidal(), given)
    was = run(graph, given)
    run_passes(graph, PassContext(positions=True), MARK)
    torch.testing.assert_close(run(graph, given), was, rtol=0, atol=0)


def test_without_the_option_nothing_is_marked():
    graph = captured(Sinusoidal(), {"ids": token_ids(2, 7)})
    result = run_passes(graph, PassContext(), MARK)[-1]
    assert (result.name, result.changes) == ("mark_positions", 0)


def test_twice_is_once():
    graph = captured(Sinusoidal(), {"ids": token_ids(2, 7)})
    run_passes(graph, PassContext(positions=True), MARK)
    was = text(graph)
    (again,) = run_passes(graph, PassContext(positions=True), (mark_positions,))
    assert again.changes == 0
    assert text(graph) == was


@pytest.mark.parametrize("name", ["t5", "mlp"])
def test_no_positions_is_an_error(name):
    """T5 has biases between pairs, an MLP nothing at all."""
    case = BY_NAME[name]
    with pytest.raises(InputError, match="no positions to explain") as raised:
        attnlrp_fx.compile(case.model(), case.example(), backend="eager", positions=True)
    assert "positions=True" in raised.value.remedy
