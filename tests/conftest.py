"""Fixtures that several test files share: compiled explainers are made once a session."""

import functools
import gc
import logging
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from models import Case
from torch import nn

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, compiler
from attnlrp_fx.capture import capture
from attnlrp_fx.capture.capture import Captured
from attnlrp_fx.passes import PIPELINE, drop_assertions, promote_casts

torch.set_num_threads(1)
gc.set_threshold(100_000, 50, 100)  # looking through all that is compiled took 5 % of the time
logging.getLogger("torch.__trace").addFilter(lambda record: False)  # pytest keeps every record

EXAMPLE = (3, 5)
"""Batch and length that models are captured with; the tests run others."""


@functools.cache
def _model(case: Case, dtype: torch.dtype) -> nn.Module:
    return case.model(dtype)


@functools.cache
def _captured(case: Case, dtype: torch.dtype) -> Captured:
    return capture.capture(_model(case, dtype), case.example(*EXAMPLE, dtype))


@functools.cache
def _explainer(
    case: Case, composite: str, dtype: torch.dtype, audit: bool, exact: bool
) -> ExplainableGraphModule:
    captured = _captured(case, dtype)
    with mock.patch.object(compiler, "capture", return_value=captured):
        return attnlrp_fx.compile(
            _model(case, dtype),
            case.example(*EXAMPLE, dtype),
            composite=composite,
            target=case.target,
            backend="eager",
            audit=audit,
            passes=(drop_assertions, promote_casts, *PIPELINE) if exact else PIPELINE,
        )


Explain = Callable[..., ExplainableGraphModule]


@pytest.fixture(scope="session")
def explain() -> Explain:
    """Compiled explainers by case, composite and dtype; a model is captured once for all."""

    def explain(
        case: Case,
        composite: str = "attnlrp",
        dtype: torch.dtype = torch.float64,
        audit: bool = True,
        exact: bool = True,
    ) -> ExplainableGraphModule:
        return _explainer(case, composite, dtype, audit, exact)

    return explain


Captures = Callable[[Case], tuple[nn.Module, Captured]]


@pytest.fixture(scope="session")
def captures() -> Captures:
    """Models in float64 and their captures by case: those that `explain` compiles from."""

    def captures(case: Case) -> tuple[nn.Module, Captured]:
        return _model(case, torch.float64), _captured(case, torch.float64)

    return captures
