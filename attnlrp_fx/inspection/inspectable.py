"""What an explainer offers for inspection: its graphs as text, as pictures, and as questions."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from attnlrp_fx.files import write_atomically
from attnlrp_fx.inspection.audit import Audit
from attnlrp_fx.inspection.check import PathCheck, check
from attnlrp_fx.inspection.difference import Difference, difference
from attnlrp_fx.inspection.graph import (
    ModelExplorerFiles,
    to_dot,
    to_model_explorer,
    to_networkx,
)
from attnlrp_fx.inspection.graphs import Graphs
from attnlrp_fx.inspection.ledger import Ledger
from attnlrp_fx.inspection.listing import Listing, listing
from attnlrp_fx.inspection.page import page
from attnlrp_fx.inspection.story import Stories, Story, trace
from attnlrp_fx.targets import TargetLike

if TYPE_CHECKING:
    import networkx as nx


class Inspectable:
    """Mixin of an explainer: subclasses say what there is to look at, and how it is audited."""

    def _inspected(self) -> Graphs:
        raise NotImplementedError

    def _audited(
        self,
        args: Any,
        inputs: Any,
        target: TargetLike,
        reference: torch.dtype | None,
        **edits: Any,
    ) -> Audit:
        raise NotImplementedError

    @cached_property
    def _graphs_as_seen(self) -> Graphs:
        return self._inspected()

    def show(self, which: str = "rewritten") -> Listing:
        """A graph as readable Python, in colours in a terminal.

        Each line has its shape, the rule that stands there and what constructed it, and follows the
        user's source line; a program's line has the rewritten node that it is of.

        Args:
            which: "captured", "rewritten" or "program".

        Raises:
            InputError: there is no such graph.
        """
        return listing(self._graphs_as_seen, which)

    def diff(self) -> Difference:
        """The captured and the rewritten graph side by side; `to_html` makes a page of it."""
        return difference(self._graphs_as_seen)

    def trace(self, what: str | fx.Node | nn.Module) -> Story | Stories:
        """What became of a node: the user's line, the pass that claimed it, its rule, its program.

        Args:
            what: a node or its name, in the captured or the rewritten graph; or a module, or its
                path: the stories of all nodes in it.

        Raises:
            InputError: there is no such node or module.
        """
        return trace(self._graphs_as_seen, what, getattr(self, "model", None))

    def check(self) -> PathCheck:
        """Every op of the model between explained inputs and outputs, its rule, by whose authority.

        An op has no rule only if it was compiled with `fallback="gradient"`.
        """
        return check(self._graphs_as_seen)

    def audit(
        self,
        *args: Any,
        target: TargetLike = None,
        reference: torch.dtype | None = None,
        conditions: Any = None,
        interventions: Any = None,
        **inputs: Any,
    ) -> Audit:
        """Where an explanation's relevance goes, and what speaks against trusting it.

        Runs the graph op by op, whatever the backend; nothing is compiled. What the ledger of many
        explanations costs is less if it is compiled in: `compile(..., audit=True)`.

        Args:
            *args: as in a call.
            target: as in a call; one.
            reference: a wider dtype (torch.float32 for a model in bfloat16), in which everything is
                computed once more to see how many digits of relevance hold.
            conditions, interventions: as in a call.
            **inputs: as in a call.

        Raises:
            InputError: the inputs do not fit, or the model is on the meta device.
            TargetError: the outputs do not have the target.
        """
        edits = {"conditions": conditions, "interventions": interventions}
        return self._audited(args, inputs, target, reference, **edits)

    def to_networkx(self, ledger: Ledger | None = None) -> "nx.DiGraph[str]":
        """The rewritten graph; with an explanation's ledger, edges have its relevance."""
        return to_networkx(self._graphs_as_seen, ledger)

    def to_dot(self, ledger: Ledger | None = None) -> str:
        """The rewritten graph in Graphviz's language, a cluster a module."""
        return to_dot(self._graphs_as_seen, ledger)

    def to_model_explorer(self, ledger: Ledger | None = None) -> ModelExplorerFiles:
        """The rewritten graph for Google's model-explorer, rules and relevance as node data."""
        return to_model_explorer(self._graphs_as_seen, ledger)

    def graph_page(
        self, path: str | Path | None = None, ledger: Ledger | None = None, title: str = ""
    ) -> str:
        """A self-contained page of the rewritten graph, folded by module, to look around in.

        Args:
            path: where it is written, whole or not at all.
            ledger: an explanation's, whose relevance is laid over the graph.
            title: what the page is called.
        """
        model = type(getattr(self, "model", self)).__name__
        made = page(self._graphs_as_seen, ledger, title or model)
        if path is not None:
            write_atomically(path, made)
        return made
