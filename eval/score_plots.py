"""Plots of scores by length, and of scales."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from axolotl_plugins.common.io import written_whole
from eval.results import EvalResult, title_of, to_json

COLOURS = {
    "base": "#555555", "SEAL-H": "#e08214", "SEAL-C": "#2166ac", "shuffled": "#9467bd", "wrong facts": "#2ca02c",
    "wrong answers": "#d62728", "one-shot": "#17becf", "LoRA": "#2ca02c", "DoRA": "#9467bd", "query": "#8c564b",
    "SEAL-H shuffled": "#fdb863", "SEAL-C shuffled": "#92c5de", "SEAL-H wrong answers": "#b35806",
    "SEAL-C wrong answers": "#053061", "query+output": "#e377c2", "IA3": "#bcbd22", "LayerNorm": "#7f7f7f",
    "VeRA": "#17becf", "SEAL-C from mixture": "#f4a582", "attention_factor": "#f781bf",
    "value": "#1b9e77", "mlp": "#e6ab02", "query-H": "#fb9a99",
}  # fmt: skip


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure as PNG atomically; equal figures give equal bytes."""
    with written_whole(out) as partial:
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw_accuracy(axes: Axes, results: Sequence[dict[str, Any]], at: str = "tokens") -> None:
    """Draw scores over lengths, one line per method: mean over its results (seeds), and their range or 95 % interval.

    Args:
        axes: to draw on.
        results: each with ``method`` and ``scores``, as in the JSON of a result.
        at: the field of a score that holds its length: measured ``tokens`` or the requested ``length``.
    """
    methods: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        methods[result["method"]].append(result)
    for method, runs in methods.items():
        first = runs[0]["scores"]
        table = np.array([[score["score"] for score in run["scores"]] for run in runs])
        interval = None
        if len(runs) == 1:
            interval = np.array([score["low"] for score in first]), np.array([score["high"] for score in first])
        draw_curve(axes, method, [score[at] for score in first], table, interval)
    finish_accuracy(axes)


def draw_curve(
    axes: Axes, name: str, lengths: Sequence[float], runs: np.ndarray,
    interval: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Draw the mean of runs, shape (runs, lengths), with an interval; None uses the range over runs."""
    low, high = interval or (runs.min(0), runs.max(0))
    (line,) = axes.plot(lengths, runs.mean(0), marker="o", label=name, color=COLOURS.get(name))
    axes.fill_between(lengths, low, high, alpha=0.15, color=line.get_color())


def finish_accuracy(axes: Axes, title: str = "") -> None:
    """Set axis labels and limits of scores over lengths, and add the legend."""
    axes.set(xlabel="prompt length (tokens)", ylabel="score", ylim=(-0.02, 1.04), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")


def draw_scales(figure: Figure, axes: Axes, scales: np.ndarray, title: str) -> None:
    """Draw scales of shape (layers, heads) in colours that diverge around 1, with their values if there is room."""
    spread = max(0.02, float(np.abs(scales - 1).max()))
    image = axes.imshow(scales, cmap="RdBu_r", vmin=1 - spread, vmax=1 + spread, aspect="auto")
    if scales.size <= 64:
        for (layer, head), value in np.ndenumerate(scales):
            dark = abs(value - 1) > 0.6 * spread
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="head", ylabel="layer", title=title)
    set_integer_ticks(axes)
    figure.colorbar(image, ax=axes, fraction=0.046)


def set_integer_ticks(axes: Axes) -> None:
    """Set at most ten ticks per axis of a map of layers and heads, at integers."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(10, integer=True))


def draw_grid(
    figure: Figure, axes: Axes, values: np.ndarray, depths: list[int], lengths: list[int], *, title: str, window: int
) -> None:
    """Draw scores of shape (depths, lengths) from red to green; a dotted line marks the model's window (Figure 5)."""
    image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="prompt length (tokens)", ylabel="depth (%)", title=title)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    within = sum(length <= window for length in lengths)
    if within < len(lengths):
        axes.axvline(within - 0.5, color="black", linestyle=":", linewidth=2)
    figure.colorbar(image, ax=axes, fraction=0.046, label="score")


def name_of(result: EvalResult, results: Sequence[EvalResult]) -> str:
    """Return a result's method, with its shots, and its dtype if results beside it have another."""
    shots = f", {result.shots}-shot" if result.shots else ""
    return result.method + shots + (f", {result.dtype}" if len({row.dtype for row in results}) > 1 else "")


def labels(results: Sequence[EvalResult]) -> list[str]:
    """Return a name for each result on one plot: its method, with shots and model where methods are equal."""
    names = ["one-shot" if result.method == "base" and result.shots == 1 else name_of(result, results)
             for result in results]  # fmt: skip
    return [
        name if names.count(name) == 1 else f"{name}, {result.model}"
        for name, result in zip(names, results, strict=True)
    ]


def draw_results(axes: Axes, results: Sequence[EvalResult]) -> None:
    """Draw results of one task over lengths, a line for each."""
    draw_accuracy(axes, [to_json(row) | {"method": name} for row, name in zip(results, labels(results), strict=True)])


def accuracy_by_length(results: Sequence[EvalResult], out: Path) -> None:
    """Write a plot of results of one task."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw_results(axes, results)
    axes.set_title(f"{title_of(vars(results[0]))}, {results[0].scores[0].count} samples per length")
    save_figure(figure, out)
