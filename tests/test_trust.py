"""Bad conditions: odd inputs, threads, forks, interruptions, too little memory.

Whatever comes in, what comes out is an explanation that goes with the model's own outputs, or one
of our errors; and after any error the explainer works as before.
"""

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Explain, _captured, _model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import BY_NAME, VOCABULARY, Case, Inputs, tensors_of
from torch import Tensor, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import AttnLRPError, ExplainableGraphModule, Explanation, compiler
from attnlrp_fx.errors import InputError, NonFiniteError, OutOfMemoryError
from attnlrp_fx.files import write_atomically

FUZZED = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
"""The fixtures are compiled explainers, the same for all examples."""


def eager(name: str) -> ExplainableGraphModule:
    """A new explainer of a model that is captured once for all tests."""
    case = BY_NAME[name]
    captured = _captured(case, torch.float32)
    with mock.patch.object(compiler, "capture", return_value=captured):
        return attnlrp_fx.compile(_model(case, torch.float32), target=case.target, backend="eager")


def one_row(name: str, length: int, seed: int) -> Inputs:
    """A text of its own for each seed."""
    return {k: v[seed % 8 :][:1] for k, v in BY_NAME[name].example(8, length).items()}


def relevance_of(explainer: ExplainableGraphModule, inputs: Inputs) -> Tensor:
    return explainer(inputs).relevance["input_ids"]


@st.composite
def texts(draw: st.DrawFn) -> Inputs:
    """Token ids and a mask: of any size from nothing on, any integer dtype, any padding."""
    batch, length = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    highest = draw(st.sampled_from([VOCABULARY, VOCABULARY, VOCABULARY + 3]))
    ids = torch.randint(0, highest, (batch, length), generator=generator)
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask = torch.rand(batch, length, generator=generator) < share
    kinds = st.sampled_from([torch.int64, torch.int64, torch.int32, torch.uint8, torch.float32])
    return {"input_ids": ids.to(draw(kinds)), "attention_mask": mask.to(draw(kinds))}


@FUZZED
@given(inputs=texts(), name=st.sampled_from(["llama", "bert"]))
def test_any_text_is_explained_or_refused(explain: Explain, inputs: Inputs, name: str) -> None:
    explainer = explain(BY_NAME[name], dtype=torch.float32, exact=False)
    try:
        explanation = explainer(inputs)
    except AttnLRPError:
        return
    model_inputs = {k: v.long() for k, v in inputs.items()}
    with torch.no_grad():
        expected = tensors_of(explainer.model(**model_inputs))
    for found, wanted in zip(tensors_of(explanation.outputs), expected, strict=True):
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    relevance = explanation.relevance["input_ids"]
    assert relevance.shape == inputs["input_ids"].shape
    assert bool(relevance.isfinite().all())
    assert explanation.ledger is not None
    assert abs(explanation.ledger.residual) < 1e-4


def test_the_texts_are_of_both_kinds(explain: Explain) -> None:
    """Otherwise the test above would say nothing."""
    explainer = explain(BY_NAME["bert"], dtype=torch.float32, exact=False)
    ids, mask = torch.full((2, 3), 7), torch.ones(2, 3, dtype=torch.int64)
    explainer(input_ids=ids, attention_mask=mask * 0)
    explainer(input_ids=ids.to(torch.uint8), attention_mask=mask.int())
    for wrong in (ids[:0], ids[:, :0], ids + VOCABULARY, ids.float()):
        with pytest.raises(InputError):
            explainer(input_ids=wrong, attention_mask=mask[: len(wrong), : wrong.shape[1]])


@FUZZED
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1e-30, 1e30, -1e38, torch.inf, -torch.inf, torch.nan]),
        min_size=6,
        max_size=6,
    ),
    check_finite=st.booleans(),
)
def test_any_number_gives_the_models_outputs(
    explain: Explain, values: list[float], check_finite: bool
) -> None:
    explainer = explain(BY_NAME["mlp"], dtype=torch.float32, exact=False)
    features = torch.tensor([values, [1.0] * 6])
    with torch.no_grad():
        (expected,) = tensors_of(explainer.model(features))
    try:
        explanation = explainer(features, check_finite=check_finite)
    except NonFiniteError:
        assert check_finite
        return
    assert_close(explanation.outputs, expected, equal_nan=True)
    assert bool(explanation.relevance["features"][1].isfinite().all()), "rows are told apart"
    if check_finite:
        assert bool(explanation.relevance["features"].isfinite().all())


def test_threads_share_an_explainer() -> None:
    """Of any sizes, with padding and without, once its programs are compiled."""
    explainer, alone = eager("llama"), eager("llama")
    inputs = [one_row("llama", 3 + seed % 5, seed) for seed in range(16)]
    expected = [relevance_of(alone, one) for one in inputs]
    for one in inputs:
        relevance_of(explainer, one)
    barrier = threading.Barrier(8)

    def call(number: int) -> list[Tensor]:
        barrier.wait()
        order = [(number + i) % len(inputs) for i in range(len(inputs))]
        found = {i: relevance_of(explainer, inputs[i]) for i in order}
        return [found[i] for i in range(len(inputs))]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(call, range(8)):
            assert all(map(torch.equal, found, expected))
    assert explainer.compilations == alone.compilations


def test_threads_compile_at_once() -> None:
    """Equal to rounding: while one captures, PyTorch may run another's ops by other kernels."""
    cases = [BY_NAME[name] for name in ("bert", "mlp", "autoencoder")]
    models = [case.model() for case in cases]  # PyTorch's random numbers are everyone's

    def explained(case: Case, model: nn.Module) -> Explanation:
        explainer = attnlrp_fx.compile(
            model, case.example(3, 5), target=case.target, backend="eager"
        )
        found: Explanation = explainer(case.example(2, 4))
        return found

    expected = [*map(explained, cases, models)]
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(explained, cases, models)]
    for one, other in zip(found, expected, strict=True):
        for name, relevance in one.relevance.items():
            assert_close(relevance, other.relevance[name], rtol=1e-5, atol=1e-7)


def test_two_explainers_of_one_model_are_deterministic() -> None:
    """Bit for bit, in turns, whatever the other one is; and the model is as it was."""
    case = BY_NAME["bert"]
    model, inputs = case.model(), case.example(2, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    example = case.example(3, 5)
    first = attnlrp_fx.compile(model, example, backend="eager")
    other = attnlrp_fx.compile(model, example, backend="eager", composite="cp-lrp", audit=True)
    second = attnlrp_fx.compile(model, example, backend="eager")
    expected = relevance_of(first, inputs)
    assert not torch.equal(relevance_of(other, inputs), expected)
    for explainer in (second, first, second):
        assert torch.equal(relevance_of(explainer, inputs), expected)
    del first, other
    assert torch.equal(relevance_of(second, inputs), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _in_a_child(explainer: ExplainableGraphModule, inputs: Inputs, results: Any) -> None:
    torch.set_num_threads(1)
    results.put(relevance_of(explainer, inputs).tolist())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_explains() -> None:
    explainer, inputs = eager("llama"), one_row("llama", 5, 0)
    expected = relevance_of(explainer, inputs)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=_in_a_child, args=(explainer, inputs, results)) for _ in range(2)
    ]
    for child in children:
        child.start()
    found = [torch.tensor(results.get(timeout=60)) for _ in children]
    for child in children:
        child.join(60)
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_with_a_remedy(way: Any, explain: Explain) -> None:
    """So is what a spawned process would be sent."""
    with pytest.raises(InputError, match="compile in the other process"):
        way(explain(BY_NAME["mlp"]))


def test_too_little_memory_names_what_helps() -> None:
    wide = nn.Sequential(nn.Linear(2, 3_000_000)).eval()
    explainer = attnlrp_fx.compile(wide, torch.ones(2, 2), backend="eager")
    rows = torch.ones(1, 2).expand(3_000_000, 2)  # would take 36 terabytes
    with pytest.raises(OutOfMemoryError) as caught:
        explainer(rows)
    assert "pass fewer rows at a time" in caught.value.remedy
    assert 'memory="small"' in caught.value.remedy
    assert isinstance(caught.value, MemoryError)
    assert explainer(rows[:2]).relevance["input"].shape == (2, 2)


def test_a_gpus_error_is_named_too(explain: Explain) -> None:
    explainer = explain(BY_NAME["mlp"])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with (
        mock.patch.object(type(explainer._running.programs), "serving", side_effect=error),
        pytest.raises(OutOfMemoryError, match="Tried to allocate 2 GiB"),
    ):
        explainer(torch.ones(1, 6, dtype=torch.float64))


def test_other_errors_stay_what_they_are(explain: Explain) -> None:
    explainer = explain(BY_NAME["mlp"])
    with (
        mock.patch.object(
            type(explainer._running.programs), "serving", side_effect=RuntimeError("odd")
        ),
        pytest.raises(RuntimeError, match=r"^odd$"),
    ):
        explainer(torch.ones(1, 6, dtype=torch.float64))


def test_an_interrupted_compilation_leaves_the_model_as_it_was() -> None:
    case = BY_NAME["gpt2"]
    model, example = case.model(), case.example(3, 5)
    states = [p.requires_grad for p in model.parameters()]
    with (
        mock.patch("torch.export.export", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        attnlrp_fx.compile(model, example, backend="eager")
    assert model.config.use_cache
    assert [p.requires_grad for p in model.parameters()] == states
    found = attnlrp_fx.compile(model, example, backend="eager")
    assert torch.equal(relevance_of(found, example), relevance_of(eager("gpt2"), example))


def test_an_interrupted_call_does_not_show_in_the_next() -> None:
    interrupted = [False]

    def backend(graph_module: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if interrupted[0] and len(calls) == 1:
                raise KeyboardInterrupt
            calls.append(1)
            return graph_module.forward(*arguments)

        return run

    calls: list[int] = []
    case = BY_NAME["bert"]
    explainer = attnlrp_fx.compile(case.model(), case.example(3, 5), backend=backend)
    inputs = case.example(2, 6)
    expected = relevance_of(explainer, inputs)
    calls.clear()
    interrupted[0] = True
    with pytest.raises(KeyboardInterrupt):
        explainer(inputs)
    interrupted[0] = False
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(relevance_of(explainer, inputs), expected)


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_an_interrupted_write_leaves_the_old_file(step: str, tmp_path: Path) -> None:
    path = tmp_path / "file.html"
    write_atomically(path, "old")
    with (
        mock.patch(step, side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.html"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_control_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    """At any moment: whatever there is in the end is whole."""

    def begin() -> None:
        # The tests may run in the background, where a shell has this signal ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.nice(10)  # On a busy machine, too, the signal comes before the command has ended.

    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "attnlrp_fx", "explain", "a film", "--html", str(page)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=begin,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("capturing"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest[1]
    assert [p.name for p in tmp_path.iterdir()] == []
