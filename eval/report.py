"""Gathers results into one page: ``python -m eval report``, that is ``make report``."""

from __future__ import annotations

import base64
import functools
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader

from axolotl_plugins.common.io import check_output, load_json, write_text
from data_gen.tasks import TaskAttribute
from eval.plots import draw_accuracy, draw_grid, draw_scales

HERE = Path(__file__).parent
TITLES = TaskAttribute("title", mmlu="MMLU")
WRONG_SHOWN = 5
LONGCHAT = "lmsys/longchat-7b-v1.5-32k"  # the one base model of Table 6 and of the paper's MMLU


def read_json(folder: Path) -> list[dict[str, Any]]:
    """All JSON objects in the files of a folder, in the order of their names.

    Raises:
        ValueError: a file is not JSON, or too large.
    """
    found = [load_json(file) for file in sorted(folder.glob("*.json")) if file.is_file()]
    return [one for one in found if isinstance(one, dict)]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of ``python -m eval run`` in a folder, in the order of their names; other JSON files are left out.

    Raises:
        ValueError: see ``read_json``.
    """
    kinds = ({"scores", "responses"}, {"sets", "mean"})
    wanted = [kind | {"base", "method", "task"} for kind in kinds]
    return [found for found in read_json(folder) if any(keys <= found.keys() for keys in wanted)]


@functools.cache
def read_paper() -> dict[str, Any]:
    """``paper.yml``."""
    return yaml.safe_load((HERE / "paper.yml").read_text())


def rate_table(found: dict[str, Any]) -> dict[str, Any]:
    """Mean score of a sweep by rate and number of samples, beside the paper's Table 7."""
    printed: dict[str, dict[int, float]] = {}
    if (found["base_model"], found["task"], found["method"]) == (LONGCHAT, "line", "SEAL-H"):
        printed = read_paper()["learning_rate_by_samples"]
    by_rate = {float(rate): row for rate, row in printed.items()}
    means = {(one["rate"], one["samples"], one["epochs"]): one["mean"] for one in found["over_seeds"]}
    rates, columns = sorted({key[0] for key in means}), sorted({key[1:] for key in means})
    rows = []
    for rate in rates:
        cells: list[dict[str, Any] | None] = []
        for count, epochs in columns:
            paper = by_rate.get(rate, {}).get(count) if epochs == 1 else None
            score = means.get((rate, count, epochs))
            cells.append(None if score is None else {
                "score": score, "low": None,
                "count": found["validation_samples"] * len(found["lengths"]) * len(found["seeds"]),
                "paper": None if paper is None else (paper, 7),
            })  # fmt: skip
        rows.append({"name": f"{rate:g}", "model": "", "cells": cells})
    titles = [f"{count} samples" + (f" × {epochs}" if epochs > 1 else "") for count, epochs in columns]
    return {"rows_are": "learning rate", "columns": titles, "rows": rows}


def probe_section(found: dict[str, Any]) -> dict[str, Any]:
    """What the page says about a result of ``python -m eval probe``."""
    from eval.probe.captions import CAPTION, TITLE
    from eval.probe.plots import DRAW

    kind = found["kind"]
    shown = rate_table(found) if kind == "sweep" else None
    return {
        "title": TITLE[kind], "figure": picture(DRAW[kind](found)), "table": shown, "caption": CAPTION[kind](found)
    }  # fmt: skip


def paper_scores() -> list[dict[str, Any]]:
    """The paper's numbers by table, see ``paper.yml``; RULER's in [0, 1] like ours."""
    rows = []
    for row in read_paper()["scores"]:
        whole = 1 if row["task"] == "line" else 100
        rows.append({**row, "by_length": {length: score / whole for length, score in row["by_length"].items()}})
    return rows


def sets_section(task: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page says about a benchmark of several sets: the method's scores beside the paper's."""
    paper = read_paper()
    names = list(dict.fromkeys(row["name"] for result in results for row in result["sets"]))
    rows = []
    for result in results:
        ours = result["base"] == LONGCHAT
        printed = paper["longbench"].get(result["method"], {}) if task == "longbench" and ours else {}
        by_name = {row["name"]: row for row in result["sets"]}
        cells = [
            {**by_name[name], "paper": (printed[name], 6) if name in printed else None} if name in by_name else None
            for name in names
        ]
        mmlu = paper["mmlu"].get(result["method"]) if task == "mmlu" and ours else None
        cells.append({"score": result["mean"], "low": None, "count": sum(row["count"] for row in result["sets"]),
                      "paper": None if mmlu is None else (mmlu, "–, section 5.2")})  # fmt: skip
        rows.append({"name": result["method"], "model": result["model"], "cells": cells})
    shown = {"rows_are": "method", "columns": [*names, "mean"], "rows": rows}
    return {"title": TITLES[task], "figures": [], "tables": [shown], "wrong": []}


def paper_value(result: dict[str, Any], length: int, paper: list[dict[str, Any]]) -> tuple[float, int] | None:
    """The paper's score and table for the same base model, task, method and length (to the thousand), if it has one."""
    method = "one-shot" if result.get("shots") else result["method"]
    for row in paper:
        if (row["model"], row["task"], row["method"]) == (result["base"], result["task"], method):
            for thousands, score in row["by_length"].items():
                if length in (thousands * 1000, thousands * 1024):
                    return score, row["table"]
    return None


def picture(figure: plt.Figure) -> str:
    """A figure as a data address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def table(results: list[dict[str, Any]], paper: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of methods with a cell per length."""
    lengths = sorted({score["length"] for result in results for score in result["scores"]})
    rows = []
    for result in results:
        by_length = {score["length"]: score for score in result["scores"]}
        cells = [
            {**by_length[length], "paper": paper_value(result, length, paper)} if length in by_length else None
            for length in lengths
        ]
        rows.append({"name": result["method"] + (f", {result['shots']}-shot" if result.get("shots") else ""),
                     "model": result["model"], "cells": cells})  # fmt: skip
    return [{"rows_are": "method", "columns": lengths, "rows": rows}]


def grid(result: dict[str, Any]) -> tuple[np.ndarray, list[int], list[int]]:
    """Mean score of needles by depth and length: shape (depths, lengths), then depths in per cent and lengths."""
    depths = sorted({cell["depth"] for cell in result["depths"]})
    lengths = [score["length"] for score in result["scores"]]
    values = np.full((len(depths), len(lengths)), np.nan)
    for cell in result["depths"]:
        values[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["score"]
    return values, depths, lengths


def labels(results: list[dict[str, Any]]) -> list[str]:
    """A name for each result on one picture: its method, and whatever else tells it from the others."""
    names = ["one-shot" if result["method"] == "base" and result.get("shots") == 1 else
             result["method"] + (f", {result['shots']}-shot" if result.get("shots") else "")
             for result in results]  # fmt: skip
    return [
        name if names.count(name) == 1 else f"{name}, {result['model']}"
        for name, result in zip(names, results, strict=True)
    ]


def section(task: str, results: list[dict[str, Any]], paper: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page says about one task of one base model."""
    if "sets" in results[0]:
        return sets_section(task, results)
    figures = []
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw_accuracy(axes, [result | {"method": name} for result, name in zip(results, labels(results), strict=True)])
    figures.append(picture(figure))
    if task == "niah":
        size = (1 + 4.2 * len(results), 3.6)
        figure, grids = plt.subplots(1, len(results), figsize=size, layout="constrained", squeeze=False)
        for axes, result in zip(grids[0], results, strict=True):
            draw_grid(figure, axes, *grid(result), title=result["method"], window=result["window"])
        figures.append(picture(figure))
    wrong = [
        {"method": result["method"], **row}
        for result in results
        for row in [row for row in result["responses"] if row["score"] < 1][:WRONG_SHOWN]
    ]
    return {"title": TITLES.get(task, task), "figures": figures, "tables": table(results, paper), "wrong": wrong}


def scale_maps(results: list[dict[str, Any]]) -> list[str]:
    """Pictures of the scales of every adapter that was scored and is still there, and how much was learned."""
    from axolotl_plugins.seal.scales import saved_scales

    paper = read_paper()["parameters"]
    pictures = []
    adapters = {result["model"]: result for result in results if result["method"].startswith("SEAL")}
    for model, result in adapters.items():
        if not (Path(model) / "adapter_config.json").exists():
            continue  # a merged folder has no scales of its own
        scales = saved_scales(Path(model))
        printed = paper.get(result["base"], {}).get(result["method"])
        learned = f"{scales.size:,} numbers" + (f" (paper {printed[0]}K, table 8)" if printed else "")
        figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
        draw_scales(figure, axes, scales.mean(-1), f"{model}\nmean scale of each head; {learned}")
        pictures.append(picture(figure))
    return pictures


def write_report(folder: Path, out: Path) -> int:
    """Write the page; nothing on it comes from the network. Probes' results are those in ``folder/probes``.

    Returns:
        How many results it shows.

    Raises:
        ValueError: see ``read_json``; or there is no result at all.
    """
    check_output(out)
    results, paper = read_results(folder), paper_scores()
    probes = [found for found in read_json(folder / "probes") if "kind" in found]
    if not results + probes:
        raise ValueError(f"{folder}: holds no results: make some with `python -m eval run`")
    bases: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        bases[result["base"]][result["task"]].append(result)
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        bases=[
            {"name": base, "sections": [section(task, rows, paper) for task, rows in tasks.items()],
             "scales": scale_maps([row for rows in tasks.values() for row in rows])}
            for base, tasks in bases.items()
        ],
        probes=[probe_section(found) for found in probes],
    )  # fmt: skip
    write_text(out, page)
    return len(results) + len(probes)
