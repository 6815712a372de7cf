"""Statistics of neurons and heads by Ray Data, on as many workers as a cluster has.

    pip install "ray[data]"
    python examples/neurons_ray.py texts.txt --out statistics --workers 2

Every worker makes one explainer and keeps it; Ray hands it blocks of texts, and starts a block
again if its worker is lost. On a cluster, `ray.init()` finds it; workers with a GPU each get one
by `num_gpus=1`.
"""

from pathlib import Path
from typing import Annotated

import ray
import torch
import typer

import attnlrp_fx
from attnlrp_fx.loading import load
from attnlrp_fx.statistics.shards import PartialStatistics, merge_statistics


def make_explainer() -> attnlrp_fx.ExplainableGraphModule:
    """The explainer that every worker makes for itself."""
    torch.set_num_threads(1)
    model, tokenizer = load("sentiment")
    example = tokenizer("any text", return_tensors="pt")
    return attnlrp_fx.compile(
        model, example, backend="eager", tokenizer=tokenizer, latent=["mlp.neurons"]
    )


def main(
    texts: Path,
    out: Annotated[Path, typer.Option()],
    workers: int = 2,
    block: Annotated[int, typer.Option(help="Texts whose statistics are one row.")] = 1000,
) -> None:
    """Collect, merge, and show the most relevant neuron."""
    ray.init(include_dashboard=False)
    lines = [line for line in texts.read_text().splitlines() if line.strip()]
    table = ray.data.from_items([{"number": i, "text": line} for i, line in enumerate(lines)])
    rows = table.repartition(max(workers, -(-len(lines) // block))).map_batches(
        PartialStatistics,
        fn_constructor_args=(make_explainer,),
        batch_size=block,
        concurrency=workers,
        num_cpus=0.5,  # so that reading finds a core, too, on a machine with no more than workers
    )
    _, tokenizer = load("sentiment")
    found = merge_statistics((row["statistics"] for row in rows.iter_rows()), out, tokenizer)
    print(found)
    print(found.largest(1)[0].title)


if __name__ == "__main__":
    typer.run(main)
