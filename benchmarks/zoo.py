"""The zoo: every architecture of transformers, tiny and random, through the compiler and both laws.

    python benchmarks/zoo.py                        # everything that is not in the results yet
    python benchmarks/zoo.py --only llama --only t5 --fresh
    python benchmarks/zoo.py --failed-again         # those that did not pass every check
    python benchmarks/zoo.py --backend inductor --limit 600 --sample 60    # what Inductor makes
    python benchmarks/zoo.py --list

Each architecture runs in a process of its own, with a time limit. Results are appended to
`results/zoo.jsonl` (how a run resumes) and written as a table, `results/zoo.md` and `.json`.

Checked in float64, eager backend:
- captured, and how far batch and length stayed dynamic;
- rewritten with composite "attnlrp", every op claimed by a rule;
- law 1, on the tape: target − inputs − absorbed, relative to the target; with what a model casts to
  float32 computed in float64, so that rounding does not hide an error;
- law 2, on the tape: composite "gradient" against torch.autograd on the untouched model;
- the program: its relevance against the tape's, and its outputs against the model's own;
- both at another size, where that is dynamic;
- relevance with attention written out ("eager") against fused ("sdpa").

With another backend, its programs alone are checked, against the tape and the model; how many of
them it could not take, so that they run op by op, is counted. Results go to files of its own.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import random
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
import zoo_models
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from zoo_models import BATCH, LENGTH, Architecture, Inputs

import attnlrp_fx
from attnlrp_fx.calculus.tape import Audited, Tape
from attnlrp_fx.capture.capture import flat_inputs
from attnlrp_fx.errors import AttnLRPError, InputError
from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.inspection.ledger import Book, Ledger
from attnlrp_fx.inspection.seeded import of_outputs
from attnlrp_fx.passes import (
    NORMALISE,
    PIPELINE,
    Pass,
    PassContext,
    drop_assertions,
    mark_sources,
    promote_casts,
    run_passes,
)
from attnlrp_fx.rules.composites import COMPOSITES
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.runtime.seeding import seeds_of
from attnlrp_fx.targets import Logit, Outputs, dense

RESULTS = Path(__file__).parent / "results"
EXACT, CAST = 1e-8, 1e-5
"""What holds in float64, and where the model itself casts to float32."""
OTHER_BATCH, OTHER_LENGTH = BATCH + 1, LENGTH + 4
BEFORE_RULES = (*NORMALISE, mark_sources)
PROMOTED = (drop_assertions, promote_casts, *PIPELINE)

console = Console()


@dataclass
class Row:
    """What was found out about one architecture."""

    name: str
    kind: str
    class_name: str
    captured: bool = False
    rewritten: bool = False
    casts: bool = False
    """Whether the model casts explained values to float32 or less; compiled, whether any."""
    forward: float | None = None
    program: float | None = None
    """The program's relevance against the tape's."""
    law_1: float | None = None
    law_2: float | None = None
    backend: str = "eager"
    refused: int = 0
    """How many programs the backend could not compile, so that they run op by op."""
    dynamic_batch: bool | None = None
    dynamic_length: bool | None = None
    """None where the inputs have no length."""
    other_forward: float | None = None
    other_law_2: float | None = None
    other_program: float | None = None
    attention: float | None = None
    """Relevance with fused against written-out attention; None where there is one form only."""
    share: float | None = None
    """Σ relevance / target."""
    nodes: int = 0
    seconds: float = 0.0
    stage: str = "building the model"
    """Where it stopped; "done" if it did not."""
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        return CAST if self.casts else EXACT

    def holds(self, check: str) -> bool:
        """Whether a check was made and holds."""
        value = getattr(self, check)
        if isinstance(value, bool):
            return value
        tolerance = EXACT if check == "law_1" else self.tolerance
        return value is not None and value <= tolerance

    @property
    def passed(self) -> bool:
        """Whether every check that applies holds."""
        checks = ["captured", "rewritten", "forward", "program"]
        if self.backend == "eager":
            checks += ["law_1", "law_2"]
        others = ("other_forward", "other_law_2", "other_program")
        optional = [check for check in others if getattr(self, check) is not None]
        attention = self.attention is None or self.attention <= max(self.tolerance, 1e-5)
        made = self.stage == "done" and not self.refused
        return made and attention and all(map(self.holds, checks + optional))


def examine(arch: Architecture, row: Row) -> Iterator[None]:
    """Fill in a row, check by check; yields before each so that what is known can be kept."""
    start = time.perf_counter()
    model = arch.model()
    inputs = arch.inputs(model)
    _run(model, inputs)
    row.stage = "capture"
    yield
    captured = attnlrp_fx.capture.capture.capture(model, inputs)
    row.captured = True
    row.nodes = len(captured.graph_module.graph.nodes)
    row.notes = list(captured.notes)
    row.stage = "rewrite"
    yield
    rules = explained(model, inputs, captured, "attnlrp", traced=False)
    row.rewritten = True
    row.casts = _casts(captured.graph_module, row.backend)
    row.stage = "law 1"
    yield
    relevance, ledger = on_tape(rules, inputs)
    gradient = None
    if row.backend == "eager":
        if row.casts:
            exact = explained(model, inputs, captured, "attnlrp", traced=False, passes=PROMOTED)
            _, ledger = on_tape(exact, inputs)
        row.law_1 = _number(abs(ledger.residual) / max(abs(ledger.target), 1e-12))
        row.share = _number(sum(ledger.inputs.values()) / ledger.target)
        row.stage = "law 2"
        yield
        gradient = explained(model, inputs, captured, "gradient", traced=False)
        row.law_2 = _against_autograd(model, gradient, inputs)
    row.stage = "program"
    yield
    explainer = explained(model, inputs, captured, "attnlrp", backend=row.backend)
    refused = [why for made in explainer.report().compilations for why in made.refused]
    row.refused, row.reason = len(refused), next(iter(refused), "")
    explanation = explainer(inputs)
    row.forward = _difference(_flat(explanation.outputs), _flat(_run(model, inputs)))
    row.program = _relevance_difference(explanation.relevance, relevance)
    row.stage = "other sizes"
    yield
    row.dynamic_batch, row.dynamic_length, other = _other_sizes(arch, model, inputs, captured)
    if other is not None:
        try:
            again = explainer(other)
        except InputError as error:  # the model takes another path there, and the program says so
            row.notes.append(f"length is dynamic within bounds: {error.why}")
            row.dynamic_length, other = False, arch.inputs(model, OTHER_BATCH, LENGTH)
            again = explainer(other)
        if gradient is not None:
            row.other_law_2 = _against_autograd(model, gradient, other)
        row.other_forward = _difference(_flat(again.outputs), _flat(_run(model, other)))
        row.other_program = _relevance_difference(again.relevance, on_tape(rules, other)[0])
    yield
    row.stage = "attention"
    yield
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if row.backend == "eager" and implementation == "sdpa":
        row.attention = _attention(model, inputs, relevance)
    row.stage = "done"
    row.seconds = round(time.perf_counter() - start, 1)
    yield


def explained(
    model: nn.Module,
    inputs: Inputs,
    captured: Any,
    composite: str,
    *,
    traced: bool = True,
    backend: str = "eager",
    passes: tuple[Pass, ...] = PIPELINE,
) -> ExplainableGraphModule:
    """Compile with a capture that exists already; untraced, it can only be run on the tape."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("attnlrp_fx.compiler.capture", return_value=captured))
        if not traced:
            patched = mock.patch.object(ExplainableGraphModule, "prepare", lambda self: self)
            stack.enter_context(patched)
        return attnlrp_fx.compile(
            model, inputs, composite=composite, backend=backend, passes=passes
        )


def on_tape(explainer: ExplainableGraphModule, inputs: Inputs) -> tuple[dict[str, Tensor], Ledger]:
    """Relevance of the default target, node by node, without tracing a program; and the ledger."""
    rewritten = explainer.rewritten
    device = torch.device("cpu")
    values = explainer._running.checks.ordered(flat_inputs(inputs), device)
    given = dict(zip(explainer._running.checks.examples, values, strict=True))
    with torch.no_grad():
        tape = Tape(rewritten, explainer._running.attributes.values(device))
        flat = tape.run(*values)
        chosen, found = seeds_of(
            explainer._running.target,
            explainer.rewritten,
            explainer._running.convention,
            flat,
            given,
        )
        seeds = {i: dense(seed, flat[i]) for i, seed in found.items()}
        outputs = rewritten.graph.output_node().args[0]
        starting = {outputs[i]: seed for i, seed in seeds.items()}
        read = tape.reverse(starting, Audited.EVERY)
    ledger = Book(rewritten.graph).read(
        {key: float(value) for key, value in read.postings.items()},
        target=float(chosen.value.double().sum()),
        seeded=of_outputs(found, flat, rewritten),
        inputs={name: float(r.double().sum()) for name, r in read.relevance.items()},
    )
    return read.relevance, ledger


def _relevance_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any input's relevance."""
    if ours.keys() != theirs.keys():
        raise AssertionError(f"explained {sorted(ours)}, wanted {sorted(theirs)}")
    if not all(bool(torch.isfinite(relevance).all()) for relevance in ours.values()):
        raise AssertionError("relevance is not finite")
    return max(_difference([ours[name]], [theirs[name]]) for name in ours)


def _attention(model: Any, inputs: Inputs, relevance: Mapping[str, Tensor]) -> float | None:
    """How far relevance of written-out attention is from that of the fused one.

    None where the model has no other, or does not run with it itself.
    """
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        return None
    try:
        _run(model, inputs)
    except RuntimeError:
        return None
    written = attnlrp_fx.capture.capture.capture(model, inputs, dynamic_shapes=None)
    explainer = explained(model, inputs, written, "attnlrp", traced=False)
    return _relevance_difference(on_tape(explainer, inputs)[0], relevance)


def _other_sizes(
    arch: Architecture, model: nn.Module, inputs: Inputs, captured: Any
) -> tuple[bool, bool | None, Inputs | None]:
    """Whether batch and length stayed dynamic, and the inputs of other sizes that this allows.

    The length is None where the inputs have none.
    """
    shapes = {
        str(node.target): node.meta["val"].shape
        for node in captured.graph_module.graph.find_nodes(op="placeholder")
    }

    def fits(other: Inputs) -> bool:
        tensors = {n: v for n, v in flat_inputs(other).items() if isinstance(v, Tensor)}
        held = [name for name in tensors if name not in shapes]
        return all(torch.equal(tensors[n], captured.constants[n]) for n in held) and all(
            not is_concrete_int(known) or int(known) == size
            for name, shape in shapes.items()
            for known, size in zip(shape, tensors[name].shape, strict=True)
        )

    batch = fits(arch.inputs(model, OTHER_BATCH, LENGTH))
    longer = arch.inputs(model, BATCH, OTHER_LENGTH)
    length = fits(longer) if _shapes(longer) != _shapes(inputs) else None
    if not batch and not length:
        return batch, length, None
    sizes = OTHER_BATCH if batch else BATCH, OTHER_LENGTH if length else LENGTH
    return batch, length, arch.inputs(model, *sizes)


def _run(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad(), _without_cache(model):
        return model(**inputs)


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Caches off: they are no part of what is explained."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


class _LookUps(TorchFunctionMode):
    """Notes what is looked up in embeddings; what comes from an input becomes a leaf of autograd.

    `origins` has, for each look-up and each input, the element of the input that an index is from.
    """

    def __init__(self, origins: Sequence[Mapping[str, Tensor]] = ()) -> None:
        super().__init__()
        self.origins = origins
        self.indices: list[Tensor] = []
        self.leaves: list[tuple[Tensor, Mapping[str, Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.embedding:
            return output
        known = self.origins[len(self.indices)] if self.origins else {}
        self.indices.append(args[0].clone())
        if not known:
            return output
        leaf = output.detach().requires_grad_()
        self.leaves.append((leaf, known))
        return leaf.clone()


def _origins(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> list[dict[str, Tensor]]:
    """Which element of an input each looked-up index is from, -1 for none.

    Found by changing tokens, so that it holds wherever a model moves them: half of the tokens at a
    time, those whose number has a bit and those whose number has not. Special tokens, which a
    model may count, stay; where all others are looked up in place, so are they.
    """

    def indices(given: Inputs) -> list[Tensor]:
        with _LookUps() as looked_up:
            _run(model, given)
        return looked_up.indices

    before = indices(inputs)
    origins: list[dict[str, Tensor]] = [{} for _ in before]
    for name in names:
        ids = inputs[name]
        numbers = torch.arange(ids.numel()).view(ids.shape)
        others = zoo_models.other_ids(ids, tokens=name.endswith("input_ids"))
        origin = [torch.full(index.shape, -1) for index in before]
        for bit in range(max(1, (ids.numel() - 1).bit_length())):
            has = (numbers >> bit) % 2 == 1
            ones, zeros = (
                indices({**inputs, name: torch.where(which, others, ids)}) for which in (has, ~has)
            )
            for at, old, one, zero in zip(origin, before, ones, zeros, strict=True):
                if bool(((one != old) & (zero != old)).any()):
                    raise AssertionError(f"one look-up is of several tokens of '{name}'")
                at[((one != old) | (zero != old)) & (at < 0)] = 0
                at[one != old] += 1 << bit
        for known, at in zip(origins, origin, strict=True):
            found = at >= 0
            if bool(found.any()):
                in_place = at.shape == ids.shape and bool((at == numbers)[found].all())
                known[name] = numbers if in_place else at
    return origins


def _against_autograd(model: nn.Module, explainer: ExplainableGraphModule, inputs: Inputs) -> float:
    """Relative difference of a gradient program from torch.autograd's Gradient×Input."""
    relevance, _ = on_tape(explainer, inputs)
    given = {
        name: value.clone().requires_grad_() if zoo_models._is_floating(value) else value
        for name, value in inputs.items()
    }
    tokens = [
        name
        for name, value in inputs.items()
        if not zoo_models._is_floating(value) and (name in relevance or name.endswith("input_ids"))
    ]
    origins = _origins(model, inputs, tokens)
    model.requires_grad_(False)
    with _without_cache(model), torch.enable_grad(), _LookUps(origins) as looked_up:
        tree = model(**given)
    target = _target(tree, inputs)
    points = {n: v for n, v in given.items() if zoo_models._is_floating(v)}
    leaves = [leaf for leaf, _ in looked_up.leaves]
    grads = torch.autograd.grad(target.sum(), [*points.values(), *leaves], allow_unused=True)
    wanted: dict[str, Tensor] = {}
    for (name, value), grad in zip(points.items(), grads, strict=False):
        if grad is not None:
            wanted[name] = (value * grad).detach()
    for (leaf, known), grad in zip(looked_up.leaves, grads[len(points) :], strict=True):
        if grad is None:
            continue
        product = (leaf * grad).detach().sum(-1)
        for name, origin in known.items():
            total = wanted.setdefault(name, torch.zeros(inputs[name].shape, dtype=product.dtype))
            from_it = origin >= 0
            total.view(-1).index_add_(0, origin[from_it], product[from_it])
    return _relevance_difference(relevance, wanted)


def _target(tree: Any, inputs: Inputs) -> Tensor:
    """The default target on the model's own outputs."""
    leaves, _ = pytree.tree_flatten(tree)
    floating = [v for v in leaves if zoo_models._is_floating(v) and v.dim() > 0]
    logits = getattr(tree, "logits", None)
    first = logits if isinstance(logits, Tensor) else floating[0]
    named = {"logits": first}
    masks = {n: v for n, v in inputs.items() if n.endswith("attention_mask") and v.dim() == 2}
    return Logit().choose(Outputs(named, tree, masks)).value


def _flat(tree: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(tree) if zoo_models._is_floating(v)]


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest relative difference, each tensor relative to its largest element."""
    if len(ours) != len(theirs):
        raise AssertionError(f"{len(ours)} outputs against {len(theirs)}")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"shape {tuple(a.shape)} against {tuple(b.shape)}")
        if b.numel():
            same = (a == b) | (a.isnan() & b.isnan())
            gap = torch.where(same, 0.0, (a - b).abs()).max()
            finite = b[torch.isfinite(b)]
            scale = finite.abs().max() if finite.numel() else torch.ones(())
            worst = max(worst, _number(gap / scale.clamp(min=1e-12)))
    return worst


def _number(value: Any) -> float:
    """A float that JSON can hold: NaN is infinite."""
    value = float(value)
    return value if value == value and abs(value) < 1e300 else 1e300


def _shapes(inputs: Inputs) -> list[Any]:
    return [tuple(v.shape) for v in inputs.values() if isinstance(v, Tensor)]


def _casts(captured: torch.fx.GraphModule, backend: str) -> bool:
    """Whether a value that depends on what is explained is cast below float64.

    What does not, as rotary tables, differs between backends by rounding, too.
    """
    marked = copy.deepcopy(captured.graph)
    graph_module = torch.fx.GraphModule(captured, marked)
    run_passes(graph_module, PassContext(None, COMPOSITES["gradient"], "error"), BEFORE_RULES)
    low = (torch.float32, torch.bfloat16, torch.float16)
    graph = graph_module.graph
    return any(
        isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dtype in low
        for node in (explained_values(graph) if backend == "eager" else graph.nodes)
    )


def _worker(name: str, backend: str, path: str) -> None:
    """Examine one architecture, and leave the row in a file after each check."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    arch = zoo_models.architectures()[name]
    row = Row(arch.name, arch.kind, arch.class_name, backend=backend)
    start = time.perf_counter()
    try:
        for _ in examine(arch, row):
            _write(Path(path), json.dumps(asdict(row)))
    except Exception as error:
        row.reason = _reason(error)
        row.seconds = round(time.perf_counter() - start, 1)
        if os.environ.get("ZOO_TRACE"):
            traceback.print_exc()
    _write(Path(path), json.dumps(asdict(row)))


def _reason(error: Exception) -> str:
    """An error in a few lines: its message, and where it arose if it is not ours."""
    text = f"{type(error).__name__}: {error}".strip()
    if not isinstance(error, AttnLRPError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        own = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "/site-packages/" not in f.filename
        ]
        ours = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
        text = f"{text[:600]}\n  at {Path(frame.filename).name}:{frame.lineno}: {frame.line}{ours}"
    return text.replace(str(Path(transformers.__file__).parents[1]) + "/", "")[:1500]


def _write(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)


class _Run:
    """One architecture being examined in a process of its own."""

    def __init__(self, name: str, backend: str, limit: float, results: Path) -> None:
        self.arch = zoo_models.architectures()[name]
        self.backend, self.limit = backend, limit
        self.path = results / f".zoo-{os.getpid()}-{name}.json"
        self.start = time.perf_counter()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_worker, args=(name, backend, str(self.path)))
        self.process.start()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def is_over(self) -> bool:
        """Whether the process has ended, or had its time."""
        return not self.process.is_alive() or self.seconds > self.limit

    def row(self) -> Row:
        """What was found out; ends the process if it still runs."""
        ending = ""
        if self.process.is_alive():
            self.process.kill()
            ending = f"took longer than {self.limit:.0f} s"
        self.process.join()
        if not ending and self.process.exitcode:
            ending = f"ended with exit code {self.process.exitcode}"
        if self.path.exists():
            row = Row(**json.loads(self.path.read_text()))
        else:
            arch = self.arch
            row = Row(arch.name, arch.kind, arch.class_name, backend=self.backend)
        self.path.unlink(missing_ok=True)
        if ending:
            row.reason, row.seconds = ending, round(self.seconds, 1)
        return row


def load(path: Path) -> dict[str, Row]:
    """The latest row of each architecture."""
    rows: dict[str, Row] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = Row(**json.loads(line))
            rows[row.name] = row
    return rows


def summary(rows: Mapping[str, Row]) -> dict[str, int]:
    """How many architectures hold each check."""
    counts = Counter({"architectures": len(rows)})
    checks: tuple[str, ...] = ("captured", "rewritten", "forward")
    for row in rows.values():
        of_eager = ("law_1", "law_2", "attention")
        for check in checks + (of_eager if row.backend == "eager" else ("program",)):
            counts[check] += row.holds(check)
        for check in ("dynamic_batch", "dynamic_length", "passed"):
            counts[check] += bool(getattr(row, check))
    return dict(counts)


def markdown(rows: Mapping[str, Row]) -> str:
    """The table, and the list of what does not pass."""
    counts = summary(rows)
    order = sorted(rows.values(), key=lambda row: (row.kind, row.name))
    backend = next((row.backend for row in order), "eager")
    columns = _columns(backend)
    made_by = "benchmarks/zoo.py" + (f" --backend {backend}" if backend != "eager" else "")
    lines = [
        "# Architectures",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}. Tiny random models "
        "in float64; errors are relative. `~` marks models that cast to float32 themselves "
        f"(law 1 as if they did not, the rest to {CAST:g} instead of {EXACT:g}). Made by "
        f"`{made_by}`.",
        "",
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts.items()),
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in order),
    ]
    failed = [row for row in order if not row.passed]
    if failed:
        lines += ["", "## Not passed", ""]
        for row in failed:
            reason = " ".join(row.reason.split()) or "a check above does not hold"
            lines.append(f"- **{row.name}** ({row.stage}): {reason[:400]}")
    return "\n".join(lines) + "\n"


def _columns(backend: str) -> dict[str, Callable[[Row], str]]:
    """What the table tells of a row, by heading."""
    columns: dict[str, Callable[[Row], str]] = {
        "architecture": lambda row: row.name + (" ~" if row.casts else ""),
        "kind": lambda row: row.kind,
        "captured": lambda row: _mark(row.captured),
        "rules": lambda row: _mark(row.rewritten),
    }
    if backend == "eager":
        columns["law 1"] = lambda row: _error(row.law_1)
        columns["law 2"] = lambda row: _error(row.law_2)
    else:
        columns["program"] = lambda row: _error(row.program)
        columns["at other sizes"] = lambda row: _error(row.other_program)
        columns["programs op by op"] = lambda row: str(row.refused or "")
    columns["batch"] = lambda row: _mark(row.dynamic_batch)
    columns["length"] = lambda row: _mark(row.dynamic_length)
    if backend == "eager":
        columns["sdpa = eager"] = lambda row: _error(row.attention)
    columns["nodes"] = lambda row: str(row.nodes or "")
    columns["s"] = lambda row: f"{row.seconds:.0f}"
    columns["passed"] = lambda row: _mark(row.passed)
    return columns


def _mark(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def save(rows: Mapping[str, Row], results: Path = RESULTS, name: str = "zoo") -> None:
    """Write the table, whole or not at all."""
    document = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "summary": summary(rows),
        "rows": [{**asdict(row), "passed": row.passed} for row in rows.values()],
    }
    _write(results / f"{name}.json", json.dumps(document, indent=1) + "\n")
    _write(results / f"{name}.md", markdown(rows))


def main(
    only: Annotated[list[str] | None, typer.Option(help="These architectures.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="These kinds of model.")] = None,
    failed_again: Annotated[bool, typer.Option(help="Those that did not pass.")] = False,
    fresh: Annotated[bool, typer.Option(help="Those that are done, too.")] = False,
    sample: Annotated[int | None, typer.Option(help="Of them so many, drawn by chance.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the programs.")] = "eager",
    list_only: Annotated[bool, typer.Option("--list", help="Print the names and stop.")] = False,
    limit: Annotated[float, typer.Option(help="Seconds for one architecture.")] = 180.0,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Run the zoo."""
    archs = zoo_models.architectures()
    unknown = [name for name in only or () if name not in archs]
    if unknown:
        raise typer.BadParameter(f"no architecture '{unknown[0]}'; see --list")
    names = [n for n in only or archs if not kind or archs[n].kind in kind]
    if list_only:
        console.print(*names)
        return
    results.mkdir(parents=True, exist_ok=True)
    table = "zoo" if backend == "eager" else f"zoo-{backend}"
    journal = results / f"{table}.jsonl"
    rows = load(journal)
    if failed_again:
        names = [n for n in names if n in rows and not rows[n].passed]
    elif not fresh and not only:
        names = [n for n in names if n not in rows]
    if sample is not None:
        names = random.Random(0).sample(names, min(sample, len(names)))
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("zoo", total=len(names))
        for row in _run_all(names, backend, limit, jobs, results):
            rows[row.name] = row
            with journal.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            save(rows, results, table)
            progress.update(task, advance=1, description=row.name)
            console.print(_line(row), highlight=False)
    console.print(_summary_table(rows))


def _run_all(
    names: list[str], backend: str, limit: float, jobs: int, results: Path
) -> Iterator[Row]:
    """Rows as they come, some architectures at a time."""
    waiting, running = list(reversed(names)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Run(waiting.pop(), backend, limit, results))
        time.sleep(0.05)
        for run in [run for run in running if run.is_over()]:
            running.remove(run)
            yield run.row()


def _line(row: Row) -> str:
    errors = " ".join(
        f"{label} {_error(value)}"
        for label, value in (
            ("forward", row.forward),
            ("law 1", row.law_1),
            ("law 2", row.law_2),
            ("program", row.program),
            ("other sizes", row.other_program),
            ("attention", row.attention),
        )
        if value is not None
    )
    verdict = "passed" if row.passed else f"FAILED at {row.stage}"
    reason = "" if row.passed else "\n    " + row.reason.replace("\n", "\n    ")
    return f"{row.name:28} {row.seconds:5.1f} s {verdict:18} {errors}{reason}"


def _summary_table(rows: Mapping[str, Row]) -> Table:
    table = Table(title="zoo", box=None)
    for key in summary(rows):
        table.add_column(key.replace("_", " "), justify="right")
    table.add_row(*(str(value) for value in summary(rows).values()))
    return table


if __name__ == "__main__":
    typer.run(main)
