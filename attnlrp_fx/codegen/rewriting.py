"""Rewriting: a captured graph with a rule at every explained node, and what each pass did."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from attnlrp_fx.capture.capture import Captured
from attnlrp_fx.codegen.report import RuleCount
from attnlrp_fx.graph.provenance import module_path, short_source, target_name
from attnlrp_fx.passes import Pass, PassContext, PassResult, run_passes
from attnlrp_fx.torch_private import lazy_graph_module


@dataclass(frozen=True)
class Rewriting:
    """A rewritten graph, how it came about, and what each step did."""

    graph_module: fx.GraphModule
    context: PassContext
    passes: tuple[Pass, ...]
    results: tuple[PassResult, ...]

    def rule_counts(self) -> tuple[RuleCount, ...]:
        """Each rule and op with its count, most frequent first."""
        counts: Counter[tuple[str, str]] = Counter()
        first: dict[tuple[str, str], str] = {}
        for node in self.graph_module.graph.nodes:
            if "rule" in node.meta:
                op = node.meta.get("op", node.target)
                key = node.meta["rule"], op if isinstance(op, str) else target_name(op)
                counts[key] += 1
                first.setdefault(key, f"{module_path(node)} {short_source(node)}".strip())
        return tuple(RuleCount(*key, n, first[key]) for key, n in counts.most_common())

    def fallbacks(self) -> tuple[str, ...]:
        """Ops that fell through to their gradient: node and source line."""
        notes = [note for result in self.results for note in result.notes]
        mark = "gradient fallback: "
        return tuple(note.removeprefix(mark) for note in notes if note.startswith(mark))


def rewrite(captured: Captured, context: PassContext, passes: Sequence[Pass]) -> Rewriting:
    """Run passes on a copy of a captured graph.

    Raises:
        InputError: an input to explain does not exist, or relevance cannot reach it.
        RuleError: no rule claims an op, or a rule stands at an op that it does not fit.
    """
    rewritten = _copy(captured.graph_module)
    results = run_passes(rewritten, context, tuple(passes))
    return Rewriting(rewritten, context, tuple(passes), tuple(results))


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph once more, on the same parameters."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, values)
    graph.output(output)
    return lazy_graph_module(graph_module, graph)
