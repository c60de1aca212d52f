"""Tables of results on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_scores(results: list[dict[str, Any]]) -> None:
    """Accuracy and its 95 % interval, one row per length, one column per result."""
    table = Table(title=f"{results[0]['task']}: accuracy (95 % interval)")
    table.add_column("tokens", justify="right")
    for result in results:
        table.add_column(f"{result['method']}", justify="right")
    for rows in zip(*(result["scores"] for result in results), strict=True):
        cells = [f"{row['accuracy']:.2f} ({row['low']:.2f}-{row['high']:.2f}, n={row['count']})" for row in rows]
        table.add_row(f"{rows[0]['tokens']:.0f}", *cells)
    Console().print(table)
