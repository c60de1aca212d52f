"""Collect the result of a study: rows by task, method and length, learning rates, general ability, plots and tables."""

from __future__ import annotations

import datetime
import itertools
import json
import shlex
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_plugins.common.io import load_json, write_text
from data_gen.tasks import resolve_task
from eval.confidence import wilson
from recipes.tools.study_cells import (
    BASELINES,
    CAPPED,
    CONTROLS,
    FACTOR,
    METHODS,
    MIXTURES,
    PLACEMENTS,
    SIZED,
    TASKS,
    TRANSFERS,
    WEIGHTED,
    Cell,
    bounds,
    choose_rate,
    mean_score,
)

# Score plots: name -> methods. All but the first need a method that the first does not have.
PLOTS = {
    "tasks": ("base", "one-shot", "SEAL-H", "SEAL-C", "LoRA", "DoRA"),
    "controls": ("base", "SEAL-H", "SEAL-C", *CONTROLS),
    "placements": ("base", "SEAL-C", *PLACEMENTS, "LoRA"),
    "baselines": ("base", FACTOR, "SEAL-C", *BASELINES, "LoRA"),
}


def with_interval(score: dict[str, Any]) -> dict[str, Any]:
    """Add the 95 % interval to a score."""
    low, high = wilson(score["score"], score["count"])
    return {**score, "score": round(score["score"], 4), "low": round(low, 4), "high": round(high, 4)}


def gather(folder: Path, commit: str | None) -> dict[str, Any]:
    """Collect the finished cells of a study.

    Args:
        folder: of the study.
        commit: of the code, for cells without one.

    Returns:
        Command, date and machine, ``rates`` (task, method, the chosen ``rate`` and ``candidates`` with their mean
        validation scores), ``rows`` (one per test cell: task, method, rate, seed, trainable parameters, losses,
        seconds, and ``scores`` by length with their intervals) and ``general`` (see ``eval.general_ability``, of test
        cells that have it).

    Raises:
        ValueError: no cell is finished.
    """
    cells = [load_json(file) for file in sorted((folder / "cells").glob("*.json"))]
    if not cells:
        raise ValueError(f"out: no results in {folder / 'cells'}: run the study first")
    rates = chosen_rates([cell for cell in cells if cell["purpose"] == "validation"])
    chosen = {(row["task"], row["method"]): row["rate"] for row in rates}

    def expected(cell: dict[str, Any]) -> float | None:
        of = Cell(cell["task"], cell["method"], "test")
        rates = [chosen[source, of.rated_as] for source in of.sources if (source, of.rated_as) in chosen]
        return statistics.median_low(rates) if rates else None

    tested = [cell for cell in cells if cell["purpose"] == "test" and cell["rate"] == expected(cell)]
    tested.sort(key=lambda cell: (TASKS.index(cell["task"]), METHODS.index(cell["method"]), cell["seed"]))
    fields = ("task", "method", "rate", "seed", "parameters", "trained_tokens", "losses", "tuning_seconds",
            "scoring_seconds", "failed")  # fmt: skip
    settings = load_json(folder / "settings.json")
    return {
        "what": "the paper's tasks and methods on one model; greedy answers; rates chosen on validation samples",
        "command": command(settings, tested),
        "date": datetime.date.today().isoformat(),
        "commit": only([cell.get("commit") or commit for cell in cells]),
        "device": only([cell["device"] for cell in tested]),
        "versions": only([cell["versions"] for cell in cells]),
        "settings": settings,
        "rates": rates,
        "rows": [
            {
                **{key: cell[key] for key in fields if key in cell},
                "scores": [with_interval(row) for row in cell["scores"]],
            }
            for cell in tested
        ],
        "general": [
            {**{key: cell[key] for key in ("task", "method", "seed", "rate")}, **cell["general"]}
            for cell in tested
            if "general" in cell
        ],
    }


def command(settings: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    """Return the commands, joined by ``&&``, that run exactly the tested cells of a study and their validation."""
    tasks_of: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)  # by method and seeds
    for task, method in itertools.product(TASKS, METHODS):
        if seeds := sorted(cell["seed"] for cell in cells if (cell["task"], cell["method"]) == (task, method)):
            tasks_of[method, tuple(seeds)].append(task)
    runs: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    for (method, of_seeds), tasks in tasks_of.items():
        runs[tuple(tasks), of_seeds].append(method)
    options = {
        **({"model": settings["name"]} if settings.get("name") else {}),
        "train-tokens": ",".join(f"{task}={settings['train'][task]}" for task in TASKS),
        "lengths": ",".join(f"{task}={'/'.join(map(str, settings['lengths'][task]))}" for task in TASKS),
        **{key.replace("_", "-"): settings[key]
           for key in ("samples", "validation_samples", "tune_samples", "shot_tokens", "haystack", "dtype")},
    }  # fmt: skip
    first: list[str] = []
    if config := settings.get("model_config"):
        options["model-config"] = "model_config.yml"
        first.append(f"echo {shlex.quote(json.dumps({'model_config': config}))} > model_config.yml")
    common = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    return " && ".join(first + [
        f"seal study run --tasks {','.join(of_tasks)} --methods {shlex.quote(','.join(methods))} "
        f"--seeds {','.join(map(str, of_seeds))} {common}"
        for (of_tasks, of_seeds), methods in runs.items()
    ])  # fmt: skip


def only(values: list[Any]) -> Any:
    """Return the common value, or the list of distinct ones."""
    different = [value for place, value in enumerate(values) if value not in values[:place]]
    return different[0] if len(different) == 1 else different


def chosen_rates(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the chosen learning rate by task and method, with the validation scores of all candidates."""
    groups = defaultdict(list)
    for cell in cells:
        groups[cell["task"], cell["method"]].append(cell)
    order = sorted(groups, key=lambda pair: (TASKS.index(pair[0]), METHODS.index(pair[1])))
    return [
        {
            "task": task,
            "method": method,
            "rate": choose_rate(groups[task, method]),
            "candidates": {
                f"{cell['rate']:g}": round(mean_score(cell), 4) if cell["scores"] else None
                for cell in sorted(groups[task, method], key=lambda cell: cell["rate"])
            },
        }
        for task, method in order
    ]


def save(gathered: dict[str, Any], out: Path) -> None:
    """Write a study's result as JSON, and its plots beside it."""
    import matplotlib.pyplot as plt

    from eval.score_plots import save_figure

    for name, methods in PLOTS.items():
        rows = [row for row in gathered["rows"] if row["method"] in methods and row["scores"]]
        if name != "tasks" and not {row["method"] for row in rows} - set(PLOTS["tasks"]):
            continue
        save_figure(scores_figure(rows, methods), out.with_name(f"{out.stem}_{name}.png"))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    draw_general(panels, [row for row in gathered["general"] if row["method"] not in WEIGHTED])
    save_figure(figure, out.with_name(f"{out.stem}_general.png"))
    scored = {(row["task"], row["method"]) for row in gathered["rows"]}
    if any(row["method"] in WEIGHTED and (row["task"], "base") in scored for row in gathered["general"]):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
        for axes, method in zip(panels, ("SEAL-H", "SEAL-C"), strict=True):
            draw_weights(axes, method, gathered)
        save_figure(figure, out.with_name(f"{out.stem}_weights.png"))
    measured = {
        row["method"] for row in gathered["rows"]
        if row["scores"] and (row["method"] in CAPPED or (row["task"], "base") in scored)
    }  # fmt: skip
    pictures = ("transfer", TRANSFERS, draw_transfer), ("samples", SIZED, draw_samples), ("lengths", CAPPED, draw_caps)
    for name, methods, draw in pictures:
        names = [m for m in ("SEAL-H", "SEAL-C", "LoRA") if measured & {x for x in methods if x.startswith(m)}]
        if names:
            figure, panels = plt.subplots(1, len(names), figsize=(5.6 * len(names), 4.6), layout="constrained",
                                          squeeze=False)  # fmt: skip
            for axes, method in zip(panels[0], names, strict=True):
                draw(axes, method, gathered)
            save_figure(figure, out.with_name(f"{out.stem}_{name}.png"))
    write_text(out, json.dumps(gathered, indent=1) + "\n")  # last: a result has all its plots


def scores_figure(rows: list[dict[str, Any]], methods: tuple[str, ...]) -> Any:
    """Plot scores by length, one panel per task and one line per method, with the range over seeds."""
    import matplotlib.pyplot as plt

    from eval.score_plots import draw_accuracy

    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    columns, lines = min(3, max(1, len(tasks))), -(-max(1, len(tasks)) // 3)
    size = (0.6 + 3.8 * columns, 0.6 + 3.6 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    legend: dict[str, Any] = {}
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(panels.flat, tasks, strict=False):
        task_rows = sorted((row for row in rows if row["task"] == task), key=lambda row: methods.index(row["method"]))
        draw_accuracy(axes, task_rows, at="length")
        axes.get_legend().remove()
        legend |= {line.get_label(): line for line in axes.get_lines()}
        lengths = [score["length"] for score in task_rows[0]["scores"]]
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xticks([], minor=True)
        axes.set_title(resolve_task(task).description)
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=max(1, len(legend)), fontsize=9)
    return figure


def draw_general(panels: Any, rows: list[dict[str, Any]]) -> None:
    """Plot the change of perplexity and the divergence from the base, one point per task and seed."""
    from eval.score_plots import COLOURS

    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    for axes, key, label in zip(
        panels, ("ratio", "kl"), ("perplexity, tuned / base", "KL(base || tuned), nats per token"), strict=True
    ):
        for place, method in enumerate(methods):
            values = [(row["task"], row[key]) for row in rows if row["method"] == method]
            axes.plot([place] * len(values), [value for _, value in values], "o", color=COLOURS.get(method), alpha=0.6)
        axes.set_xticks(range(len(methods)), methods)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].axhspan(0.98, 1.02, color="#2ca02c", alpha=0.12)  # within 2 %


def draw_weights(axes: Any, method: str, gathered: dict[str, Any]) -> None:
    """Plot score against perplexity for a method's scales at growing weights, one line per task, from the base."""
    moved = {(row["task"], row["method"], row["seed"]): row["ratio"] for row in gathered["general"]}
    steps = [*(weighted for weighted in WEIGHTED if weighted.startswith(method)), method]
    seed = min(row["seed"] for row in gathered["general"])
    for task in TASKS:
        by_method = {row["method"]: row for row in gathered["rows"] if (row["task"], row["seed"]) == (task, seed)}
        tested = [by_method[step] for step in steps if (task, step, seed) in moved]
        if len(tested) > 1 and "base" in by_method:
            ratios = [1.0, *(moved[task, row["method"], seed] for row in tested)]
            axes.plot(ratios, [mean_score(row) for row in (by_method["base"], *tested)], "o-", label=task)
    axes.set(xlabel="perplexity of unrelated text, tuned / base", title=f"{method}, weights 0 to 1")
    axes.set_ylabel("mean score over lengths")
    axes.axvspan(0.98, 1.02, color="#2ca02c", alpha=0.12)  # within 2 %
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()


def draw_transfer(axes: Any, method: str, gathered: dict[str, Any]) -> None:
    """Plot the score on every task of adapters tuned on each, and on mixtures, in the colour of the gain (Figure 8)."""
    rows = sorted((row for row in gathered["rows"] if row["scores"]), key=lambda row: -row["seed"])
    scores = {(row["task"], row["method"]): mean_score(row) for row in rows}  # of each the smallest seed's
    tasks = [task for task in TASKS if (task, "base") in scores]
    tuned = {name for _, name in scores}
    sources = ["base", *(source for source in (*TASKS, *MIXTURES) if f"{method} from {source}" in tuned)]
    values = np.full((len(sources), len(tasks)), np.nan)
    for (row, source), (column, task) in itertools.product(enumerate(sources), enumerate(tasks)):
        name = "base" if source == "base" else method if source == task else f"{method} from {source}"
        values[row, column] = scores.get((task, name), np.nan)
    axes.imshow(values - values[:1], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            dark = abs(value - values[0, column]) > 0.6
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(sources)), sources)
    axes.set(xlabel="scored on", ylabel="tuned on", title=f"{method}: mean score, in the colour of the gain")


def draw_caps(axes: Any, method: str, gathered: dict[str, Any]) -> None:
    """Plot the score at each test length against the longest training sample, under the smallest seed."""
    curves: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)  # by task and test length
    for row in of_first_seed(gathered["rows"], (method, f"{method} up to ")):
        usual = gathered["settings"]["train"][row["task"]]
        longest = bounds(Cell(row["task"], row["method"], "test").train_tokens(usual))[1]
        for score in row["scores"]:
            curves[row["task"], score["length"]][longest] = score["score"]
    for (task, length), curve in curves.items():
        axes.plot(*zip(*sorted(curve.items()), strict=True), "o-", label=f"{task}, tested at {length:,}")
    axes.set_xscale("log", base=2)
    ticks = sorted({longest for curve in curves.values() for longest in curve})
    axes.set_xticks(ticks, [f"{cap:,}" for cap in ticks])
    axes.set(xlabel="longest training sample, tokens", ylabel="score", title=method, ylim=(-0.02, 1.04))
    axes.grid(alpha=0.3)
    axes.legend()


def of_first_seed(rows: list[dict[str, Any]], names: tuple[str, str]) -> list[dict[str, Any]]:
    """Return the scored rows, under their smallest seed, of a method or of those whose names begin with the second."""
    chosen = [
        row for row in rows if row["scores"] and (row["method"] == names[0] or row["method"].startswith(names[1]))
    ]
    return [row for row in chosen if row["seed"] == min(row["seed"] for row in chosen)]


def draw_samples(axes: Any, method: str, gathered: dict[str, Any]) -> None:
    """Plot the mean score over lengths against the number of training samples, under the smallest seed."""
    rows = [row for row in gathered["rows"] if row["method"] == "base" and row["scores"]]
    rows += of_first_seed(gathered["rows"], (method, f"{method} with "))
    for task in TASKS:  # by number of samples, of which each gave one loss
        sizes = {len(row.get("losses", [])): mean_score(row) for row in rows if row["task"] == task}
        if len(sizes.keys() - {0}) > 1:
            axes.plot(*zip(*sorted(sizes.items()), strict=True), "o-", label=task)
    axes.set(xlabel="training samples", ylabel="mean score over lengths", title=method, ylim=(-0.02, 1.04))
    axes.grid(alpha=0.3)
    axes.legend()


def tables(gathered: dict[str, Any]) -> str:
    """Return markdown tables: scores by length (mean and range over seeds), rates, general ability."""
    lines: list[str] = []
    for task in TASKS:
        rows = [row for row in gathered["rows"] if row["task"] == task and row["scores"]]
        if rows:
            lines += score_table(task, rows)
    if gathered["rates"]:
        lines += ["", "Rates: mean validation score of each candidate", "", "| task | method | chosen | candidates |",
                  "|---|---|---:|---|"]  # fmt: skip
    for row in gathered["rates"]:
        tried = ", ".join(f"{rate}: {score}" for rate, score in row["candidates"].items())
        lines.append(f"| {row['task']} | {row['method']} | {row['rate']:g} | {tried} |")
    if gathered["general"]:
        lines += ["", "General ability, over tasks and seeds", "",
                  "| method | base perplexity | tuned / base, mean | farthest from 1 | KL per token, mean | most |",
                  "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for method in METHODS:
        if rows := [row for row in gathered["general"] if row["method"] == method]:
            ratios, divergences = [row["ratio"] for row in rows], [row["kl"] for row in rows]
            farthest = max(ratios, key=lambda ratio: abs(ratio - 1))
            lines.append(
                f"| {method} | {rows[0]['perplexity_base']:.2f} | {sum(ratios) / len(ratios):.3f} | {farthest:.3f} | "
                f"{sum(divergences) / len(divergences):.4f} | {max(divergences):.4f} |"
            )
    return "\n".join(lines)


def score_table(task: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of one task's table."""
    lengths = [score["length"] for score in rows[0]["scores"]]
    lines = ["", f"{task}, {rows[0]['scores'][0]['count']} samples per length", "",
             "| method | trainable | rate | seeds | " + " | ".join(map(str, lengths)) + " |",
             "|---|---:|---:|---:|" + "---:|" * len(lengths)]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        columns = []
        for place in range(len(lengths)):
            values = [row["scores"][place]["score"] for row in of_method]
            spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
            columns.append(f"{sum(values) / len(values):.2f}{spread}")
        rate, trained = of_method[0]["rate"], of_method[0].get("parameters", 0)
        lines.append(
            f"| {method} | {trained:,} | {'-' if rate is None else f'{rate:g}'} | {len(of_method)} | "
            + " | ".join(columns) + " |"
        )  # fmt: skip
    return lines
