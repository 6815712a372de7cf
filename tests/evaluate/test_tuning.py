"""The search for γ: what it tries, what it keeps of a composite, what it finds."""

import math

import pytest
import torch
from rich.console import Console
from torch import nn

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Epsilon, Gamma, InputError, Match, Perturbation
from attnlrp_fx.evaluate import Subject
from attnlrp_fx.evaluate.tuning import with_gammas
from attnlrp_fx.graph.operators import Kind


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


def test_with_gammas_replaces_what_is_said_of_a_role():
    """A role that the composite knows keeps its place, so what stands before it still wins."""
    vision = COMPOSITES["attnlrp-vision"]
    tuned = with_gammas(vision, {"dense": 0.1, "join": 0.2})
    node = attnlrp_fx.compile(network(), torch.rand(2, 1, 6, 6), backend="eager")
    assert tuned.entries[0] == (Match(role="join"), Gamma(0.2))
    assert len(tuned.entries) == len(vision.entries) + 1
    first = next(n for n in node.rewritten.graph.nodes if "linear" in n.name)
    assert tuned.rule_for(first, Kind.LINEAR, {"dense"}) == Gamma(0.1)
    assert tuned.rule_for(first, Kind.LINEAR, {"dense", "projection"}) == Epsilon()
    assert tuned.rule_for(first, Kind.LINEAR, {"convolution"}) == Gamma(0.25)


def test_every_combination_is_tried_on_every_row():
    data = [{"input": torch.rand(3, 1, 6, 6)}, {"input": torch.rand(2, 1, 6, 6)}]
    found = attnlrp_fx.tune(
        network(),
        data,
        gammas={"convolution": (0, 0.5), "dense": (0, 0.25, 1)},
        perturbation=Perturbation(steps=5, patch=2),
        progress=False,
    )
    tried = {tuple(trial.gammas.values()) for trial in found.trials}
    assert tried == {(c, d) for c in (0, 0.5) for d in (0, 0.25, 1)}
    assert found.rows == 5
    scores = [trial.score for trial in found.trials]
    assert scores == sorted(scores, reverse=True)
    assert found.composite is found.best.composite


def test_scores_are_those_of_the_curves():
    """A trial's score is what its composite, compiled anew, gets; the table shows it."""
    data = {"input": torch.rand(4, 1, 6, 6)}
    options = Perturbation(steps=5, patch=2)
    net = network()
    found = attnlrp_fx.tune(
        net, data, gammas={"dense": (0, 0.5)}, perturbation=options, progress=False
    )
    for trial in found.trials:
        explainer = attnlrp_fx.compile(net, data, composite=trial.composite, backend="eager")
        question = Subject(explainer).ask(data)
        relevance = explainer(data).relevance["input"]
        curves = attnlrp_fx.perturbation_curves(question, relevance, perturbation=options)
        assert math.isclose(trial.score, float(curves.area.mean()), rel_tol=1e-5)
        assert math.isclose(trial.error, float(curves.area.std()) / 2, rel_tol=1e-4)
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(found)
    assert f"{found.best.score:.4g}" in capture.get()
    assert "γ dense" in capture.get()


def test_errors():
    data = {"input": torch.rand(2, 1, 6, 6)}
    with pytest.raises(InputError, match="no data"):
        attnlrp_fx.tune(network(), [], progress=False)
    with pytest.raises(InputError, match="no γ to try"):
        attnlrp_fx.tune(network(), data, gammas={"dense": ()}, progress=False)
    with pytest.raises(attnlrp_fx.RuleError, match="no role 'linear'"):
        attnlrp_fx.tune(network(), data, gammas={"linear": (0.1,)}, progress=False)
    with pytest.raises(ValueError, match="gamma must be 0 or more"):
        attnlrp_fx.tune(network(), data, gammas={"dense": (-0.1,)}, progress=False)
