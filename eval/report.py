"""Gather results into one HTML page: ``seal report``."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, FileSystemLoader

from axolotl_plugins.common.io import check_output, write_text
from eval.paper import LONGCHAT, paper_value, read_paper
from eval.results import TITLES, BenchmarkResult, EvalResult, Result, read_objects, read_results, title_of
from eval.score_plots import draw_accuracy, draw_grid, draw_results, draw_scales, name_of

WRONG_SHOWN = 5


def rate_table(sweep: dict[str, Any]) -> dict[str, Any]:
    """Return the mean score of a sweep by learning rate and number of samples, beside the paper's Table 7."""
    printed: dict[str, dict[int, float]] = {}
    if (sweep["base_model"], sweep["task"], sweep["method"]) == (LONGCHAT, "line", "SEAL-H"):
        printed = read_paper()["learning_rate_by_samples"]
    by_rate = {float(rate): row for rate, row in printed.items()}
    tasks = len(sweep["task"].split(" + "))
    means = {(row["rate"], row["samples"], row["epochs"]): row["mean"] for row in sweep["over_seeds"]}
    rates, columns = sorted({key[0] for key in means}), sorted({key[1:] for key in means})
    rows = []
    for rate in rates:
        cells: list[dict[str, Any] | None] = []
        for count, epochs in columns:
            paper = by_rate.get(rate, {}).get(count) if epochs == 1 else None
            score = means.get((rate, count, epochs))
            cells.append(None if score is None else {
                "score": score, "low": None,
                "count": sweep["validation_samples"] * len(sweep["lengths"]) * len(sweep["seeds"]) * tasks,
                "paper": None if paper is None else (paper, 7),
            })  # fmt: skip
        rows.append({"name": f"{rate:g}", "model": "", "cells": cells})
    titles = [f"{count} samples" + (f" × {epochs}" if epochs > 1 else "") for count, epochs in columns]
    return {"rows_are": "learning rate", "columns": titles, "rows": rows}


def probe_section(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return the page's section on a result of ``seal probe``; raise ValueError if it is of an unknown kind."""
    from eval.probe.captions import CAPTION, TITLE
    from eval.probe.probe_plots import DRAW

    if (kind := result["kind"]) not in TITLE:
        raise ValueError(f"{file}: of the unknown kind {kind!r}, from another version: run the probe again, or move it")
    of = title_of(result) if "task" in result else result["model"]
    return {
        "title": f"{of}: {TITLE[kind]}", "figure": embed(DRAW[kind](result)),
        "table": rate_table(result) if kind == "sweep" else None, "caption": CAPTION[kind](result),
        "source": source_of(result),
    }  # fmt: skip


def benchmark_section(task: str, results: Sequence[BenchmarkResult]) -> dict[str, Any]:
    """Return the page's section on a benchmark of several sets: scores by method, beside the paper's."""
    paper = read_paper()
    names = list(dict.fromkeys(row.name for result in results for row in result.sets))
    rows = []
    for result in results:
        in_paper = result.base == LONGCHAT
        printed = paper["longbench"].get(result.method, {}) if task == "longbench" and in_paper else {}
        mmlu = paper["mmlu"].get(result.method) if task == "mmlu" and in_paper else None
        by_name = {row.name: row for row in result.sets}
        cells: list[dict[str, Any] | None] = [
            {**vars(by_name[name]), "paper": (printed[name], 6) if name in printed else None}
            if name in by_name else None
            for name in names
        ]  # fmt: skip
        cells.append({"score": result.mean, "low": None, "count": sum(row.count for row in result.sets),
                      "paper": None if mmlu is None else (mmlu, "–, section 5.2")})  # fmt: skip
        rows.append({"name": result.method, "model": result.model, "cells": cells})
    table = {"rows_are": "method", "columns": [*names, "mean"], "rows": rows}
    return {"title": TITLES[task], "figures": [], "tables": [table], "wrong": []}


def embed(figure: plt.Figure) -> str:
    """Return a figure as a PNG data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    return data_url(buffer.getvalue())


def data_url(png: bytes) -> str:
    """Return the content of a PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def source_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the ``command`` of a result, and as ``note`` its date, commits and machine."""
    made = {**values, **(values.get("origin") or {})}
    parts = (made.get(key) for key in ("date", "commit", "device", "machine"))
    note = ", ".join(" and ".join(map(str, part)) if isinstance(part, list) else str(part) for part in parts if part)
    return {"command": made.get("command") or "", "note": note}


def undrawn_figures(folder: Path) -> list[Path]:
    """Return the PNG files of a folder that are not drawn from a JSON file of the same name."""
    return [file for file in sorted(folder.glob("*.png")) if file.is_file() and not file.with_suffix(".json").exists()]


def figure_sections(files: Sequence[Path], study: str | None = None) -> list[dict[str, Any]]:
    """Return a section of the page for each PNG file, named after it without the name of its study."""
    names = [file.stem.removeprefix(f"{study}_").replace("_", " ") for file in files]
    return [
        {"title": f"Figure: {name}", "figures": [data_url(file.read_bytes())]}
        for name, file in zip(names, files, strict=True)
    ]


def study_of(figure: Path, studies: Collection[str]) -> str | None:
    """Return the study, by the stem of its JSON file, that a figure such as ``smollm2_transfer_samples.png`` is of."""
    return max((name for name in studies if figure.stem.startswith(f"{name}_")), key=len, default=None)


def score_table(results: Sequence[EvalResult]) -> dict[str, Any]:
    """Return a table with a row per method and a column per length."""
    lengths = sorted({score.length for result in results for score in result.scores if score.length is not None})
    rows = []
    for result in results:
        by_length = {score.length: score for score in result.scores}
        cells = [
            {**vars(by_length[length]), "paper": paper_value(result, length)} if length in by_length else None
            for length in lengths
        ]
        rows.append({"name": name_of(result, results), "model": result.model, "cells": cells})
    return {"rows_are": "method", "columns": lengths, "rows": rows}


def grid(result: EvalResult) -> tuple[np.ndarray, list[int], list[int]]:
    """Return needle scores as an array of shape (depths, lengths), the depths in per cent, and the lengths."""
    depths = sorted({row.depth for row in result.depths if row.depth is not None})
    lengths = list(result.by_length())
    values = np.full((len(depths), len(lengths)), np.nan)
    for row in result.depths:
        if row.depth is not None and row.length is not None:
            values[depths.index(row.depth), lengths.index(row.length)] = row.score
    return values, depths, lengths


def task_section(results: Sequence[EvalResult]) -> dict[str, Any]:
    """Return the page's section on one task of one base model."""
    figures = []
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw_results(axes, results)
    figures.append(embed(figure))
    if results[0].task == "niah":
        size = (1 + 4.2 * len(results), 3.6)
        figure, panels = plt.subplots(1, len(results), figsize=size, layout="constrained", squeeze=False)
        for axes, result in zip(panels[0], results, strict=True):
            draw_grid(figure, axes, *grid(result), title=result.method, window=result.window)
        figures.append(embed(figure))
    wrong = [
        {"method": result.method, **row}
        for result in results
        for row in [row for row in result.responses if row["score"] < 1][:WRONG_SHOWN]
    ]
    return {"title": title_of(vars(results[0])), "figures": figures, "tables": [score_table(results)], "wrong": wrong}


def scale_figures(results: Sequence[Result]) -> list[str]:
    """Draw the scales of every scored adapter that still exists, with its number of trainable parameters."""
    from axolotl_plugins.seal.scales import by_query_head, saved_placements, saved_scales, saved_tensors

    paper = read_paper()["parameters"]
    figures = []
    adapters = {result.model: result for result in results if result.method.startswith("SEAL")}
    for model, result in adapters.items():
        if not (Path(model) / "adapter_config.json").exists():
            continue  # a merged folder has no scales of its own
        if not by_query_head(saved_placements(Path(model))):
            continue
        scales = saved_scales(Path(model))
        printed = paper.get(result.base, {}).get(result.method)
        size = sum(tensor.size for tensor in saved_tensors(Path(model)).values())
        count = f"{size:,} trainable parameters" + (f" (paper {printed[0]}K, table 8)" if printed else "")
        figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
        draw_scales(figure, axes, scales.mean(-1), f"{model}, {result.method}\nmean scale of each head; {count}")
        figures.append(embed(figure))
    return figures


def base_section(name: str, results: Sequence[Result]) -> dict[str, Any]:
    """Return the page's sections on one base model in one folder: by task, then scales."""
    scored: dict[str, list[EvalResult]] = defaultdict(list)
    benchmarks: dict[str, list[BenchmarkResult]] = defaultdict(list)
    for result in results:
        if isinstance(result, EvalResult):
            scored[result.task].append(result)
        else:
            benchmarks[result.task].append(result)
    sections = [task_section(rows) for rows in scored.values()]
    sections += [benchmark_section(task, rows) for task, rows in benchmarks.items()]
    sources = [source_of(vars(result)) for result in results if result.origin]
    sources = [source for place, source in enumerate(sources) if source not in sources[:place]]
    return {"name": name, "sources": sources, "sections": sections, "scales": scale_figures(results)}


def study_runs(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``task``, ``method`` and ``scores`` of every run in the JSON of a study or of the demo; else nothing."""
    if {"rows", "rates"} <= values.keys():
        return [row for row in values["rows"] if row["scores"]]
    if {"prompts", "samples_per_length"} <= values.keys():
        shared = [{"length": length, "count": values["samples_per_length"]} for length in values["lengths"]]
        return [
            {"task": "line", "method": method, "scores": [a | b for a, b in zip(shared, scores, strict=True)]}
            for method, scores in values["scores"].items()
        ]
    return []


def study_table(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a table of one task, a row per method: means over seeds, with an interval where there is one seed."""
    lengths = sorted({score["length"] for run in runs for score in run["scores"]})
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        cells: list[dict[str, Any] | None] = []
        for length in lengths:
            scores = [s for run in runs if run["method"] == method for s in run["scores"] if s["length"] == length]
            count = sum(score["count"] for score in scores)
            mean = sum(score["score"] * score["count"] for score in scores) / max(1, count)
            interval = scores[0] if len(scores) == 1 else {"low": None, "high": None}
            cells.append({**interval, "score": mean, "count": count, "paper": None} if scores else None)
        rows.append({"name": method, "model": "", "cells": cells})
    return {"rows_are": "method", "columns": lengths, "rows": rows}


def study_section(file: Path, values: dict[str, Any], figures: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the page's section on a study or the demo: by task a plot and a table, its figures, scales and answers."""
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in study_runs(values):
        by_task[run["task"]].append(run)
    sections = []
    for runs in by_task.values():
        methods = len({run["method"] for run in runs})
        figure, axes = plt.subplots(figsize=(8, max(4, 0.25 * methods)), layout="constrained")
        draw_accuracy(axes, runs, at="length")
        axes.legend().remove()  # beside the plot, as a study may have 20 methods
        figure.legend(loc="outside right upper")
        sections.append({"title": title_of(runs[0]), "figures": [embed(figure)], "tables": [study_table(runs)]})
    maps = []
    for method, scales in values.get("scales", {}).items():
        figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
        draw_scales(figure, axes, np.array(scales), f"{method}: mean scale of each head")
        maps.append(embed(figure))
    sections += figure_sections(figures, file.stem)
    return {"name": file.name, "sources": [source_of(values)], "sections": sections, "scales": maps,
            "prompts": values.get("prompts", [])}  # fmt: skip


def result_folders(folder: Path) -> list[Path]:
    """Return a folder of results and its subfolders of results: not those of probes, models and adapters."""
    inner = [part for part in sorted(folder.glob("*/")) if part.name != "probes"]
    return [folder, *(part for part in inner if not any(part.glob("*config.json")))]


def write_report(folder: Path, out: Path) -> int:
    """Write the page: results, studies, the demo, probes from ``folder/probes``, and the figures of both folders.

    Results in other subfolders follow under the name of their folder.

    Returns:
        The number of results it shows.

    Raises:
        ValueError: see ``read_results``; or there is no result at all.
    """
    check_output(out)
    by_name: dict[str, list[Result]] = defaultdict(list)
    for part in result_folders(folder):
        for result in read_results(part):
            by_name[result.base if part == folder else f"{result.base}, {part.name}"].append(result)
    probes = [
        probe_section(file, values) for file, values in read_objects(folder / "probes").items() if "kind" in values
    ]
    studies = [(file, values) for file, values in read_objects(folder).items() if study_runs(values)]
    if not by_name and not probes and not studies:
        raise ValueError(f"{folder}: holds no results: make some with `seal eval`")
    names = [file.stem for file, _ in studies]
    figures = {figure: study_of(figure, names) for figure in undrawn_figures(folder)}
    bases = [base_section(name, results) for name, results in by_name.items()]
    for file, values in studies:
        bases.append(study_section(file, values, [figure for figure, name in figures.items() if name == file.stem]))
    others = [figure for figure, name in figures.items() if name is None] + undrawn_figures(folder / "probes")
    if others:
        bases.append({"name": "Other figures", "sections": figure_sections(others)})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        bases=bases,
        probes=probes,
    )
    write_text(out, page)
    return sum(map(len, by_name.values())) + len(studies) + len(probes)
