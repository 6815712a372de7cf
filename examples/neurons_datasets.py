"""Statistics of neurons and heads by Hugging Face `datasets`, in several processes.

    python examples/neurons_datasets.py texts.txt --out statistics --processes 2

`datasets` keeps the table out of memory, maps it in as many processes as asked for, and keeps what
it has mapped: run again, it does only what is missing.
"""

from pathlib import Path
from typing import Annotated

import datasets
import torch
import typer

import attnlrp_fx
from attnlrp_fx.loading import load
from attnlrp_fx.statistics.shards import PartialStatistics, merge_statistics


def make_explainer() -> attnlrp_fx.ExplainableGraphModule:
    """The explainer that every process makes for itself."""
    torch.set_num_threads(1)
    model, tokenizer = load("sentiment")
    example = tokenizer("any text", return_tensors="pt")
    return attnlrp_fx.compile(
        model, example, backend="eager", tokenizer=tokenizer, latent=["mlp.neurons"]
    )


def main(
    texts: Path,
    out: Annotated[Path, typer.Option()],
    processes: int = 2,
    block: Annotated[int, typer.Option(help="Texts whose statistics are one row.")] = 1000,
) -> None:
    """Collect, merge, and show the most relevant neuron."""
    table = datasets.load_dataset("text", data_files=str(texts), split="train")
    table = table.filter(lambda row: bool(row["text"].strip()))
    rows = table.map(
        PartialStatistics(make_explainer),
        batched=True,
        batch_size=block,
        with_indices=True,
        num_proc=processes,
        remove_columns=table.column_names,
        writer_batch_size=1,
    )
    _, tokenizer = load("sentiment")
    found = merge_statistics((row["statistics"] for row in rows), out, tokenizer)
    print(found)
    print(found.largest(1)[0].title)


if __name__ == "__main__":
    typer.run(main)
