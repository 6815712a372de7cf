"""What holds for every pass at once, and for the pipeline."""

import ast
import functools
import importlib
import inspect
import io
import re
import token
import tokenize
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, captured, copy_of, run, text
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import attnlrp_fx
from attnlrp_fx import COMPOSITES, ops, passes
from attnlrp_fx.errors import PassError
from attnlrp_fx.graph.provenance import module_path, source_line
from attnlrp_fx.passes import (
    ASSIGN,
    NORMALISE,
    OPTIONAL,
    PIPELINE,
    RAISE,
    PassContext,
    PassResult,
    run_passes,
    verify,
)

aten = torch.ops.aten
FOLDER = Path(inspect.getfile(passes)).resolve().parent
PACKAGE = Path(inspect.getfile(attnlrp_fx)).parent
NOT_PASSES = ("__init__", "base")
CONTEXT = PassContext(positions=True, latent=("inner",), composite=COMPOSITES["attnlrp-vision"])


def randomised(norm):
    """A batch normalisation with statistics as training leaves them."""
    with torch.no_grad():
        for value in (norm.running_mean, norm.weight, norm.bias):
            value.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


def normalised(norm, x):
    """A batch normalisation as capture leaves it: the op itself, so that the rest stays whole."""
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return aten._native_batch_norm_legit_no_training(x, *statistics, norm.momentum, norm.eps)[0]


class Inner(nn.Module):
    """Something for nearly every pass: assertions, copies, identities, attention, a norm, a region,
    a router, a recurrence, batch normalisation, a layer behind a rectifier, and one that is read at
    one place."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.gate, self.up = (nn.Linear(8, 8) for _ in range(2))
        self.mix, self.norm = nn.Conv1d(8, 8, 1), randomised(nn.BatchNorm1d(8))

    def forward(self, x):
        x = (x * 2).to(x.dtype)
        x = F.dropout(x, 0.1, self.training)
        q, k, v = self.qkv(x).chunk(3, -1)
        y = ((q @ k.transpose(1, 2)) * 8**-0.5).softmax(-1) @ v
        y = torch.relu(normalised(self.norm, self.mix(y.transpose(1, 2)))).transpose(1, 2)
        y = x + aten.copy(torch.zeros_like(x), y) + F.adaptive_avg_pool1d(x, 1)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        gate = self.gate(F.rrelu(y, training=self.training))
        weights = y.topk(2, -1).values
        y = y + (weights * self.up(y)[..., :2]).sum(-1, keepdim=True)
        decay = torch.sigmoid(y)
        carried = decay[:, 1:] * (decay[:, :-1] * y[:, 1:] + y[:, :-1])
        y = torch.cat([y[:, :1], carried], 1)
        first = torch.tanh(self.gate(y))[:, 0]
        return gate * torch.sigmoid(1.702 * gate) * self.up(y), first


class Everything(nn.Module):
    """The same in a module of its own, so that nodes have a path.

    Bags are of two words: their sum is the same in any order.
    """

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.bags = nn.EmbeddingBag(11, 8, mode="sum")
        self.inner = Inner()

    def forward(self, ids):
        x = self.words(ids) + self.bags(ids[:, :2])[:, None]
        return self.inner(x + self.places(torch.arange(ids.shape[1])))


class Linear(nn.Module):
    """Something for no pass but the marking of sources and the assignment of rules."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return self.linear(x)


def ids():
    return {"ids": torch.arange(10).view(2, 5)}


@pytest.fixture(scope="module")
def everything():
    torch.manual_seed(0)
    return captured(Everything(), ids())


def after(graph_module, *run_before):
    """A copy of a graph after some passes."""
    graph_module = copy_of(graph_module)
    run_passes(graph_module, CONTEXT, run_before)
    return graph_module


def before_pass(run_next):
    return PIPELINE[: PIPELINE.index(run_next)] if run_next in PIPELINE else ()


def named(run_next):
    return run_next.__name__


# Every pass


BY_NAME = (passes.slice_targets, passes.lower_attention, passes.insert_autoencoders)
ASKED_FOR = [run_next for run_next in PIPELINE if run_next not in BY_NAME]
"""All but the passes that do what the context names, and nothing by default."""


@pytest.mark.parametrize("run_next", ASKED_FOR, ids=named)
def test_changes_what_it_is_for(run_next, everything):
    graph = after(everything, *before_pass(run_next))
    was = text(graph)
    (result,) = run_passes(graph, CONTEXT, (run_next,))
    assert result.changes > 0
    assert text(graph) != was


@pytest.mark.parametrize("run_next", PIPELINE, ids=named)
def test_is_idempotent(run_next, everything):
    graph = after(everything, *before_pass(run_next), run_next)
    was, code = text(graph), graph.code
    (result,) = run_passes(graph, CONTEXT, (run_next,))
    assert result.changes == 0
    assert text(graph) == was
    assert graph.code == code


@pytest.mark.parametrize("run_next", PIPELINE, ids=named)
def test_leaves_alone_what_is_done(run_next, everything):
    """No pass finds anything to do in a graph that the whole pipeline has rewritten."""
    graph = after(everything, *PIPELINE)
    code = graph.code
    (result,) = run_passes(graph, CONTEXT, (run_next,))
    assert (result.changes, graph.code) == (0, code)


@pytest.mark.parametrize(
    "run_next",
    [p for p in PIPELINE if p not in (passes.mark_sources, passes.assign_rules)],
    ids=named,
)
def test_leaves_a_graph_untouched_that_it_does_not_concern(run_next):
    graph = captured(Linear(), {"x": torch.randn(2, 3)})
    graph = after(graph, *(passes.mark_sources,) * (run_next in RAISE))
    nodes = [(node, node.args, node.kwargs, dict(node.meta)) for node in graph.graph.nodes]
    code = graph.code
    (result,) = run_passes(graph, PassContext(composite=CONTEXT.composite), (run_next,))
    assert result == PassResult(run_next.__name__)
    assert graph.code == code
    assert [(n, n.args, n.kwargs, dict(n.meta)) for n in graph.graph.nodes] == nodes


@pytest.mark.parametrize("run_next", PIPELINE, ids=named)
def test_leaves_the_meaning_unchanged(run_next, everything):
    was = after(everything, *before_pass(run_next))
    now = after(was, run_next)
    rounds = run_next in (
        *(passes.raise_attention, passes.merge_batch_norms),
        passes.push_selections,  # a product of one row has another kernel
    )
    tolerance = 1e-6 if rounds else 0
    expected = run(was, ids())
    found = run(now, ids())[: len(expected)]  # latent values are returned behind the others
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("run_next", PIPELINE, ids=named)
def test_new_nodes_have_provenance(run_next, everything):
    was = after(everything, *before_pass(run_next))
    known = {node.name for node in was.graph.nodes}
    for node in after(was, run_next).graph.nodes:
        if node.name in known or node.op in ("output", "get_attr"):
            continue
        assert node.meta["constructed_by"] == run_next.__name__
        assert node.meta["nn_module_stack"]
        assert source_line(node)
        places = {
            passes.mark_sources: ("words", "bags"),
            passes.mark_positions: ("places",),
            passes.lower_bags: ("bags",),
            passes.merge_batch_norms: ("inner", "inner.mix"),
            passes.push_selections: ("inner", "inner.gate"),
        }
        assert module_path(node) in places.get(run_next, ("inner",))


def test_rewritten_nodes_have_provenance(everything):
    """Nodes that assign_rules changes in place say so, unless a pass before constructed them."""
    graph = after(everything, *PIPELINE)
    explained = [node for node in graph.graph.nodes if ops.is_explained(node)]
    assert len(explained) > 10
    for node in explained:
        assert node.meta["nn_module_stack"]
        assert node.meta["stack_trace"]
        if node.target in ops.RELEVANCE_OPS:
            assert node.meta["constructed_by"] in {p.__name__ for p in PIPELINE}


# The files


def files():
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NOT_PASSES)


def test_there_is_a_file_for_every_pass():
    assert files() == sorted(named(run_next) for run_next in (*PIPELINE, *OPTIONAL))


@pytest.mark.parametrize("name", files())
def test_file_symbol_result_and_test_share_a_name(name, everything):
    module = importlib.import_module(f"attnlrp_fx.passes.{name}")
    run_next = getattr(module, name)
    assert getattr(passes, name) is run_next
    assert name in passes.__all__
    public = [
        symbol
        for symbol, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
        if inspect.signature(value, eval_str=True).return_annotation is PassResult
    ]
    assert public == [name]
    assert run_next(after(everything, *before_pass(run_next)), CONTEXT).name == name
    assert Path(__file__).with_name(f"test_{name}.py").exists()


@pytest.mark.parametrize("name", files())
def test_docstring_states_the_rewrite(name):
    module = importlib.import_module(f"attnlrp_fx.passes.{name}")
    assert module.__doc__
    assert getattr(module, name).__doc__


# The pipeline


def test_pipeline_is_the_documented_tuple():
    assert [named(run_next) for run_next in PIPELINE] == [
        "drop_assertions",
        "lower_bags",
        "lower_copies",
        "lower_pools",
        "lower_rrelu",
        "drop_identities",
        "merge_batch_norms",
        "mark_sources",
        "mark_positions",
        "insert_autoencoders",
        "raise_attention",
        "raise_norms",
        "raise_routing",
        "raise_scans",
        "raise_activations",
        "lower_attention",
        "mark_latents",
        "slice_targets",
        "push_selections",
        "assign_rules",
        "mark_signs",
        "return_latents",
    ]
    assert (*NORMALISE, *RAISE, *ASSIGN) == PIPELINE


def test_nothing_registers_itself():
    """The one place where the order stands is the tuple: no module-level call in a pass."""
    for name in files():
        tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
        for statement in tree.body:
            calls = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            assert not calls, f"{name}: {ast.unparse(statement)}"


def test_pass_of_a_user():
    """A longer tuple: x + x becomes 2 x, between the raising passes and the rules."""

    def double_sums(graph_module, context):
        result = PassResult("double_sums")
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if node.args[0] is node.args[1]:
                with graph_module.graph.inserting_before(node):
                    new = graph_module.graph.call_function(aten.mul.Tensor, (node.args[0], 2))
                new.meta = {**node.meta, "constructed_by": result.name}
                node.replace_all_uses_with(new)
                graph_module.graph.erase_node(node)
                result.changes += 1
        graph_module.recompile()
        return result

    model = Written(lambda m, x: torch.tanh(x + x)).eval()
    longer = (*NORMALISE, *RAISE, double_sums, *ASSIGN)
    given = {"x": torch.randn(2, 3)}
    explainer = attnlrp_fx.compile(model, given, passes=longer, backend="eager", target=1)
    (result,) = (r for r in explainer.report().passes if r.name == "double_sums")
    assert result.changes == 1
    assert "double_sums" in str(explainer.report())
    assert (
        text(explainer.rewritten)
        == """\
source = ops.source(x, name='x')
linear = ops.linear(aten.mul, source, 2)
identity = ops.identity(aten.tanh, linear)
return [identity]"""
    )
    expected = attnlrp_fx.compile(model, given, backend="eager", target=1)(**given)
    found = explainer(**given)
    torch.testing.assert_close(found.relevance["x"], expected.relevance["x"], rtol=1e-6, atol=1e-7)


def test_pass_of_a_user_may_come_first():
    """Where export's assertions still stand: they are nodes without a value."""

    def nothing(graph_module, context):
        return PassResult("nothing")

    model = Written(lambda m, x: (x * 2).to(x.dtype)).eval()
    given = {"x": torch.randn(2, 3)}
    explainer = attnlrp_fx.compile(model, given, passes=(nothing, *PIPELINE), backend="eager")
    assert explainer.report().passes[0].name == "nothing"


# The verifier


def small():
    return captured(Written(lambda m, x: torch.tanh(x * 2)), {"x": torch.randn(2, 3)})


def test_verify_accepts_a_valid_graph():
    verify(small(), "mine")


def use_before_definition(graph_module, context):
    """Moves the first op behind the second, which needs it."""
    first, second = (n for n in graph_module.graph.nodes if n.op == "call_function")
    second.append(first)
    return PassResult("use_before_definition")


def value_unknown(graph_module, context):
    """Adds an op and forgets what its value is."""
    (output,) = graph_module.graph.find_nodes(op="output")
    (last,) = output.all_input_nodes
    with graph_module.graph.inserting_before(output):
        new = graph_module.graph.call_function(aten.neg.default, (last,))
    output.replace_input_with(last, new)
    return PassResult("value_unknown")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (use_before_definition, "pass 'use_before_definition' left an invalid graph"),
        (value_unknown, r"pass 'value_unknown' left node 'neg_default' without meta\['val'\]"),
    ],
    ids=["use before definition", "value unknown"],
)
def test_verify_stops_a_broken_pass(broken, reason):
    with pytest.raises(PassError, match=reason):
        run_passes(small(), PassContext(), (broken,))


def test_broken_pass_stops_the_compiler():
    model = Written(lambda m, x: torch.tanh(x * 2)).eval()
    with pytest.raises(PassError, match="value_unknown"):
        attnlrp_fx.compile(
            model, torch.randn(2, 3), passes=(value_unknown, *PIPELINE), backend="eager"
        )


# No model is known by name

PLAIN_WORDS = {
    "align": "the CSS property text-align",
    "aria": "HTML's attributes for screen readers",
    "codegen": "our own module that emits programs",
    "encoder-decoder": "the flag is_encoder_decoder of every configuration",
}
"""Model types that are also words of code: word → what it means there."""


@functools.cache
def model_types():
    """Model types of three letters or more, by their words."""
    return {snake(name): name for name in CONFIG_MAPPING_NAMES if len(name) >= 3}


def snake(name):
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def names_and_strings(source):
    """Identifiers and strings of a file, with their lines; no comments and no docstrings."""
    statement = True
    for part in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = token.tok_name[part.type]
        is_docstring = kind == "STRING" and statement
        if kind in ("NAME", "STRING", "FSTRING_MIDDLE") and not is_docstring:
            yield part.start[0], part.string
        if kind not in ("COMMENT", "NL"):
            statement = kind in ("NEWLINE", "INDENT", "DEDENT")


@functools.cache
def named_models(source):
    """(line, model type) wherever one stands as a word of its own, or as words in a row."""
    longest = max(name.count("_") for name in model_types()) + 1
    found = []
    for line, written in names_and_strings(source):
        split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", written)
        for form in {snake(written), snake(split)}:
            words = form.strip("_").split("_")
            starts = range(len(words))
            runs = {"_".join(words[i : i + n]) for i in starts for n in range(1, longest + 1)}
            found += [(line, model_types()[run]) for run in runs & model_types().keys()]
    return sorted(set(found))


def code_files():
    return sorted({path.resolve() for root in (PACKAGE, FOLDER) for path in root.rglob("*.py")})


def test_there_is_code_to_look_at():
    assert len(code_files()) > 30
    assert len(model_types()) > 300


@pytest.mark.parametrize("path", code_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_code_names_no_model(path):
    found = [
        f"{path.name}:{line}: {name}"
        for line, name in named_models(path.read_text(encoding="utf-8"))
        if name not in PLAIN_WORDS
    ]
    assert found == []


def test_every_exception_is_needed():
    sources = [path.read_text(encoding="utf-8") for path in code_files()]
    found = {name for source in sources for _, name in named_models(source)}
    assert found == set(PLAIN_WORDS)


def test_a_named_model_is_found():
    code = '"""About llama."""\n# bert\nclass BertThing:\n    """gpt2"""\n    x = "a gpt-neox b"\n'
    assert list(named_models(code)) == [(3, "bert"), (5, "gpt_neox")]
