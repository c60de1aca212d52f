"""Pictures of results."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from axolotl_plugins.common.io import written_whole

COLOURS = {
    "base": "#555555", "SEAL-H": "#e08214", "SEAL-C": "#2166ac", "shuffled": "#9467bd", "wrong facts": "#2ca02c",
    "wrong answers": "#d62728", "one-shot": "#17becf", "LoRA": "#2ca02c", "DoRA": "#9467bd", "query": "#8c564b",
    "SEAL-H shuffled": "#fdb863", "SEAL-C shuffled": "#92c5de", "SEAL-H wrong answers": "#b35806",
    "SEAL-C wrong answers": "#053061",
}  # fmt: skip


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure as PNG so that a reader sees all of it or none; equal figures give equal bytes."""
    with written_whole(out) as partial:
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw_accuracy(axes: Axes, results: list[dict[str, Any]], at: str = "tokens") -> None:
    """Accuracy over length, one line per method: mean over its results (seeds), and their range or 95 % interval.

    Args:
        axes: to draw on.
        results: each with ``method`` and ``scores``.
        at: what of a score says its length: ``tokens``, measured, or ``length``, the one that was asked for.
    """
    methods: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        methods[result["method"]].append(result)
    for method, runs in methods.items():
        tokens = [score[at] for score in runs[0]["scores"]]
        table = np.array([[score["score"] for score in run["scores"]] for run in runs])
        if len(runs) > 1:
            low, high = table.min(0), table.max(0)
        else:
            low = np.array([score["low"] for score in runs[0]["scores"]])
            high = np.array([score["high"] for score in runs[0]["scores"]])
        colour = COLOURS.get(method)
        axes.plot(tokens, table.mean(0), marker="o", label=method, color=colour)
        axes.fill_between(tokens, low, high, alpha=0.15, color=colour)
    axes.set(xlabel="prompt length (tokens)", ylabel="score", ylim=(-0.02, 1.04))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")


def draw_scales(figure: Figure, axes: Axes, scales: np.ndarray, title: str) -> None:
    """Scales of shape (layers, heads) in colours that diverge around 1, with their values where there is room."""
    spread = max(0.02, float(np.abs(scales - 1).max()))
    image = axes.imshow(scales, cmap="RdBu_r", vmin=1 - spread, vmax=1 + spread, aspect="auto")
    if scales.size <= 64:
        for (layer, head), value in np.ndenumerate(scales):
            dark = abs(value - 1) > 0.6 * spread
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="head", ylabel="layer", title=title)
    whole_ticks(axes, scales.shape)
    figure.colorbar(image, ax=axes, fraction=0.046)


def whole_ticks(axes: Axes, shape: tuple[int, ...]) -> None:
    """Ticks at whole numbers on a map of shape (layers, heads), sixteen at most on either side."""
    for axis, size in ((axes.xaxis, shape[1]), (axes.yaxis, shape[0])):
        axis.set_ticks(range(0, size, max(1, size // 16)))


def draw_grid(
    figure: Figure, axes: Axes, values: np.ndarray, depths: list[int], lengths: list[int], *, title: str, window: int
) -> None:
    """Scores of shape (depths, lengths) from red to green; a dotted line where the model's window ends (Figure 5)."""
    image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="prompt length (tokens)", ylabel="depth (%)", title=title)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    within = sum(length <= window for length in lengths)
    if within < len(lengths):
        axes.axvline(within - 0.5, color="black", linestyle=":", linewidth=2)
    figure.colorbar(image, ax=axes, fraction=0.046, label="score")


def accuracy_by_length(results: list[dict[str, Any]], out: Path) -> None:
    """One picture of ``eval.run.run`` results."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw_accuracy(axes, results)
    axes.set_title(f"{results[0]['task']} retrieval, {results[0]['scores'][0]['count']} samples per length")
    save_figure(figure, out)
