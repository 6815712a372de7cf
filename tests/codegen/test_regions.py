"""Regions: where a graph is cut, what is told apart, and that nothing changes by it."""

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Explain
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    BY_NAME,
    ENCODER,
    GROUPED,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    PAD,
    VOCABULARY,
    Case,
    Inputs,
    drawn,
    highest_last,
    highest_last_logit,
    highest_logit,
    randomised,
    seq2seq_tokens,
    tokens,
    transformers_model,
)
from references import Oracle, read_tape
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import attnlrp_fx
from attnlrp_fx import (
    COMPOSITES,
    ExplainableGraphModule,
    Explanation,
    Flat,
    Logit,
    Match,
    Pass,
    WSquare,
    compiler,
)
from attnlrp_fx.calculus.tape import Channel, Tape
from attnlrp_fx.capture import capture
from attnlrp_fx.codegen import regions, sizes
from attnlrp_fx.codegen.attributes import Attributes
from attnlrp_fx.codegen.regions import SHORTEST, Region, computed, regions_of
from attnlrp_fx.codegen.rewriting import rewrite
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.passes import PIPELINE, PassContext

F64 = torch.float64


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repetitions are enough, so that small models do."""
    monkeypatch.setattr(regions, "LEAST_SAVED", 24)


class Block(nn.Module):
    """x → x + W₃(gelu(W₁ norm x) · silu(W₂ norm x)), times a number of its own."""

    def __init__(self, inner: int = 8, scale: float = 0.7) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.gate, self.down = (
            nn.Linear(6, inner),
            nn.Linear(6, inner),
            nn.Linear(inner, 6),
        )
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = nn.functional.gelu(self.up(y)) * nn.functional.silu(self.gate(y))
        y = self.down(torch.tanh(y * self.scale) + y)
        return x + torch.sigmoid(y) * y + torch.relu(y * 0.5)


class Plain(nn.Module):
    """Another block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.second(torch.tanh(self.first(x))))
        y = torch.relu(y) + torch.sigmoid(y) * 0.3
        return x - nn.functional.softplus(y) - torch.tanh(y * 2) + torch.sigmoid(y * 3)


class Chain(Plain):
    """A block without a residual stream, elementwise but for its layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(nn.functional.softplus(self.first(x)) + 0.5)
        x = torch.exp(torch.tanh(self.second(x) - 0.1) * 0.7) + 0.2
        return nn.functional.softplus(torch.sin(x) * 1.3) - 0.3


class Stack(nn.Module):
    """Blocks between a stem and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(*blocks: nn.Module) -> nn.Module:
    return randomised(lambda: Stack(*blocks)).double().eval()


def compiled(model: nn.Module, inputs: Any, **options: Any) -> ExplainableGraphModule:
    return attnlrp_fx.compile(model, inputs, backend="eager", **options)


def pair(
    model: nn.Module, inputs: Any, **options: Any
) -> tuple[ExplainableGraphModule, ExplainableGraphModule]:
    """With regions and without, from one capture."""
    cut = compiled(model, inputs, **options)
    with mock.patch.object(compiler, "capture", return_value=cut._running.convention):
        return cut, compiled(model, inputs, regions=False, **options)


def pieces(explainer: ExplainableGraphModule) -> list[Region]:
    return regions_of(explainer.rewritten, explainer._running.attributes.values())


def counts(explainer: ExplainableGraphModule) -> tuple[int, int]:
    """How many regions, and how many programs."""
    compilation = explainer.report().compilations[-1]
    return compilation.regions, compilation.distinct


def channels(explainer: ExplainableGraphModule) -> set[Channel]:
    """What crosses boundaries in reverse."""
    (found,) = explainer._running.programs.compiled.values()
    return {seed.channel for program in found.schedule.programs for seed in program.seeds}


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def same(cut: Explanation, flat: Explanation) -> None:
    """The same outputs, relevance and ledger."""
    outputs = [torch.utils._pytree.tree_leaves(e.outputs) for e in (cut, flat)]
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert cut.relevance.keys() == flat.relevance.keys()
    for name, relevance in cut.relevance.items():
        assert relative(relevance, flat.relevance[name]) <= 1e-12, name
    assert (cut.ledger is None) == (flat.ledger is None)
    if cut.ledger is not None:
        assert [e.node for e in cut.ledger.entries] == [e.node for e in flat.ledger.entries]
        size = max(1.0, *(abs(e.received) for e in flat.ledger.entries))
        for a, b in zip(cut.ledger.entries, flat.ledger.entries, strict=True):
            found, expected = [(e.received, e.passed, e.absorbed) for e in (a, b)]
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-12 * size), a.node


# Real models: the tape on real tensors knows nothing of regions


def _case(
    module: str,
    name: str,
    config: dict[str, Any],
    inputs: Callable[[int, int], Inputs],
    **more: Any,
) -> Case:
    build = functools.partial(transformers_model, module, name, **{**config, **more})
    value = highest_logit if "Classification" in name else highest_last_logit
    return Case(f"{module}-deep", build, inputs, value)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INTERMEDIATE, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def _images(size: int) -> Callable[[int, int], Inputs]:
    return lambda batch, length: {"pixel_values": drawn(batch, 3, size, size)}


DEEP = (
    _case("llama", "LlamaForCausalLM", GROUPED, tokens, num_hidden_layers=3),
    _case("bert", "BertForSequenceClassification", ENCODER, tokens, num_hidden_layers=4),
    _case(
        "mixtral",
        "MixtralForCausalLM",
        GROUPED,
        tokens,
        num_hidden_layers=3,
        num_local_experts=2,
        experts_implementation="eager",
    ),
    _case(
        "gemma3",
        "Gemma3ForCausalLM",
        GROUPED,
        tokens,
        num_hidden_layers=3,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    _case(
        "t5",
        "T5ForConditionalGeneration",
        {},
        seq2seq_tokens,
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=INTERMEDIATE,
        num_layers=3,
        num_heads=HEADS,
        decoder_start_token_id=PAD,
    ),
    _case(
        "vit",
        "ViTForImageClassification",
        {},
        _images(12),
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        image_size=12,
        patch_size=4,
    ),
    _case(
        "swin",
        "SwinForImageClassification",
        {},
        _images(16),
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[6],
        num_heads=[2],
        window_size=4,
    ),
    _case(
        "mamba",
        "MambaForCausalLM",
        {},
        lambda batch, length: {"input_ids": tokens(batch, 3)["input_ids"]},
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        state_size=4,
        conv_kernel=3,
        expand=2,
        time_step_rank=4,
        use_cache=False,
    ),
    Case("encoder-deep", _encoder, lambda b, n: {"src": drawn(b, n, HIDDEN)}, highest_last),
)


def padded(inputs: Inputs) -> Inputs:
    """Where there is a mask, the last tokens of the second row are padding."""
    mask = inputs.get("attention_mask")
    if mask is not None and len(mask) > 1:
        mask[1, -2:] = 0
    return inputs


def on_tape(explainer: ExplainableGraphModule, inputs: Inputs, index: int) -> Oracle:
    """Relevance of a logit of the last position, without a tracer and without programs."""
    (found,) = explainer._running.programs.compiled.values()
    (output,) = found.schedule.seeded
    with torch.no_grad():
        tape = Tape(explainer.rewritten)
        flat = tape.run(*inputs.values())
        seed = torch.zeros_like(flat[output])
        (seed[:, -1] if seed.dim() == 3 else seed)[:, index] = 1
    return read_tape(tape, {outputs_of(explainer.rewritten.graph)[output]: seed})


@pytest.mark.parametrize("case", DEEP[1:], ids=str)
def test_real_models(case: Case, explain: Explain) -> None:
    """Relevance is the tape's, at other sizes than captured, with padding."""
    explainer = explain(case, audit=False)
    regions, distinct = counts(explainer)
    assert distinct < regions
    inputs = padded(case.example(4, 9, F64))
    oracle = on_tape(explainer, inputs, 1)
    explanation = explainer(**inputs, target=case_target(case))
    assert explanation.relevance.keys() == oracle.relevance.keys()
    for name, relevance in explanation.relevance.items():
        assert relative(relevance, oracle.relevance[name]) <= 1e-12, name
    kinds = {served.unpadded for served in explainer._running.programs.compiled}
    assert explainer.compilations == len(kinds)  # one without padding, and one with, if need be


def test_inductor() -> None:
    """What regions hand on, sizes too, compiles; another batch and length compile nothing more."""
    case = DEEP[0]
    model = case.model()
    eager, explainer = (
        attnlrp_fx.compile(model, case.example(3, 5), backend=backend)
        for backend in ("eager", "inductor")
    )
    assert counts(explainer)[0] > 1
    for rows, length in ((3, 5), (2, 8)):
        inputs = case.example(rows, length)
        found, expected = (one(**inputs).relevance["input_ids"] for one in (explainer, eager))
        assert relative(found, expected) <= 1e-5
    assert explainer.compilations == 1


def case_target(case: Case) -> Logit:
    """What `on_tape` explains."""
    return Logit(1, position=None if case.value is highest_logit else -1)


def test_the_ledger_is_the_tapes(explain: Explain) -> None:
    """Every node's line, whichever region the node is in."""
    case = DEEP[0]
    explainer = explain(case)
    assert counts(explainer)[1] < counts(explainer)[0]
    for batch, length in [(1, 1), (3, 8)]:
        inputs = padded(case.example(batch, length, F64))
        oracle = on_tape(explainer, inputs, 1)
        explanation = explainer(**inputs, target=case_target(case))
        found = explanation.relevance["input_ids"]
        assert relative(found, oracle.relevance["input_ids"]) <= 1e-12
        size = max(1.0, *(float(sums.abs().max()) for sums in oracle.sums.values()))
        entries = {entry.node: entry for entry in explanation.ledger.entries}
        for node, expected in oracle.sums.items():
            entry = entries[node]
            found = torch.tensor([entry.received, entry.passed, entry.absorbed], dtype=F64)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12 * size)
        scale = float(explanation.target_value.abs().sum())
        assert abs(explanation.ledger.residual) <= 1e-9 * scale


def test_decoders_add_up_at_the_encoder(explain: Explain) -> None:
    """Every block of a decoder reads what the encoder made: one value, several regions."""
    explainer = explain(next(case for case in DEEP if case.name == "t5-deep"), audit=False)
    readers = [{*region.inputs} for region in pieces(explainer)]
    assert any(sum(node in read for read in readers) >= 3 for node in set().union(*readers))


def test_positions() -> None:
    case = BY_NAME["gpt2"]
    model = case.model(F64)
    model.transformer.h = nn.ModuleList([model.transformer.h[i % 2] for i in range(3)])
    model.config.num_hidden_layers = 3
    cut, flat = pair(model, case.example(3, 5), positions=True)
    regions, distinct = counts(cut)
    assert distinct < regions
    for size in [(1, 3), (4, 9)]:
        inputs = padded(case.example(*size))
        same(cut(**inputs), flat(**inputs))


# Small models: the flat program under the same options


X = torch.linspace(-2, 2, 12, dtype=F64).reshape(3, 4)
ANOTHER = torch.linspace(1, -3, 20, dtype=F64).reshape(5, 4).sin()

RELEVANCE = COMPOSITES["attnlrp"].with_rules(
    (Match(module="blocks.*.first"), Flat()),
    (Match(module="blocks.*.second"), WSquare()),
    (Match(kind="activation"), Pass()),
)
OPTIONS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "audit": {"audit": True},
    "gamma": {"composite": "attnlrp-vision", "audit": True},
    "kept": {"composite": "attnlrp-vision", "derived_weights": "keep"},
    "gradient": {"composite": "gradient"},
}


@functools.cache
def small() -> tuple[nn.Module, capture.Captured]:
    """A model that is captured once."""
    model = stack(*(Block() for _ in range(3)))
    return model, capture.capture(model, X)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_small_models(options: dict[str, Any]) -> None:
    model, captured = small()
    with mock.patch.object(compiler, "capture", return_value=captured):
        cut, flat = pair(model, X, **options)
    assert counts(cut)[1] < counts(cut)[0]
    assert counts(flat) == (1, 1)
    same(cut(ANOTHER, check_finite=True), flat(ANOTHER))
    same(cut(X[:1]), flat(X[:1]))


def test_relevance_without_a_factor_crosses() -> None:
    model = stack(*(Chain() for _ in range(6)))
    with mock.patch.multiple(regions, SHORTEST=4, LEAST_SAVED=10):
        cut, flat = pair(model, X, composite=RELEVANCE, audit=True, target=1)
    assert counts(cut)[1] < counts(cut)[0]
    assert Channel.RELEVANCE in channels(cut)
    for x in (X, ANOTHER):
        same(cut(x), flat(x))


class Returning(Stack):
    """Returns more than its head."""

    def __init__(self, what: str, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        hidden, given = [self.stem(x)], x
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        logits = self.head(hidden[-1])
        if self.what == "hidden":
            return {"logits": logits, "hidden": hidden}
        return logits, given, self.stem.weight, None, logits, given.shape[0], hidden[3]


def returning(what: str) -> nn.Module:
    return randomised(lambda: Returning(what, *(Block() for _ in range(3)))).double().eval()


def hidden_and_logits(outputs: Any) -> Tensor:
    """Reads values that are handed on and returned."""
    hidden = outputs["hidden"]
    return hidden[2].square().sum(-1) + hidden[-1][:, 1] * outputs["logits"][:, 0]


def test_hidden_states_are_targets() -> None:
    model = returning("hidden")
    cut, flat = pair(model, X, target=hidden_and_logits, audit=True)
    assert counts(cut)[1] < counts(cut)[0]
    same(cut(ANOTHER), flat(ANOTHER))
    leaf = X.clone().requires_grad_()
    value = hidden_and_logits(model(leaf))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    law = cut.with_composite("gradient")
    assert relative(law(X).relevance["x"], X * gradient) <= 1e-12


def test_inputs_parameters_and_constants_are_returned() -> None:
    model = returning("everything")
    cut, flat = pair(model, X, target=lambda o: o[0][:, 1] + o[4][:, 0] + o[6].sum(-1))
    assert counts(cut)[1] < counts(cut)[0]
    for x in (X, ANOTHER):
        explanation, expected = cut(x), model(x)
        same(explanation, flat(x))
        assert torch.equal(explanation.outputs[1], x)
        assert explanation.outputs[2] is model.stem.weight
        assert explanation.outputs[3] is None
        torch.testing.assert_close(explanation.outputs[4], expected[4], rtol=0, atol=1e-13)
        assert explanation.outputs[5] == len(x)


# Where it is cut


def cut(model: nn.Module, x: Tensor = X) -> list[Region]:
    """The regions of a model, with what must hold of any."""
    captured = capture.capture(model, x)
    context = PassContext(None, COMPOSITES["attnlrp"], "error", False)
    graph_module = rewrite(captured, context, PIPELINE).graph_module
    attributes = Attributes(model, graph_module).values()
    found = regions_of(graph_module, attributes)
    assert [node for region in found for node in region.nodes] == computed(graph_module.graph)
    known = set(graph_module.graph.find_nodes(op="placeholder"))
    for region in found:
        assert {*region.inputs} <= known
        for node in region.inputs:
            value = node.meta["val"]
            assert isinstance(value, Tensor | torch.SymInt)
            assert not free_unbacked_symbols(value)
        known |= {*region.outputs}
    (whole,) = regions_of(graph_module, attributes, cut=False)
    assert whole.nodes == tuple(computed(graph_module.graph))
    return found


def pattern(found: list[Region]) -> list[int]:
    """Regions that are alike have one number."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(region.signature, len(numbers)) for region in found]


def longest(numbers: list[int]) -> int:
    """How often the most frequent program runs."""
    return max(map(numbers.count, numbers))


def test_programs_do_not_depend_on_depth() -> None:
    found = [pattern(cut(stack(*(Block() for _ in range(n))))) for n in (4, 8, 16)]
    assert [len(set(numbers)) for numbers in found] == [len(set(found[0]))] * 3
    assert [longest(numbers) for numbers in found] in ([4, 8, 16], [3, 7, 15])


def test_one_residual_stream_crosses() -> None:
    blocks = [r for r in cut(stack(*(Block() for _ in range(8)))) if len(r.nodes) >= SHORTEST]
    assert all(len(region.inputs) == len(region.outputs) == 1 for region in blocks)


@pytest.mark.parametrize(
    "blocks",
    [
        lambda: [Block(), Plain()],
        lambda: [Block() for _ in range(2)],
        lambda: [Block(scale=1.0 + i) for i in range(8)],
        lambda: [Block(inner=3 + i) for i in range(8)],
    ],
    ids=["unlike", "few", "constants", "sizes"],
)
def test_one_region_where_nothing_repeats(blocks: Callable[[], list[nn.Module]]) -> None:
    assert len(cut(stack(*blocks()))) == 1


@pytest.mark.parametrize("kind", ["constants", "sizes", "modules"])
def test_alternating_blocks(kind: str) -> None:
    """A B A B …: both are found, and told apart."""
    odd = {
        "constants": lambda: Block(scale=0.5),
        "sizes": lambda: Block(inner=5),
        "modules": lambda: Plain(),
    }[kind]
    numbers = pattern(cut(stack(*(odd() if i % 2 else Block() for i in range(10)))))
    assert longest(numbers) >= 4
    assert len(numbers) >= 5


def test_blocks_within_blocks() -> None:
    """A A A A A A B twice: A is one program."""
    blocks = [Plain() if i % 7 == 6 else Block() for i in range(14)]
    numbers = pattern(cut(stack(*blocks)))
    assert longest(numbers) >= 10


class Wired(Stack):
    """Every third block starts from the stem again; skips join late blocks with early ones."""

    def __init__(self, how: str, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        kept = []
        for i, block in enumerate(self.blocks):
            if self.how == "restart":
                x = block(first if i % 3 == 2 else x) + x
            elif i < len(self.blocks) // 2:
                kept.append(x)
                x = block(x)
            else:
                x = block(x) + kept.pop()
        return self.head(x)


@pytest.mark.parametrize("how", ["restart", "skips"])
def test_wiring(how: str) -> None:
    """Nodes that look alike and are connected otherwise; values that jump over regions."""
    model = randomised(lambda: Wired(how, *(Block() for _ in range(6)))).double().eval()
    explainer, flat = pair(model, X)
    found = cut(model)
    assert 1 < len(set(pattern(found))) < len(found)
    same(explainer(ANOTHER), flat(ANOTHER))


def test_a_module_called_often() -> None:
    """All regions read the same parameters."""
    block = Block()
    model = stack(*[block] * 4)
    explainer, flat = pair(model, X)
    found = [region for region in pieces(explainer) if len(region.nodes) >= SHORTEST]
    assert len({region.attributes for region in found}) < len(found)
    assert counts(explainer)[1] < counts(explainer)[0]
    same(explainer(ANOTHER), flat(ANOTHER))


class Tied(nn.Module):
    """Embedding and head are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_parameter_of_two_regions() -> None:
    model = randomised(Tied).double().eval()
    ids = torch.arange(10).reshape(2, 5) % 9
    explainer, flat = pair(model, ids)
    assert counts(explainer)[1] < counts(explainer)[0]
    same(explainer(ids[:1, :3]), flat(ids[:1, :3]))
    with torch.no_grad():
        model.embed.weight.mul_(1.5)
    same(explainer(ids), flat(ids))
    torch.testing.assert_close(explainer(ids).outputs, model(ids))


def test_a_block_tied_in_itself() -> None:
    """Two projections of one block are the same matrix: wired otherwise than the other blocks."""
    model = stack(*(Block() for _ in range(5)))
    for i in (1, 4):
        model.blocks[i].gate.weight = model.blocks[i].up.weight
    explainer, flat = pair(model, X)
    assert counts(explainer)[1] < counts(explainer)[0]
    same(explainer(ANOTHER), flat(ANOTHER))


class Selecting(nn.Module):
    """Blocks that select rows by value, in groups; some read what an earlier one selected."""

    def __init__(self, late: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(12))
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            y = layer(x)
            selected = y[y.sum(-1) > 0]
            read = before if i in self.late else selected
            z = norm(torch.tanh(y) + read.sum(0) * 0.01 + selected.sum(0) * 0.01)
            z = z * torch.sigmoid(z) * 0.5
            z = torch.relu(z) + z
            z = z - torch.tanh(z * 2)
            z = nn.functional.gelu(z) * 0.3 + z
            x = x + z - torch.sigmoid(z * 1.5)
            if i % 4 == 3:
                x = nn.functional.silu(x) * torch.tanh(x)
            before = selected
        return x


@pytest.mark.parametrize("late", [(), (5,), (9, 10)], ids=str)
def test_what_cannot_cross_does_not(late: tuple[int, ...]) -> None:
    """A size that is not known beforehand, also where only a later copy of a block hands it on."""
    found = cut(randomised(lambda: Selecting(late)).double().eval())  # and what `cut` asserts
    assert len(set(pattern(found))) < len(found)


class Counting(nn.Module):
    """A number is made between two stacks, and read by the blocks of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block() for _ in range(3))
        self.second = nn.ModuleList(Plain() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        for block in self.first:
            x = block(x)
        twice = length * 2
        for block in self.second:
            x = block(x) / twice
        return x.mean(1)


def test_sizes_are_made_beside_tensors() -> None:
    """No region makes sizes alone: there would be no tensor to trace."""
    model = randomised(Counting).double().eval()
    x = torch.linspace(-1, 1, 60, dtype=F64).reshape(2, 5, 6)
    explainer = compiled(model, x)
    assert counts(explainer)[1] < counts(explainer)[0]
    assert any(isinstance(n.meta["val"], torch.SymInt) for r in pieces(explainer) for n in r.inputs)
    found = explainer(x[:, :3], target=1).relevance["x"]
    assert relative(found, on_tape(explainer, {"x": x[:, :3]}, 1).relevance["x"]) <= 1e-12


class Listening(nn.Module):
    """Blocks, whose layers fold rows and positions into one, behind a convolution of a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, 6, 5, stride=3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.front(x[:, None]).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.mean(1)


def test_a_length_that_a_convolution_left() -> None:
    """Regions get no value that has the signal's own length, of which their sizes are made."""
    model = randomised(Listening).double().eval()
    x = torch.linspace(-1, 1, 60, dtype=F64).reshape(2, 30)
    explainer = compiled(model, x)
    assert counts(explainer)[1] < counts(explainer)[0]
    other = torch.linspace(-2, 1, 69, dtype=F64).reshape(3, 23)
    found = explainer(other, target=1).relevance["x"]
    assert relative(found, on_tape(explainer, {"x": other}, 1).relevance["x"]) <= 1e-12


def test_one_region_where_a_size_follows_from_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_reduced", lambda *_: None)
    model = randomised(Listening).double().eval()
    x = torch.linspace(-1, 1, 60, dtype=F64).reshape(2, 30)
    explainer = compiled(model, x)
    assert counts(explainer) == (1, 1)
    found = explainer(x, target=1).relevance["x"]
    assert relative(found, on_tape(explainer, {"x": x}, 1).relevance["x"]) <= 1e-12


def test_a_region_prints_as_a_graph_of_its_own() -> None:
    explainer = compiled(stack(*(Block() for _ in range(4))), X)
    region = max(pieces(explainer), key=lambda region: len(region.nodes))
    graph_module = region.graph_module()
    graph_module.graph.lint()
    assert [n.target for n in graph_module.graph.find_nodes(op="placeholder")] == [
        node.name for node in region.inputs
    ]
    assert "boundary" in graph_module.code
    assert len(computed(graph_module.graph)) == len(region.nodes)


# Sequences


class Free:
    """Nothing is wider than anything else, but somewhere nothing may cross."""

    def __init__(self, closed: set[int]) -> None:
        self.closed = closed

    def width(self, start: int, cut: int) -> float:
        return float("inf") if cut in self.closed else 1.0


def most_saved(looks: list[int]) -> int:
    """By trying every stretch: how many nodes need not be compiled again."""
    best = 0
    for period in range(regions.SHORTEST, len(looks) // 2 + 1):
        for at in range(len(looks) - period):
            end = at
            while end + period < len(looks) and looks[end] == looks[end + period]:
                end += 1
            best = max(best, (end - at) // period * period)
    return best if best >= regions.LEAST_SAVED else 0


sequences = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 5)), max_size=5
).map(lambda parts: [look for motif, times in parts for look in motif * times])


@given(sequences, st.sets(st.integers(0, 60), max_size=8))
@settings(max_examples=200, deadline=None)
def test_sequences(looks: list[int], closed: set[int]) -> None:
    """The stretch that repeats most is found, and cut into equal pieces where one may."""
    with mock.patch.multiple(regions, SHORTEST=2, LEAST_SAVED=4):
        numbers, crossing = torch.tensor(looks, dtype=torch.int64), Free(closed)
        found = regions._most_repeated(numbers)
        assert (found is not None) == (most_saved(looks) > 0)
        cuts = regions._cuts(numbers, 0, len(looks), crossing)
        assert all(0 <= at <= len(looks) for at in cuts)
        if found is None:
            assert not cuts
            return
        at, period, length = found
        assert (length - period) // period * period == most_saved(looks)
        stretch = looks[at : at + length]
        assert stretch[period:] == stretch[:-period]
        places = regions._placed(at, period, length, crossing)
        if places is None:
            assert not cuts
            return
        assert {*places} <= cuts
        assert not {*places} & closed
        assert at <= places[0] <= places[-1] <= at + length
        assert {b - a for a, b in pairwise(places)} == {period}
