"""attnlrp_fx: a compiler that makes transformers explainable.

    explainer = attnlrp_fx.compile(model, inputs)
    explanation = explainer(**inputs)
    explanation.relevance["input_ids"]        # (batch, sequence)

Captures any PyTorch or transformers model as an FX graph, rewrites it with AttnLRP relevance rules
(Achtibat et al., ICML 2024, arXiv 2402.05602), and emits one compiled program that computes the
model's outputs and the relevance of its inputs.
"""

from attnlrp_fx.compiler import compile, explain
from attnlrp_fx.composites import COMPOSITES, Composite, Match
from attnlrp_fx.errors import (
    AttnLRPError,
    BackendError,
    CaptureError,
    InputError,
    MissingExtraError,
    ModelNotFoundError,
    NonFiniteError,
    PassError,
    RuleError,
    TargetError,
)
from attnlrp_fx.explainer import ExplainableGraphModule
from attnlrp_fx.explanation import Explanation
from attnlrp_fx.ledger import Ledger
from attnlrp_fx.rules import (
    Attention,
    Constant,
    Epsilon,
    Gradient,
    Identity,
    Rule,
    StatisticConstant,
    Taylor,
    Uniform,
    Winner,
)
from attnlrp_fx.targets import Contrast, Logit, LogProb

__version__ = "0.1.0"

__all__ = [
    "COMPOSITES",
    "Attention",
    "AttnLRPError",
    "BackendError",
    "CaptureError",
    "Composite",
    "Constant",
    "Contrast",
    "Epsilon",
    "ExplainableGraphModule",
    "Explanation",
    "Gradient",
    "Identity",
    "InputError",
    "Ledger",
    "LogProb",
    "Logit",
    "Match",
    "MissingExtraError",
    "ModelNotFoundError",
    "NonFiniteError",
    "PassError",
    "Rule",
    "RuleError",
    "StatisticConstant",
    "TargetError",
    "Taylor",
    "Uniform",
    "Winner",
    "compile",
    "explain",
]
