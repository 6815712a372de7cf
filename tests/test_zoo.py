"""A slice of the zoo, one architecture for every mechanism, and what its committed results say.

The whole zoo is `benchmarks/zoo.py`; this runs the same checks on a few of its models.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
supported, zoo, zoo_models = map(import_module, ("supported", "zoo", "zoo_models"))

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
SLICE = {
    "gpt_oss": "experts: softmax of the chosen, attention sinks, interleaved GLU",
    "deepseek_v3": "experts: sigmoid router with a bias, shared experts; latent attention",
    "mamba": "a selective scan, as a loop",
    "mamba2": "a selective scan, in parallel",
    "recurrent_gemma": "a gated linear recurrence beside local attention",
    "rwkv": "a running average with exponential weights",
    "nn.LSTM-tagger": "a bidirectional LSTM on tokens",
    "deberta-v2": "keys and queries of relative positions",
    "bloom": "ALiBi",
    "swin": "shifted windows, patch merging",
    "convnext": "layer norm over channels, layer scale",
    "segformer": "reduced keys, maps of several scales joined",
    "whisper": "spectrograms and decoder tokens at once",
    "wav2vec2": "group norm, weight-normalised positional convolution",
    "clip": "contrastive logits of texts and images",
    "llava": "an image's features put among a text's tokens",
}
"""Architecture → what it is here for."""


@pytest.fixture(autouse=True)
def unseeded() -> Iterator[None]:
    """The zoo seeds PyTorch's generator; the other tests must not depend on it."""
    with torch.random.fork_rng():
        yield


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize("name", SLICE)
def test_slice(name: str) -> None:
    arch = zoo_models.architectures()[name]
    row = zoo.Row(arch.name, arch.kind, arch.class_name)
    for _ in zoo.examine(arch, row):
        pass
    found = {k: v for k, v in dataclasses.asdict(row).items() if v is not None}
    assert row.passed, str(found)
    assert row.dynamic_batch or any("is fixed to dimension 0" in note for note in row.notes)


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(RESULTS.read_text())


def test_results_cover_what_they_claim(results: dict) -> None:
    """At least 150 architectures of every sort run, and 95 % of the captured pass every check."""
    ran = [row for row in results["rows"] if row["stage"] != "building the model"]
    captured = [row for row in ran if row["captured"]]
    passed = [row for row in captured if row["passed"]]
    assert len(ran) >= 150
    assert {row["kind"] for row in ran} >= set(zoo_models.KINDS) - {"image-to-image"}
    assert len(passed) >= 0.95 * len(captured)
    assert set(SLICE) <= {row["name"] for row in passed}


def test_results_say_why_what_fails_does(results: dict) -> None:
    failed = [row for row in results["rows"] if not row["passed"]]
    table = (RESULTS.parent / "zoo.md").read_text()
    for row in failed:
        assert f"**{row['name']}**" in table
        assert row["reason"] or row["stage"] == "done"


def test_table_of_the_readme_is_that_of_the_results(results: dict) -> None:
    _, written, _ = supported.between((ROOT / "README.md").read_text())
    assert written == supported.table(results)
