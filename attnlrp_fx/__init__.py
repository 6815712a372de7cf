"""attnlrp_fx: a compiler that makes transformers explainable.

    explainer = attnlrp_fx.compile(model, inputs)
    explanation = explainer(**inputs)
    explanation.relevance["input_ids"]        # (batch, sequence)

Captures any PyTorch or transformers model as an FX graph, rewrites it with AttnLRP relevance rules
(Achtibat et al., ICML 2024, arXiv 2402.05602), and emits one compiled program that computes the
model's outputs and the relevance of its inputs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlrp_fx.compiler import compile, explain, explain_generation, explain_image
    from attnlrp_fx.errors import (
        ArtefactError,
        AttnLRPError,
        BackendError,
        CaptureError,
        InputError,
        MissingExtraError,
        ModelNotFoundError,
        NonFiniteError,
        OutOfMemoryError,
        PassError,
        RuleError,
        TargetError,
    )
    from attnlrp_fx.evaluate.faithfulness import Curves, Perturbation, perturbation_curves
    from attnlrp_fx.evaluate.tuning import tune
    from attnlrp_fx.graph.sites import SAE
    from attnlrp_fx.heatmap.display import Display
    from attnlrp_fx.inspection.audit import Audit
    from attnlrp_fx.inspection.caveats import Caveat
    from attnlrp_fx.inspection.ledger import Ledger
    from attnlrp_fx.neurons import Neuron
    from attnlrp_fx.restoring import load
    from attnlrp_fx.rules.composites import COMPOSITES, Composite, Match, epsilon_gamma_box
    from attnlrp_fx.rules.rules import (
        AlphaBeta,
        Attention,
        Constant,
        Epsilon,
        Explained,
        Flat,
        Gamma,
        Gradient,
        Identity,
        Join,
        Pass,
        Rule,
        StatisticConstant,
        Taylor,
        Uniform,
        Winner,
        WSquare,
        ZBox,
        ZPlus,
    )
    from attnlrp_fx.runtime.ahead import AheadOfTimeExplainer, load_aot
    from attnlrp_fx.runtime.comparison import Comparison
    from attnlrp_fx.runtime.editing import Ablate, Clamp, Keep, Scale
    from attnlrp_fx.runtime.explainer import ExplainableGraphModule
    from attnlrp_fx.runtime.explanation import Explanation
    from attnlrp_fx.runtime.explanations import Explanations
    from attnlrp_fx.runtime.flow import Flow
    from attnlrp_fx.runtime.latent import Latent, Latents
    from attnlrp_fx.runtime.mapping import Mapped, Throughput
    from attnlrp_fx.runtime.weight_relevance import WeightRelevance
    from attnlrp_fx.statistics.collect import latent_statistics
    from attnlrp_fx.statistics.relevance import write_relevance
    from attnlrp_fx.statistics.report import LatentStatistics
    from attnlrp_fx.statistics.shards import PartialStatistics, merge_statistics
    from attnlrp_fx.targets import Contrast, Logit, LogProb

__version__ = "0.1.0"

__all__ = [
    "COMPOSITES",
    "SAE",
    "Ablate",
    "AheadOfTimeExplainer",
    "AlphaBeta",
    "ArtefactError",
    "Attention",
    "AttnLRPError",
    "Audit",
    "BackendError",
    "CaptureError",
    "Caveat",
    "Clamp",
    "Comparison",
    "Composite",
    "Constant",
    "Contrast",
    "Curves",
    "Display",
    "Epsilon",
    "ExplainableGraphModule",
    "Explained",
    "Explanation",
    "Explanations",
    "Flat",
    "Flow",
    "Gamma",
    "Gradient",
    "Identity",
    "InputError",
    "Join",
    "Keep",
    "Latent",
    "LatentStatistics",
    "Latents",
    "Ledger",
    "LogProb",
    "Logit",
    "Mapped",
    "Match",
    "MissingExtraError",
    "ModelNotFoundError",
    "Neuron",
    "NonFiniteError",
    "OutOfMemoryError",
    "PartialStatistics",
    "Pass",
    "PassError",
    "Perturbation",
    "Rule",
    "RuleError",
    "Scale",
    "StatisticConstant",
    "TargetError",
    "Taylor",
    "Throughput",
    "Uniform",
    "WSquare",
    "WeightRelevance",
    "Winner",
    "ZBox",
    "ZPlus",
    "compile",
    "epsilon_gamma_box",
    "explain",
    "explain_generation",
    "explain_image",
    "latent_statistics",
    "load",
    "load_aot",
    "merge_statistics",
    "perturbation_curves",
    "tune",
    "write_relevance",
]

_HOMES = {
    "runtime.comparison": ("Comparison",),
    "compiler": ("compile", "explain", "explain_generation", "explain_image"),
    "rules.composites": ("COMPOSITES", "Composite", "Match", "epsilon_gamma_box"),
    "errors": (
        "ArtefactError",
        "AttnLRPError",
        "BackendError",
        "CaptureError",
        "InputError",
        "MissingExtraError",
        "ModelNotFoundError",
        "NonFiniteError",
        "OutOfMemoryError",
        "PassError",
        "RuleError",
        "TargetError",
    ),
    "neurons": ("Neuron",),
    "runtime.flow": ("Flow",),
    "graph.sites": ("SAE",),
    "runtime.editing": ("Ablate", "Clamp", "Keep", "Scale"),
    "runtime.latent": ("Latent", "Latents"),
    "runtime.explainer": ("ExplainableGraphModule",),
    "runtime.explanation": ("Explanation",),
    "runtime.explanations": ("Explanations",),
    "evaluate.faithfulness": ("Curves", "Perturbation", "perturbation_curves"),
    "heatmap.display": ("Display",),
    "inspection.audit": ("Audit",),
    "inspection.caveats": ("Caveat",),
    "inspection.ledger": ("Ledger",),
    "runtime.mapping": ("Mapped", "Throughput"),
    "runtime.weight_relevance": ("WeightRelevance",),
    "statistics.collect": ("latent_statistics",),
    "statistics.report": ("LatentStatistics",),
    "statistics.shards": ("PartialStatistics", "merge_statistics"),
    "rules.rules": (
        "AlphaBeta",
        "Attention",
        "Constant",
        "Epsilon",
        "Explained",
        "Flat",
        "Gamma",
        "Gradient",
        "Identity",
        "Join",
        "Pass",
        "Rule",
        "StatisticConstant",
        "Taylor",
        "Uniform",
        "WSquare",
        "Winner",
        "ZBox",
        "ZPlus",
    ),
    "restoring": ("load",),
    "runtime.ahead": ("AheadOfTimeExplainer", "load_aot"),
    "statistics.relevance": ("write_relevance",),
    "targets": ("Contrast", "Logit", "LogProb"),
    "evaluate.tuning": ("tune",),
}
"""Where each name lives. A name is imported when it is first used: PyTorch takes seconds to import,
and `attnlrp-fx --help` has no use for it."""

if not TYPE_CHECKING:  # a type checker reads the imports above, and still finds a wrong name

    def __getattr__(name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names:
                value = getattr(import_module(f"attnlrp_fx.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module 'attnlrp_fx' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
