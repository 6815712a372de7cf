"""The README's table of supported models, from the zoo's results.

    python benchmarks/supported.py            # print it
    python benchmarks/supported.py --write    # and put it into the README

Counts what `zoo.py` measured and wrote into `results/zoo.json`; nothing is run here.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "zoo.json"
BEGIN, END = "<!-- supported: begin -->\n", "<!-- supported: end -->\n"


def table(results: dict[str, Any]) -> str:
    """Kinds of models in Markdown: how many run, are captured, and pass every check."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results["rows"]:
        if row["stage"] != "building the model":
            kinds[row["kind"]].append(row)
    lines = [
        "| kind | architectures | captured | every op has a rule | batch dynamic | length dynamic "
        "| all checks |",
        "|---|---|---|---|---|---|---|",
    ]
    total = [row for rows in kinds.values() for row in rows]
    for kind, rows in [*sorted(kinds.items()), ("**all**", total)]:
        has_length = [row for row in rows if row["dynamic_length"] is not None]
        cells = [
            kind,
            len(rows),
            sum(row["captured"] for row in rows),
            sum(row["rewritten"] for row in rows),
            sum(bool(row["dynamic_batch"]) for row in rows),
            f"{sum(row['dynamic_length'] for row in has_length)} of {len(has_length)}",
            sum(row["passed"] for row in rows),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def between(readme: str) -> tuple[str, str, str]:
    """The README before, in and behind the table's place."""
    before, _, rest = readme.partition(BEGIN)
    old, _, behind = rest.partition(END)
    return before + BEGIN, old, END + behind


def main(
    write: Annotated[bool, typer.Option("--write", help="Put the table into the README.")] = False,
) -> None:
    """Print the table of supported kinds of models."""
    made = table(json.loads(RESULTS.read_text()))
    print(made, end="")
    if write:
        readme = ROOT / "README.md"
        before, _, behind = between(readme.read_text())
        readme.write_text(before + made + behind)


if __name__ == "__main__":
    typer.run(main)
