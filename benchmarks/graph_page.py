"""The page of a graph in a real browser: how large it is, and how soon it can be used.

    python benchmarks/graph_page.py                 # a 32-layer llama, with relevance laid over it
    python benchmarks/graph_page.py --layers 230    # more than 10,000 nodes
    python benchmarks/graph_page.py --pictures benchmarks/results

Needs playwright and a chromium (`--chromium`). *Usable* is from opening the file to the first frame
drawn with the search and the panel at work; then one layer is unfolded, a word is sought, and
everything is unfolded, each until it is drawn.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import attnlrp_fx

RESULTS = Path(__file__).parent / "results"
FLAGS = """--headless --no-sandbox --disable-gpu --disable-background-networking
    --disable-component-update --disable-sync --no-first-run""".split()
DRAWN = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
console = Console()


def page_of(layers: int, path: Path) -> dict[str, Any]:
    """Write the page of a llama; widths do not matter to a graph."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(3, 15)[None], "use_cache": False}
    start = time.perf_counter()
    explainer = attnlrp_fx.compile(model, inputs, backend="eager")
    compiled = time.perf_counter()
    ledger = explainer.audit(**inputs).ledger
    audited = time.perf_counter()
    explainer.graph_page(path, ledger, f"llama, {layers} layers")
    return {
        "layers": layers,
        "megabytes": path.stat().st_size / 1e6,
        "compile_seconds": compiled - start,
        "audit_seconds": audited - compiled,
        "page_seconds": time.perf_counter() - audited,
    }


def timed(page: Page, script: str) -> float:
    """Seconds from a call to the frame behind it."""
    start = time.perf_counter()
    page.evaluate(f"{script}")
    page.evaluate(DRAWN)
    return time.perf_counter() - start


def in_browser(path: Path, chromium: str, rounds: int, pictures: Path | None) -> dict[str, Any]:
    """Open the page and use it."""
    usable, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.on("pageerror", lambda error: errors.append(str(error)))
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.evaluate(DRAWN)
            usable.append(time.perf_counter() - start)
        found = {"nodes": page.evaluate("N"), "usable_seconds": statistics.median(usable)}
        picture(page, pictures, "graph")
        layer = page.evaluate("groups.find(g => /layers\\.\\d+$/.test(g.path)).path")
        place = f"N + groups.findIndex(g => g.path === {json.dumps(layer)})"
        found["unfold_layer_seconds"] = timed(page, f"(reveal({place}), toggle({place}))")
        picture(page, pictures, "graph-layer")
        found["search_seconds"] = timed(page, "graph.find('silu')")
        page.evaluate("graph.find('')")
        found["unfold_all_seconds"] = timed(page, "graph.unfold()")
        browser.close()
    return {**found, "errors": errors}


def picture(page: Page, folder: Path | None, name: str) -> None:
    """Write a picture of the page, if a folder is given."""
    if folder is not None:
        page.screenshot(path=folder / f"{name}.png")


def main(
    layers: Annotated[list[int] | None, typer.Option(help="layers of the llama")] = None,
    rounds: Annotated[int, typer.Option(help="how often the page is opened")] = 5,
    chromium: Annotated[str, typer.Option(help="the browser")] = "/usr/bin/chromium",
    pictures: Annotated[Path | None, typer.Option(help="a folder for screenshots")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Measure the page of a llama's graph."""
    results = []
    for count in layers or [32]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.html"
            made = page_of(count, path)
            results.append({**made, **in_browser(path, chromium, rounds, pictures)})
    table = Table(title="the page of a llama's graph", title_justify="left")
    table.add_column("")
    for row in results:
        table.add_column(f"{row['layers']} layers", justify="right")
    for key in results[0]:
        table.add_row(key.replace("_", " "), *(_shown(row[key]) for row in results))
    console.print(table)
    path = output or RESULTS / "graph_page.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
