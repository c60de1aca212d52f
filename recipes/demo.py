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

from axolotl_plugins.common.console import quiet_libraries, stop
from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.io import load_json, load_yaml, write_text
from axolotl_plugins.common.provenance import machine
from data_gen import tasks
from eval.result_cache import result_file, result_name

METHODS = ("SEAL-H", "SEAL-C")
SHOWN = 3  # prompts whose answers are shown

app = typer.Typer(add_completion=False)


def read_scores(model: Path, folder: Path) -> dict[str, Any]:
    """Read the result of `seal eval --model MODEL --task line`."""
    return load_json(result_file(folder, "line", result_name(str(model))))


def different_answers(unmerged: dict[str, Any], merged: dict[str, Any]) -> int:
    """Count the samples of both results that the merged model answers differently.

    Raises:
        ValueError: they have no sample in common.
    """
    answers = {(row["length"], row["index"]): row["response"] for row in merged["responses"]}
    shared = [row for row in unmerged["responses"] if (row["length"], row["index"]) in answers]
    if not shared:
        raise ValueError("the results of merged and unmerged models have no sample in common")
    return sum(row["response"] != answers[row["length"], row["index"]] for row in shared)


def summarise(base: Path, adapters: list[Path], scores: Path) -> dict[str, Any]:
    """Collect accuracy by length, scales and the first answers: the content of results/demo.json.

    Raises:
        ValueError: a merged model answers a sample differently from its adapter, or a file is missing or corrupt.
    """
    from axolotl_plugins.seal.scales import saved_scales

    results = {"base": read_scores(base, scores)}
    scales = {}
    for adapter in adapters:
        unmerged, merged = (read_scores(Path(f"{adapter}{ending}"), scores) for ending in ("", "_merged"))
        method = merged["method"]
        if different := different_answers(unmerged, merged):
            raise ValueError(f"{adapter}: {different} answers of the merged model differ from the adapter's")
        results[method], scales[method] = merged, saved_scales(adapter)
    lengths = [row["length"] for row in results["base"]["scores"]]
    middle = lengths[len(lengths) // 2]
    middle_rows = [[row for row in result["responses"] if row["length"] == middle] for result in results.values()]
    return {
        "base_model": str(base),
        "lengths": lengths,
        "samples_per_length": results["base"]["scores"][0]["count"],
        "trainable_parameters": {method: int(values.size) for method, values in scales.items()},
        "scores": {
            method: [{key: row[key] for key in ("tokens", "score", "low", "high")} for row in result["scores"]]
            for method, result in results.items()
        },
        "prompts": [
            {
                "tokens": rows[0]["tokens"],
                "question": load_yaml(Path(tasks.__file__).with_name("line.yml"))["question"].format(
                    key=rows[0]["key"]
                ),
                "reference": rows[0]["references"][0],
                "answers": {method: row["response"] for method, row in zip(results, rows, strict=True)},
            }
            for rows in list(zip(*middle_rows, strict=True))[:SHOWN]
        ],
        "scales": {method: values.mean(2).round(4).tolist() for method, values in scales.items()},
        "machine": machine(),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print scores by length, and prompts with the answers of all models side by side."""
    console = Console()
    table = Table(title=f"line retrieval: accuracy (95 % interval), {summary['samples_per_length']} samples a length")
    table.add_column("method")
    table.add_column("trainable parameters", justify="right")
    for length in summary["lengths"]:
        table.add_column(f"{length:,} tokens", justify="right")
    for method, rows in summary["scores"].items():
        cells = [f"{row['score']:.2f} ({row['low']:.2f}-{row['high']:.2f})" for row in rows]
        table.add_row(method, f"{summary['trainable_parameters'].get(method, 0):,}", *cells)
    console.print(table)
    answers = Table(show_lines=True, title=f"the first {SHOWN} prompts of the middle length, decoded greedily")
    for name in ("question", "reference", *summary["scores"]):
        answers.add_column(name, overflow="fold")
    for prompt in summary["prompts"]:
        cells = [prompt["answers"][method].strip()[:200] for method in summary["scores"]]
        answers.add_row(prompt["question"], prompt["reference"], *cells)
    console.print(answers)


def plot(summary: dict[str, Any], out: Path) -> None:
    """Plot accuracy by length, and the scales of all heads (SEAL-C: means over a head's channels)."""
    import matplotlib.pyplot as plt

    from eval.plots import draw_accuracy, draw_scales, save_figure

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
    quiet_libraries()
    adapters = adapter or [Path(f"outputs/smollm2_demo_{method}") for method in ("sealh", "sealc")]
    try:
        summary = summarise(base, adapters, scores)
        plot(summary, out.with_suffix(".png"))
        write_text(out, json.dumps(summary, indent=1) + "\n")
    except (ValueError, OSError, KeyError) as error:
        stop(error)
    print_summary(summary)
    print(f"{out} and {out.with_suffix('.png')}: merged and unmerged models gave the same answers")


if __name__ == "__main__":
    run_app(app, "python -m recipes.demo")
