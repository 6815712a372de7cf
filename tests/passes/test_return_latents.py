"""return_latents: marked values leave the graph behind the model's outputs."""

import pytest
import torch
from rewriting import captured, run
from torch import nn

from attnlrp_fx import COMPOSITES, InputError, Match
from attnlrp_fx.passes import PIPELINE, PassContext, run_passes
from attnlrp_fx.rules.rules import Constant


def rewritten(composite):
    model = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 2)).eval()
    given = {"input": torch.randn(2, 4)}
    graph = captured(model, given)
    run_passes(graph, PassContext(latent=("1", "2"), composite=composite), PIPELINE)
    return model, graph, given


def test_values_stand_behind_the_outputs():
    model, graph, given = rewritten(COMPOSITES["attnlrp"])
    output, activation, last = run(graph, given)
    torch.testing.assert_close(activation, model[:2](given["input"]))
    torch.testing.assert_close(last, model(given["input"]))
    assert torch.equal(output, last)


def test_a_value_that_no_relevance_reaches_is_an_error():
    held = COMPOSITES["attnlrp"].with_rules((Match(module="2"), Constant()))
    with pytest.raises(InputError, match="relevance never reaches '1'"):
        rewritten(held)
