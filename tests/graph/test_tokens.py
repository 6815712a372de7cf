"""Relevance of token indices: through every move on the way to the table, through moves only."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import Function, rewrite
from torch import Tensor, fx, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import InputError
from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.graph.tokens import origin, table_and_indices

ROWS, WIDTH = 20, 4
IDS = torch.tensor([[3, 7, 1, 7, 5], [2, 2, 9, 4, 6], [8, 0, 3, 1, 1]])


class Lookup(nn.Module):
    """A table read at moved indices; every looked-up vector has a weight of its own."""

    def __init__(self, move: Callable[..., Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(ROWS, WIDTH, dtype=torch.float64)
        self.output = nn.Linear(WIDTH, 3, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.move = move

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) → (batch, 3)."""
        vectors = self.table(self.move(ids))
        return self.output(vectors.flatten(1, -2)).sum(1)

    def expected(self, ids: Tensor) -> Tensor:
        """Relevance of the first logit's sum of each index, found one index at a time.

        The model is linear in the looked-up vectors, so an index's relevance is what it adds.
        """
        places = torch.arange(ids.numel()).view(ids.shape) + ROWS
        moved = self.move(places)
        scores = self.table.weight @ self.output.weight[0]
        found = torch.zeros(ids.numel(), dtype=torch.float64)
        pairs = zip(moved.flatten().tolist(), self.move(ids).flatten().tolist(), strict=True)
        for place, index in pairs:
            if place >= ROWS:
                found[place - ROWS] += scores[index]
        return found.view(ids.shape)


def _prefixed(ids: Tensor) -> Tensor:
    return torch.cat([torch.full((ids.shape[0], 1), 11), ids], 1)


def _shifted_right(ids: Tensor) -> Tensor:
    """As decoders make their inputs from labels: in place, a start token in front."""
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    shifted[:, 0] = 2
    return shifted


def _masked_in_place(ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[ids == 1] = 12
    return ids


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda ids: ids,
    "view": lambda ids: ids.reshape(ids.shape[0], -1, 1),
    "transposed twice": lambda ids: ids.t().contiguous().t(),
    "slice": lambda ids: ids[:, 1:-1],
    "strided slice": lambda ids: ids[:, ::2],
    "select": lambda ids: ids[:, 2:3],
    "int32 and back": lambda ids: ids.to(torch.int32).long(),
    "unsqueezed": lambda ids: ids[:, None],
    "constant prefix": _prefixed,
    "twice": lambda ids: torch.cat([ids, ids[:, :2]], 1),
    "stacked": lambda ids: torch.stack([ids, ids], -1),
    "shifted right": _shifted_right,
    "roll": lambda ids: ids.roll(1, 1),
    "flip": lambda ids: ids.flip(1),
    "repeat": lambda ids: ids.repeat(1, 2),
    "expand": lambda ids: ids[:, None].expand(-1, 2, -1),
    "where": lambda ids: torch.where(torch.arange(ids.shape[1]) > 2, ids, 5),
    "where of two": lambda ids: torch.where(torch.arange(ids.shape[1]) > 2, ids, ids.flip(1)),
    "masked_fill": lambda ids: ids.masked_fill(torch.arange(ids.shape[1]) < 2, 5),
    "masked in place": _masked_in_place,
    "clamp": lambda ids: ids.clamp(min=0),
    "interleaved": lambda ids: ids.repeat_interleave(3, 0).view(-1, 3 * ids.shape[1]),
    "tiled": lambda ids: ids.tile(1, 2),
    "padded": lambda ids: nn.functional.pad(ids, (1, 2), value=4),
    "split": lambda ids: torch.cat(ids.split(2, 1)[1:], 1),
    "one chunk": lambda ids: ids.chunk(2, 1)[1],
    "unbound": lambda ids: torch.stack(ids.unbind(1)[::-1], 1),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    """Each index gets the relevance of the vectors that were looked up for it, at other sizes."""
    model = Lookup(MOVES[name]).eval()
    rewritten = rewrite(model, {"ids": IDS[:2]})
    relevance = _relevance(rewritten, {"ids": IDS})
    if name == "masked in place":
        expected = model.expected(IDS.masked_fill(IDS == 1, 0)) * (IDS != 1)
        assert_close(relevance["ids"], expected)
        return
    assert_close(relevance["ids"], model.expected(IDS))


def _relevance(rewritten: fx.GraphModule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Relevance of the sum of the first column of the outputs."""
    tape = Tape(rewritten)
    with torch.no_grad():
        (output,) = tape.run(*inputs.values())
        seed = torch.zeros_like(output)
        seed[..., 0] = 1
        node = rewritten.graph.output_node().args[0][0]  # type: ignore[index]
        return tape.reverse({node: seed}).relevance  # type: ignore[dict-item]


def test_shift_of_the_vocabulary() -> None:
    """Indices moved by a constant (an offset between tables) stay where they are."""
    model = Lookup(lambda ids: ids + 3).eval()
    relevance = _relevance(rewrite(model, {"ids": IDS[:2]}), {"ids": IDS})
    scores = (model.table.weight @ model.output.weight[0]).detach()
    assert_close(relevance["ids"], scores[IDS + 3])


def test_offset_of_each_codebook() -> None:
    """A constant tensor is added: each column has a part of the table of its own."""
    offsets = 2 * torch.arange(IDS.shape[1])
    model = Lookup(lambda ids: 2 * torch.arange(ids.shape[1]) + ids).eval()
    relevance = _relevance(rewrite(model, {"ids": IDS[:2]}), {"ids": IDS})
    scores = (model.table.weight @ model.output.weight[0]).detach()
    assert_close(relevance["ids"], scores[IDS + offsets])


def test_offsets_that_repeat_the_indices() -> None:
    """Every index is looked up at each of two offsets; what both say adds up."""
    offsets = torch.tensor([0, 3])[:, None, None]
    model = Lookup(lambda ids: (ids - offsets + 3).transpose(0, 1)).eval()
    relevance = _relevance(rewrite(model, {"ids": IDS[:2]}), {"ids": IDS})
    scores = (model.table.weight @ model.output.weight[0]).detach()
    assert_close(relevance["ids"], scores[IDS + 3] + scores[IDS])


TABLE = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Parameter(nn.Module):
    """A table that is a bare parameter, read by a function."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(TABLE)
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) → (batch, length, 3)."""
        return self.read(self.table, ids)


@pytest.mark.parametrize(
    "read",
    [
        lambda table, ids: table[ids],
        lambda table, ids: table.index_select(0, ids.flatten()).view(*ids.shape, 3),
        lambda table, ids: nn.functional.embedding(ids, table),
        lambda table, ids: nn.functional.embedding(ids, (2 * table).clone() / 2),
    ],
    ids=["index", "index_select", "embedding", "a computed table"],
)
def test_lookups(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    rewritten = rewrite(Parameter(read), {"ids": IDS[:2]})
    assert_close(_relevance(rewritten, {"ids": IDS})["ids"], TABLE[:, 0][IDS])


class Pairs(nn.Module):
    """Patches at (row, column): each coordinate looks up a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.stack([TABLE, TABLE.flip(0)]))

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """(batch, length, 3) and (batch, length, 2) → (batch, 3)."""
        columns = nn.functional.embedding(places[..., 0], self.table[0])
        rows = nn.functional.embedding(places[..., 1], self.table[1])
        return (patches + columns + rows).sum(1)


def test_indices_of_any_shape_have_relevance_of_theirs() -> None:
    """Indices that are no rows of tokens are explained like any other input, in their shape."""
    places = torch.stack([IDS, IDS + 1], -1)
    inputs = {"patches": torch.randn(3, 5, 3, dtype=torch.float64), "places": places}
    explanation = attnlrp_fx.compile(Pairs().eval(), inputs, backend="eager", target=0)(inputs)
    expected = torch.stack([TABLE[:, 0][IDS], TABLE.flip(0)[:, 0][IDS + 1]], -1)
    assert_close(explanation.relevance["places"], expected)
    assert "places" in repr(explanation)


def test_tokens_of_another_number_of_rows() -> None:
    """A model may give several rows of outputs for each row of tokens."""
    model = Lookup(lambda ids: ids.repeat_interleave(2, 0)).eval()
    explanation = attnlrp_fx.compile(model, {"ids": IDS[:2]}, backend="eager", target=0)(ids=IDS)
    assert len(explanation) == 6
    assert_close(explanation.relevance["ids"], 2 * Lookup(lambda ids: ids).expected(IDS))


@pytest.mark.parametrize("name", ["masked in place", "masked_fill", "where", "shifted right"])
def test_the_ledger_knows_what_the_models_own_indices_keep(name: str) -> None:
    explainer = attnlrp_fx.compile(
        Lookup(MOVES[name]).eval(), {"ids": IDS[:2]}, backend="eager", target=0, audit=True
    )
    ledger = explainer(ids=IDS).ledger
    assert ledger is not None
    assert abs(ledger.residual) < 1e-12 * max(1, abs(ledger.target))


class TwoTables(nn.Module):
    """One index, two tables: hashed or factorised embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(ROWS, 3, dtype=torch.float64)
        self.b = nn.Embedding(ROWS, 3, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) → (batch, length, 3)."""
        return self.a(ids) + 2 * self.b(ids.flip(1))


def test_two_tables() -> None:
    """What both look-ups say about an index adds up."""
    model = TwoTables().eval()
    relevance = _relevance(rewrite(model, {"ids": IDS[:2]}), {"ids": IDS})
    expected = model.a.weight[IDS, 0] + 2 * model.b.weight[IDS, 0]
    assert_close(relevance["ids"], expected.detach())


class Roberta(nn.Module):
    """Positions are counted from the mask of the ids, as roberta does; types come with the call."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, 3, dtype=torch.float64)
        self.positions = nn.Embedding(ROWS, 3, dtype=torch.float64)
        self.types = nn.Embedding(2, 3, dtype=torch.float64)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """(batch, length) twice → (batch, 3)."""
        mask = input_ids.ne(1).int()
        positions = (torch.cumsum(mask, 1).type_as(mask) * mask).long() + 1
        found = self.words(input_ids) + self.positions(positions) + self.types(token_type_ids)
        return found.sum(1)


def test_computed_positions_are_constants() -> None:
    """Words and types are explained; positions counted from a mask absorb what is theirs."""
    model = Roberta().eval()
    types = (IDS > 4).long()
    rewritten = rewrite(model, {"input_ids": IDS[:2], "token_type_ids": types[:2]})
    relevance = _relevance(rewritten, {"input_ids": IDS, "token_type_ids": types})
    assert_close(relevance["input_ids"], model.words.weight[IDS, 0].detach())
    assert_close(relevance["token_type_ids"], model.types.weight[types, 0].detach())


def test_only_what_is_asked_for() -> None:
    model = Roberta().eval()
    inputs = {"input_ids": IDS[:2], "token_type_ids": (IDS[:2] > 4).long()}
    rewritten = rewrite(model, inputs, explain=["token_type_ids"])
    assert list(_relevance(rewritten, inputs)) == ["token_type_ids"]


@pytest.mark.parametrize(
    ("indices", "found"),
    [
        (lambda ids, mask: ids, "ids"),
        (lambda ids, mask: ids.masked_fill(mask, 3), "ids"),
        (lambda ids, mask: torch.where(mask, ids, 3), "ids"),
        (lambda ids, mask: torch.where(mask, 3, ids), "ids"),
        (lambda ids, mask: ids.view(-1)[2:].clamp(0, 9) + 1, "ids"),
        (lambda ids, mask: ids * 2, None),
        (lambda ids, mask: ids + ids, None),
        (lambda ids, mask: ids + mask, None),
        (lambda ids, mask: ids + torch.arange(4), "ids"),
        (lambda ids, mask: torch.arange(4) - ids + 9, None),
        (lambda ids, mask: ids + torch.zeros_like(ids).copy_(mask), None),
        (lambda ids, mask: ids.repeat_interleave(2, 1), "ids"),
        (lambda ids, mask: ids.split(2, 1)[1], "ids"),
        (lambda ids, mask: ids.sort(1).values, None),
        (lambda ids, mask: ids.cumsum(1), None),
        (lambda ids, mask: mask.long(), "mask"),
        (lambda ids, mask: torch.cat([ids, mask.long()], 1), None),
        (lambda ids, mask: torch.arange(4).expand(2, 4), None),
        (lambda ids, mask: ids.argsort(1), None),
    ],
)
def test_origin(indices: Callable[..., Tensor], found: str | None) -> None:
    """Moved indices lead to one input; computed or mixed ones to none."""

    def function(ids: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.embedding(indices(ids, mask), torch.zeros(ROWS, 2))

    inputs = {"ids": IDS[:2, :4], "mask": IDS[:2, :4] > 3}
    graph = capture(Function(function).eval(), inputs).graph_module.graph
    (lookup,) = [n for n in graph.nodes if n.op == "call_function" and table_and_indices(n)]
    looked_up: Any = table_and_indices(lookup)
    source = origin(looked_up[1])
    assert (None if source is None else source.target) == found


def test_nothing_to_explain() -> None:
    """Indices that are computed leave nothing; the error says what could be done."""
    with pytest.raises(InputError, match="nothing to explain"):
        rewrite(Lookup(lambda ids: ids * 2).eval(), {"ids": IDS[:2]})


def test_public_api() -> None:
    """Through the compiled program: relevance is (batch, length), none for what is shifted out."""
    model = Lookup(_shifted_right).eval()
    explainer = attnlrp_fx.compile(model, {"ids": IDS[:2]}, backend="eager", target=0)
    relevance = explainer(ids=IDS).relevance["ids"]
    assert_close(relevance, model.expected(IDS))
    assert not relevance[:, -1].any()
