"""Tables of results on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_scores(results: list[dict[str, Any]], names: list[str] | None = None) -> None:
    """Accuracy and its 95 % interval: a row per length and one for all, a column per result (its name or method)."""
    table = Table(title=f"{results[0]['task']}: mean score (95 % interval)")
    table.add_column("tokens", justify="right")
    for name in names or [result["method"] for result in results]:
        table.add_column(name, justify="right")
    for rows in zip(*([*result["scores"], result["mean"]] for result in results), strict=True):
        cells = [f"{row['score']:.2f} ({row['low']:.2f}-{row['high']:.2f}, n={row['count']})" for row in rows]
        table.add_row(f"{rows[0]['tokens']:.0f}" if "length" in rows[0] else "mean", *cells)
    Console().print(table)


def print_sets(result: dict[str, Any]) -> None:
    """Score and 95 % interval of every set of a benchmark, and their mean."""
    table = Table(
        "set", "score (95 % interval)", "n", "cut in the middle", title=f"{result['task']}: {result['method']}"
    )
    for row in result["sets"]:
        spread = "" if row["low"] is None else f" ({row['low']:.1f}-{row['high']:.1f})"
        table.add_row(row["name"], f"{row['score']:.2f}{spread}", str(row["count"]), str(row["cut"]))
    table.add_row("mean", f"{result['mean']:.2f}", "", "")
    Console().print(table)
