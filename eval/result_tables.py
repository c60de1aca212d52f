"""Tables of results: on the terminal, and in Markdown for model cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from axolotl_plugins.common.io import load_json
from eval.paper import paper_value
from eval.results import BenchmarkResult, EvalResult, Result, read_results, same_model, title_of


def print_scores(results: Sequence[EvalResult], names: Sequence[str] | None = None) -> None:
    """Print mean scores with 95 % intervals: a row per length and one for all, a column per result.

    Args:
        results: of one task.
        names: of the columns; None uses methods.
    """
    table = Table(title=f"{title_of(vars(results[0]))}: mean score (95 % interval)")
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


def markdown_table(result: Result, base: EvalResult | None = None) -> str:
    """Return a result as a Markdown section, beside its base model's and the paper's score at the same length."""
    title = f"### {title_of(vars(result))}"
    if isinstance(result, BenchmarkResult):
        rows = [f"| {row.name} | {row.score:.2f} | {row.count} |" for row in result.sets]
        return "\n".join([title, "", "| set | score | samples |", "|---|---:|---:|", *rows])
    papers = [paper_value(result, score.length) for score in result.scores]
    before = base.by_length() if base else {}
    unit = "lines of the record" if (result.asked or {}).get("cases") else "longest prompt (tokens)"
    columns = {
        unit: [f"{score.length:,}" for score in result.scores],
        "score (95 % interval)": [f"{score.score:.2f} ({score.low:.2f}-{score.high:.2f})" for score in result.scores],
        "base model": [f"{before[row.length]:.2f}" if row.length in before else "" for row in result.scores],
        "samples": [str(score.count) for score in result.scores],
        "the paper's": [f"{paper[0]:.2f}" if paper else "" for paper in papers],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(shown), ["---:"] * len(shown), *zip(*shown.values(), strict=True)]
    return "\n".join([title, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def score_tables(folder: Path, adapter: str) -> list[str]:
    """Return the results in a folder of an adapter, or of a model that it was merged into, as Markdown sections.

    Raises:
        ValueError: see ``read_results``; or the record of a merged folder cannot be read.
    """
    results = read_results(folder)
    tables = []
    for result in results:
        if same_model(source_adapter(result.model), adapter):
            bases = [row for row in results if isinstance(row, EvalResult) and isinstance(result, EvalResult)
                     and (row.model, row.task, row.asked) == (result.base, result.task, result.asked)]  # fmt: skip
            tables.append(markdown_table(result, bases[0] if bases else None))
    return list(dict.fromkeys(tables))  # adapter and merged model have the same scores


def source_adapter(model: str) -> str:
    """Return the adapter that a model was merged from, if its folder is there and says so; else the model."""
    from axolotl_plugins.seal.model_loading import RECORD

    record = Path(model) / RECORD
    return str(load_json(record).get("adapter")) if record.is_file() else model
