"""Tables of results: on the terminal, and in Markdown for model cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.paper import paper_value
from eval.results import TITLES, BenchmarkResult, EvalResult, Result, read_results


def print_scores(results: Sequence[EvalResult], names: Sequence[str] | None = None) -> None:
    """Print mean scores with 95 % intervals: a row per length and one for all, a column per result.

    Args:
        results: of one task.
        names: of the columns; None uses methods.
    """
    table = Table(title=f"{results[0].task}: mean score (95 % interval)")
    table.add_column("tokens", justify="right")
    for name in names or [result.method for result in results]:
        table.add_column(name, justify="right", overflow="fold")
    for rows in zip(*([*result.scores, result.mean] for result in results), strict=True):
        cells = [f"{row.score:.2f} ({row.low:.2f}-{row.high:.2f}, n={row.count})" for row in rows]
        table.add_row("mean" if rows[0].length is None else f"{rows[0].tokens:.0f}", *cells)
    Console().print(table)


def print_sets(result: BenchmarkResult) -> None:
    """Print the score and 95 % interval of every set of a benchmark, and their mean."""
    table = Table(
        "set", "score (95 % interval)", "n", "truncated in the middle", title=f"{result.task}: {result.method}"
    )
    for row in result.sets:
        interval = "" if row.low is None else f" ({row.low:.1f}-{row.high:.1f})"
        table.add_row(row.name, f"{row.score:.2f}{interval}", str(row.count), str(row.cut))
    table.add_row("mean", f"{result.mean:.2f}", "", "")
    Console().print(table)


def markdown_table(result: Result) -> str:
    """Return a result as a Markdown section, with the paper's score at the same length where it prints one."""
    title = f"### {TITLES.get(result.task, result.task)}"
    if isinstance(result, BenchmarkResult):
        rows = [f"| {row.name} | {row.score:.2f} | {row.count} |" for row in result.sets]
        return "\n".join([title, "", "| set | score | samples |", "|---|---:|---:|", *rows])
    rows = []
    for score in result.scores:
        paper = paper_value(result, score.length)
        interval = f"{score.score:.2f} ({score.low:.2f}-{score.high:.2f})"
        rows.append(f"| {score.length:,} | {interval} | {score.count} | {f'{paper[0]:.2f}' if paper else ''} |")
    head = "| longest prompt (tokens) | score (95 % interval) | samples | the paper's |"
    return "\n".join([title, "", head, "|---:|---|---:|---:|", *rows])


def score_tables(folder: Path, model: str) -> list[str]:
    """Return the results of one model in a folder as Markdown sections.

    Raises:
        ValueError: see ``read_results``.
    """
    return [markdown_table(result) for result in read_results(folder) if result.model.rstrip("/") == model.rstrip("/")]
