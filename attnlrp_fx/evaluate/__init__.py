"""How good explanations are: faithfulness, known evidence, rival methods, better rules.

subject = Subject.compile(model, inputs)
question = subject.ask(inputs)
relevance = METHODS["ig"](subject, inputs, question.target)
perturbation_curves(question, relevance).area          # ΔA^F of each row
"""

from attnlrp_fx.evaluate.evidence import (
    evidence_share,
    intersection_over_union,
    rank_accuracy,
    top1_in_evidence,
)
from attnlrp_fx.evaluate.faithfulness import Curves, Perturbation, perturbation_curves
from attnlrp_fx.evaluate.intervals import Interval, interval, paired_difference
from attnlrp_fx.evaluate.measuring import Batch, Measured, Scores, measure, measured
from attnlrp_fx.evaluate.methods import METHODS, Method, method_named
from attnlrp_fx.evaluate.robustness import (
    conservation,
    infidelity,
    randomisation,
    sensitivity,
)
from attnlrp_fx.evaluate.subjects import Question, Subject
from attnlrp_fx.evaluate.tuning import tune

__all__ = [
    "METHODS",
    "Batch",
    "Curves",
    "Interval",
    "Measured",
    "Method",
    "Perturbation",
    "Question",
    "Scores",
    "Subject",
    "conservation",
    "evidence_share",
    "infidelity",
    "intersection_over_union",
    "interval",
    "measure",
    "measured",
    "method_named",
    "paired_difference",
    "perturbation_curves",
    "randomisation",
    "rank_accuracy",
    "sensitivity",
    "top1_in_evidence",
    "tune",
]
