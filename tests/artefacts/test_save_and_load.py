"""Explainers saved and loaded: the same bits, without the model's code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Explain
from models import BY_NAME, MLP, randomised, transformers_model
from tiny import SENTENCES, example, tiny_classifier
from torch import nn

import attnlrp_fx
from attnlrp_fx import ArtefactError, Explanation, Logit
from attnlrp_fx.artefacts.outputs import NamedOutputs

FRESH = """
import sys, torch
class Refuses:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
sys.meta_path.insert(0, Refuses())
import attnlrp_fx
for folder in sys.argv[1:]:
    explainer = attnlrp_fx.load(f"{folder}/x.lrp.pt2")
    given = torch.load(f"{folder}/inputs.pt")
    explanation = explainer(given)
    found = {**explanation.relevance, "value": explanation.target_value}
    torch.save(found, f"{folder}/found.pt")
assert "transformers" not in sys.modules
"""


def _vision() -> nn.Module:
    return transformers_model(
        "vit",
        "ViTForImageClassification",
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )


def _same(found: dict[str, Any], explanation: Explanation) -> bool:
    values = {**explanation.relevance, "value": explanation.target_value}
    return found.keys() == values.keys() and all(torch.equal(found[n], values[n]) for n in found)


@pytest.fixture(scope="module")
def decoder(explain: Explain, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A decoder's explainer, and the folder of its file."""
    explainer = explain(BY_NAME["qwen2"], dtype=torch.float32, audit=False, exact=False)
    folder = tmp_path_factory.mktemp("decoder")
    explainer.save(folder / "x.lrp.pt2")
    return explainer, folder


def test_in_a_fresh_process(decoder: Any, sentiment: Any, tmp_path: Path) -> None:
    """A decoder, an encoder, a mixture of experts, images: difference 0, without transformers."""
    image = {"pixel_values": torch.randn(2, 3, 8, 8)}
    models = {
        "mixtral": (BY_NAME["mixtral"].model(), BY_NAME["mixtral"].example(2, 9)),
        "vit": (randomised(_vision).eval(), image),
    }
    made = {
        "decoder": (*decoder, BY_NAME["qwen2"].example(2, 9)),
        "encoder": (sentiment[0], sentiment[2].parent, example(sentiment[0].tokenizer)),
    }
    for name, (model, inputs) in models.items():
        explainer = attnlrp_fx.compile(
            model,
            inputs,
            composite="attnlrp-vision" if name == "vit" else "attnlrp",
            backend="eager",
            dynamic_shapes=None,  # is ready soonest
        )
        (tmp_path / name).mkdir()
        explainer.save(tmp_path / name / "x.lrp.pt2")
        made[name] = explainer, tmp_path / name, inputs
    for _, folder, inputs in made.values():
        torch.save(inputs, folder / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *(str(folder) for _, folder, _ in made.values())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, (explainer, folder, inputs) in made.items():
        assert _same(torch.load(folder / "found.pt"), explainer(inputs)), name


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier's explainer, it loaded again, and the file."""
    model, tokenizer = tiny_classifier()
    explainer = attnlrp_fx.compile(
        model,
        example(tokenizer),
        backend="eager",
        tokenizer=tokenizer,
        target=Logit(1),
        latent=["residual"],
    )
    path = tmp_path_factory.mktemp("saved") / "x.lrp.pt2"
    explainer.save(path)
    return explainer, attnlrp_fx.load(path), path


def test_explanations_are_whole(sentiment: Any) -> None:
    explainer, loaded, _ = sentiment
    inputs = explainer.tokenizer(SENTENCES, return_tensors="pt", padding=True)
    for given in (inputs, explainer.tokenizer(SENTENCES[:1], return_tensors="pt")):
        one, other = explainer(given), loaded(given)
        assert torch.equal(one.relevance["input_ids"], other.relevance["input_ids"])
        assert (one.tokens, one.labels, one.target) == (other.tokens, other.labels, other.target)
        assert isinstance(other.outputs, NamedOutputs)
        assert torch.equal(one.outputs.logits, other.outputs.logits)
        assert other.outputs[0] is other.outputs.logits is other.outputs["logits"]
        assert one.latent.keys() == other.latent.keys()
        for name, latent in one.latent.items():
            assert torch.equal(latent.relevance, other.latent[name].relevance)
        assert one.to_html() == other.to_html()
    assert str(explainer.rewritten.graph) == str(loaded.rewritten.graph)
    assert loaded.compilations == 1  # the example was padded
    with pytest.raises(AttributeError, match="the outputs are logits"):
        _ = other.outputs.nothing


def test_what_a_loaded_explainer_can_do(sentiment: Any) -> None:
    explainer, loaded, _ = sentiment
    inputs = explainer.tokenizer(SENTENCES, return_tensors="pt", padding=True)
    targets = [0, lambda outputs: outputs.logits.square().sum(-1)]
    for one, other in zip(
        explainer(inputs, target=targets), loaded(inputs, target=targets), strict=True
    ):
        assert torch.equal(one.relevance["input_ids"], other.relevance["input_ids"])
    for one, other in zip(explainer.map(SENTENCES), loaded.map(SENTENCES), strict=True):
        assert torch.equal(one.relevance["input_ids"], other.relevance["input_ids"])
        assert one.tokens == other.tokens
    assert loaded.with_composite("gradient").report().composite == "gradient"
    rules = [(row.rule, row.op, row.count) for row in explainer.report().rules]
    assert [(row.rule, row.op, row.count) for row in loaded.report().rules] == rules
    assert loaded.report().notes == explainer.report().notes
    assert str(loaded.check()) == str(explainer.check())


def test_tokenizer_without_transformers(sentiment: Any) -> None:
    explainer, loaded, _ = sentiment
    ours, theirs = loaded.tokenizer, explainer.tokenizer
    for options in (
        {"padding": True, "return_tensors": "pt"},
        {"truncation": True, "max_length": 5},
        {},
    ):
        one, other = ours(SENTENCES, **options), theirs(SENTENCES, **options)
        assert one.keys() == dict(other).keys()
        for name in one:
            assert torch.equal(torch.as_tensor(one[name][0]), torch.as_tensor(other[name][0]))
    ids = theirs(SENTENCES[0])["input_ids"]
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.decode(ids) == theirs.decode(ids)
    with pytest.raises(attnlrp_fx.InputError, match="unlike lengths"):
        ours(SENTENCES, return_tensors="pt")


def test_generation(decoder: Any) -> None:
    case, (explainer, folder) = BY_NAME["qwen2"], decoder
    loaded = attnlrp_fx.load(folder / "x.lrp.pt2")
    text = case.example(1, 7)
    one = explainer.explain_generation(text, start=4)
    other = loaded.explain_generation(text, start=4)
    assert torch.equal(one.relevance["input_ids"], other.relevance["input_ids"])
    too_long = case.example(1, 41)
    with pytest.raises(attnlrp_fx.InputError):
        loaded(too_long | {"input_ids": too_long["input_ids"] + 10_000})


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small network saved with and without weights."""
    model = BY_NAME["mlp"].model()
    explainer = attnlrp_fx.compile(model, BY_NAME["mlp"].example(), backend="eager", audit=True)
    folder = tmp_path_factory.mktemp("mlp")
    explainer.save(folder / "with.lrp.pt2")
    explainer.save(folder / "without.lrp.pt2", weights=False)
    return explainer, folder


def test_torch_export_reads_it(mlp: Any) -> None:
    explainer, folder = mlp
    extra = {"explainer.json": ""}
    program = torch.export.load(folder / "with.lrp.pt2", extra_files=extra)
    x = torch.randn(5, 6)
    assert torch.equal(program.module()(features=x)[0], explainer.model(x))
    assert program.state_dict.keys() == explainer.model.state_dict().keys()
    about = json.loads(extra["explainer.json"])
    ((name, given),) = about["inputs"].items()
    assert (name, given["dtype"], given["shape"][1]) == ("features", "float32", 6)
    assert isinstance(given["shape"][0], str)
    assert about["composite"]["name"] == "attnlrp"
    assert about["versions"]["torch"] == torch.__version__
    assert about["report"]["nodes"] == explainer.report().nodes


def test_without_weights(mlp: Any) -> None:
    explainer, folder = mlp
    model = explainer.model
    assert (folder / "without.lrp.pt2").stat().st_size < (folder / "with.lrp.pt2").stat().st_size
    with pytest.raises(ArtefactError, match=r"saved without weights[\s\S]*pass the model, a MLP"):
        attnlrp_fx.load(folder / "without.lrp.pt2")
    loaded = attnlrp_fx.load(folder / "without.lrp.pt2", model=model)
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x).relevance["features"], explainer(x).relevance["features"])
    assert loaded(x).ledger is not None
    assert loaded.model is model
    with torch.no_grad():
        model.last.weight.mul_(2)
    try:
        assert torch.equal(loaded(x).relevance["features"], explainer(x).relevance["features"])
    finally:
        with torch.no_grad():
            model.last.weight.div_(2)


@pytest.mark.parametrize("file", ["with", "without"])
def test_another_model(mlp: Any, file: str) -> None:
    _, folder = mlp
    path = folder / f"{file}.lrp.pt2"
    wrong = MLP().eval()
    wrong.last = nn.Linear(12, 5)
    with pytest.raises(ArtefactError, match=r"'last.weight' is \(5, 12\) .* in the file \(4, 12\)"):
        attnlrp_fx.load(path, model=wrong)
    with pytest.raises(ArtefactError, match=r"float64, in the file .* and 7 more"):
        attnlrp_fx.load(path, model=MLP().double().eval())
    with pytest.raises(ArtefactError, match=r"a Linear, is not the one[\s\S]*it has no 'first"):
        attnlrp_fx.load(path, model=nn.Linear(6, 4).eval())


def test_inputs_keep_their_names(tmp_path: Path) -> None:
    """Also those that are no names for values of a graph."""
    linear, x = nn.Linear(3, 2).eval(), torch.randn(4, 3)
    explainer = attnlrp_fx.compile(linear, x, backend="eager")
    explainer.save(tmp_path / "x.lrp.pt2")
    loaded = attnlrp_fx.load(tmp_path / "x.lrp.pt2")
    assert torch.equal(loaded(input=x).relevance["input"], explainer(x).relevance["input"])


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 4)
            self.out = nn.Linear(4, 11, bias=False)
            self.out.weight = self.table.weight
            self.register_buffer("part", torch.arange(8.0).reshape(2, 4)[1])  # a part of memory

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids) * self.part)

    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    explainer = attnlrp_fx.compile(Tied().eval(), {"ids": ids}, backend="eager")
    explainer.save(tmp_path / "x.lrp.pt2")
    loaded = attnlrp_fx.load(tmp_path / "x.lrp.pt2")
    assert torch.equal(explainer(ids).relevance["ids"], loaded(ids).relevance["ids"])
    assert loaded.model.table.weight is loaded.model.out.weight or "out" not in dict(
        loaded.model.named_children()
    )
    assert (tmp_path / "x.lrp.pt2").stat().st_size < 40_000


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    linear, x = nn.Linear(3, 2).eval(), torch.ones(2, 3)
    path = tmp_path / "x.lrp.pt2"

    def compiled(**options: Any) -> attnlrp_fx.ExplainableGraphModule:
        return attnlrp_fx.compile(linear, x, backend="eager", **options)

    with pytest.raises(ArtefactError, match=r"target .* cannot be saved[\s\S]*a function"):
        compiled(target=lambda outputs: outputs.sum(-1)).save(path)

    class Mine(attnlrp_fx.Epsilon):
        """A rule of one's own."""

    rule = (attnlrp_fx.Match(kind="linear"), Mine())
    composite = attnlrp_fx.COMPOSITES["attnlrp"].with_rules(rule)
    with pytest.raises(ArtefactError, match=r"rule Mine\(\) of composite 'attnlrp\+1'"):
        compiled(composite=composite).save(path)

    def mine(graph_module: Any, context: Any) -> Any:
        return attnlrp_fx.passes.PassResult("mine")

    with pytest.raises(ArtefactError, match="pass 'mine' cannot be saved"):
        compiled(passes=(mine, *attnlrp_fx.passes.PIPELINE)).save(path)
    with pytest.raises(ArtefactError, match="no such directory"):
        compiled().save(tmp_path / "nowhere" / "x.lrp.pt2")
    with pytest.raises(ArtefactError, match="meta device"):
        attnlrp_fx.compile(nn.Linear(3, 2, device="meta").eval(), x.to("meta")).save(path)
    assert list(tmp_path.iterdir()) == []
    own = compiled(composite=attnlrp_fx.epsilon_gamma_box((0.0, -1.0, 0.0), 1.0, gamma=0.5))
    own.save(path)
    loaded = attnlrp_fx.load(path)
    assert loaded._running.rewriting.context.composite == own._running.rewriting.context.composite


def test_backends(mlp: Any, tmp_path: Path) -> None:
    explainer, folder = mlp
    with pytest.raises(attnlrp_fx.BackendError, match="no backend 'fast'"):
        attnlrp_fx.load(folder / "with.lrp.pt2", backend="fast")
    with pytest.raises(attnlrp_fx.InputError, match="no device 'cuda:77'"):
        attnlrp_fx.load(folder / "with.lrp.pt2", device="cuda:77")

    def mine(graph_module: Any, inputs: Any) -> Any:
        return graph_module.forward

    model, x = explainer.model, torch.ones(2, 6)
    attnlrp_fx.compile(model, x, backend=mine).save(tmp_path / "x.lrp.pt2")
    with pytest.raises(attnlrp_fx.BackendError, match="backend of its user's own"):
        attnlrp_fx.load(tmp_path / "x.lrp.pt2")
    loaded = attnlrp_fx.load(tmp_path / "x.lrp.pt2", backend=mine)
    assert torch.equal(loaded(x).relevance["features"], explainer(x).relevance["features"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_dtype(decoder: Any, dtype: torch.dtype) -> None:
    """At load, and afterwards: what the model itself computes in that dtype."""
    _, folder = decoder
    case = BY_NAME["qwen2"]
    loaded = attnlrp_fx.load(folder / "x.lrp.pt2", dtype=dtype)
    inputs = case.example(2, 9)
    inputs["attention_mask"][1, 6:] = 0
    model = case.model(dtype)
    found = loaded(inputs, target=3)
    outputs = model(**inputs, use_cache=False).logits
    assert found.outputs.logits.dtype == dtype
    exact = dtype == torch.float64
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if exact else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(found.outputs.logits, outputs, **tolerance)
    assert bool(found.relevance["input_ids"].isfinite().all())
    if exact:
        expected = attnlrp_fx.compile(model, inputs, backend="eager", dynamic_shapes=None)
        relevance = expected(inputs, target=3).relevance["input_ids"]
        torch.testing.assert_close(found.relevance["input_ids"], relevance, atol=1e-6, rtol=1e-5)


def test_nothing_of_another_dtype_stays() -> None:
    """Weight relevance and listings were made of the graph that was there before."""
    model = BY_NAME["mlp"].model()
    features = BY_NAME["mlp"].example(4)["features"]
    explainer = attnlrp_fx.compile(model, features, backend="eager", audit=True)
    before = explainer.weight_relevance(list(features), progress=False)
    assert "f32[" in str(explainer.show())
    explainer.double()
    after = explainer.weight_relevance(list(features.double()), progress=False)
    assert after.keys() == before.keys()
    for name, relevance in after.items():
        torch.testing.assert_close(relevance.float(), before[name].float(), rtol=1e-4, atol=1e-5)
    assert "f32[" not in str(explainer.show())
    assert abs(explainer(features.double()).ledger.residual) < 1e-12
