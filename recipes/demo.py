"""Show the results of `make demo`: a table, prompts with the answers of base and tuned models, and a plot.

The Makefile runs the commands that a user would type; this reads the files that they wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from axolotl_plugins.common.console import run
from axolotl_plugins.common.environment import machine
from axolotl_plugins.common.io import load_yaml, write_text
from data_gen import tasks
from eval.result_tables import print_scores
from eval.results import EvalResult, read_results, to_json

METHODS = ("SEAL-H", "SEAL-C")
SHOWN = 3  # prompts whose answers are shown

app = typer.Typer(add_completion=False)


def different_answers(unmerged: EvalResult, merged: EvalResult) -> int:
    """Count the samples of both results that the merged model answers differently.

    Raises:
        ValueError: they have no sample in common.
    """
    answers = {(row["length"], row["index"]): row["response"] for row in merged.responses}
    shared = [row for row in unmerged.responses if (row["length"], row["index"]) in answers]
    if not shared:
        raise ValueError("the results of merged and unmerged models have no sample in common")
    return sum(row["response"] != answers[row["length"], row["index"]] for row in shared)


def summarise(base: Path, results: dict[str, EvalResult], scales: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return accuracy by length, scales and the first answers: the content of results/demo.json.

    Results are by method; so are scales, of shape (layers, heads, channels).
    """
    scores = {method: to_json(result)["scores"] for method, result in results.items()}
    lengths = [row["length"] for row in scores["base"]]
    middle = lengths[len(lengths) // 2]
    rows_of_middle = [[row for row in result.responses if row["length"] == middle] for result in results.values()]
    question = load_yaml(Path(tasks.__file__).with_name("line.yml"))["question"]
    return {
        "command": "make demo",
        "base_model": str(base),
        "lengths": lengths,
        "samples_per_length": scores["base"][0]["count"],
        "trainable_parameters": {method: int(values.size) for method, values in scales.items()},
        "scores": {
            method: [{key: row[key] for key in ("tokens", "score", "low", "high")} for row in rows]
            for method, rows in scores.items()
        },
        "prompts": [
            {
                "tokens": rows[0]["tokens"],
                "question": question.format(key=rows[0]["key"]),
                "reference": rows[0]["references"][0],
                "answers": {method: row["response"] for method, row in zip(results, rows, strict=True)},
            }
            for rows in list(zip(*rows_of_middle, strict=True))[:SHOWN]
        ],
        "scales": {method: values.mean(2).round(4).tolist() for method, values in scales.items()},
        "machine": machine(),
    }


def print_answers(prompts: list[dict[str, Any]]) -> None:
    """Print prompts with the answers of all models side by side."""
    table = Table(show_lines=True, title=f"the first {SHOWN} prompts of the middle length, decoded greedily")
    for name in ("question", "reference", *prompts[0]["answers"]):
        table.add_column(name, overflow="fold")
    for prompt in prompts:
        answers = [answer.strip()[:200] for answer in prompt["answers"].values()]
        table.add_row(prompt["question"], prompt["reference"], *answers)
    Console().print(table)


def plot(summary: dict[str, Any], out: Path) -> None:
    """Plot accuracy by length, and the scales of all heads (SEAL-C: means over a head's channels)."""
    import matplotlib.pyplot as plt

    from eval.score_plots import draw_accuracy, draw_scales, save_figure

    figure, (left, *maps) = plt.subplots(1, 3, figsize=(14, 5), width_ratios=(1.4, 1, 1), layout="constrained")
    draw_accuracy(left, [{"method": method, "scores": rows} for method, rows in summary["scores"].items()])
    left.set_title(f"line retrieval, {summary['samples_per_length']} test samples per length")
    for axes, method in zip(maps, METHODS, strict=True):
        label = "scales" if method == "SEAL-H" else "scales, mean of each head"
        title = f"{method}: {summary['trainable_parameters'][method]:,} {label}"
        draw_scales(figure, axes, np.array(summary["scales"][method]), title)
    save_figure(figure, out)


@app.command(epilog="Example: python -m recipes.demo (which `make demo` runs at its end)")
def main(
    base: Annotated[Path, typer.Option(help="The base model.")] = Path("models/smollm2-135m"),
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Adapter folders; the results of FOLDER_merged are read as well.")
    ] = None,
    scores: Annotated[Path, typer.Option(help="Folder with the results of `eval run`.")] = Path("outputs/demo"),
    out: Annotated[Path, typer.Option(help="JSON file to write; the plot goes beside it.")] = Path("results/demo.json"),
) -> None:
    """Print and plot the results of `make demo`."""
    from axolotl_plugins.seal.scales import saved_scales

    by_model = {result.model: result for result in read_results(scores) if isinstance(result, EvalResult)}
    folders = adapter or [Path(f"outputs/smollm2_demo_{method}") for method in ("sealh", "sealc")]
    wanted = [str(base), *(f"{folder}{ending}" for folder in folders for ending in ("", "_merged"))]
    if missing := [model for model in wanted if model not in by_model]:
        raise ValueError(f"{scores}: has no result of {missing[0]}: call `make demo`")
    results, scales = {"base": by_model[str(base)]}, {}
    for folder in folders:
        unmerged, merged = by_model[str(folder)], by_model[f"{folder}_merged"]
        if different := different_answers(unmerged, merged):
            raise ValueError(f"{folder}: {different} answers of the merged model differ from the adapter's")
        results[merged.method], scales[merged.method] = merged, saved_scales(folder)
    summary = summarise(base, results, scales)
    plot(summary, out.with_suffix(".png"))
    write_text(out, json.dumps(summary, indent=1) + "\n")
    counts = {method: f"\n{count:,} scales" for method, count in summary["trainable_parameters"].items()}
    print_scores(list(results.values()), [f"{method}{counts.get(method, '')}" for method in results])
    print_answers(summary["prompts"])
    print(f"{out} and {out.with_suffix('.png')}: merged and unmerged models gave the same answers")


if __name__ == "__main__":
    run(app, "python -m recipes.demo")
