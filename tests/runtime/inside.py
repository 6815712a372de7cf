"""Explainers of latent values that several test files share; models are captured once."""

import functools
from unittest import mock

import torch
from models import BY_NAME

import attnlrp_fx
from attnlrp_fx import compiler
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.passes import PIPELINE, drop_assertions, promote_casts

EXACT = (drop_assertions, promote_casts, *PIPELINE)


@functools.cache
def model_of(name, dtype=torch.float64):
    return BY_NAME[name].model(dtype)


@functools.cache
def captured(name, dtype=torch.float64):
    return capture(model_of(name, dtype), BY_NAME[name].example(3, 5, dtype))


@functools.cache
def explainer(name, *latent, composite="attnlrp", **options):
    """An explainer in float64 that keeps the ledger; models are captured once."""
    with mock.patch.object(compiler, "capture", return_value=captured(name)):
        options = {"backend": "eager", "audit": True, "passes": EXACT, **options}
        return attnlrp_fx.compile(model_of(name), composite=composite, latent=latent, **options)


def example(name, batch=2, length=7):
    return BY_NAME[name].example(batch, length, torch.float64)
