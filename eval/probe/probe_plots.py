"""Plots of probes, one function for each kind of result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from eval.probe.head_importance import MEASURES, changes, measure_of
from eval.probe.quadrants import runs_by_setting
from eval.results import title_of
from eval.score_plots import draw_curve, draw_scales, finish_accuracy, set_integer_ticks

LABELLED = 12  # heads that are named in a scatter plot


def ablation(result: dict[str, Any]) -> Figure:
    """Plot an ablation map: heads in the plane of two lengths (Figure 2b), or channels as bars (Figure 2d)."""
    return scatter(result) if result["unit"] == "head" else bars(result)


def scatter(result: dict[str, Any]) -> Figure:
    """Plot every head's change at the first and last length; extremes are named, quadrants 1 and 3 shaded."""
    measure = measure_of(result)
    first, last = result["lengths"][0], result["lengths"][-1]
    mid, long = (changes(result, length, measure) for length in (first, last))
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    (left, right), (bottom, top) = limits = [around_zero(values) for values in (mid, long)]
    axes.fill_between((0, right), 0, top, color="#2166ac", alpha=0.08, linewidth=0)
    axes.fill_between((left, 0), bottom, 0, color="#b2182b", alpha=0.08, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.scatter(mid, long, s=18, color="#333333", zorder=3)
    axes.set(xlim=limits[0], ylim=limits[1])
    order = np.argsort(-(np.abs(mid) / (right - left) + np.abs(long) / (top - bottom)).ravel())[:LABELLED]
    names: dict[tuple[float, float], list[str]] = {}  # heads with equal changes share a label
    for layer, head in (np.unravel_index(flat, mid.shape) for flat in order):
        names.setdefault((float(mid[layer, head]), float(long[layer, head])), []).append(f"L{layer}H{head}")
    figure.draw_without_rendering()  # labels can be placed only then
    label_apart(axes, {" ".join(heads): at for at, heads in names.items()})
    method = "one head ablated" + ("" if result["kind"] == "ablation" else " (by its gradient)")
    axes.set(xlabel=f"change of {MEASURES[measure]} at {first} tokens", ylabel=f"at {last} tokens",
             title=f"{title_of(result)}, {result['samples']} samples: {method}")  # fmt: skip
    return figure


def around_zero(values: np.ndarray) -> tuple[float, float]:
    """Return axis limits that include all values and zero, with a margin."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    margin = 0.2 * (high - low) or 1.0
    return low - margin, high + margin


def label_apart(axes: Axes, names: dict[str, tuple[float, float]]) -> None:
    """Label points on the first side where the label covers no point and no earlier label; else omit it.

    Args:
        axes: with its final limits, drawn once.
        names: coordinates by name, the most important first.
    """
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(list(names.values()))]
    for name, at in names.items():
        for side in ((5, 4), (5, -11), (-27, 4), (-27, -11)):
            text = axes.annotate(name, at, xytext=side, textcoords="offset points", fontsize=8)
            box = text.get_window_extent()
            if not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def bars(result: dict[str, Any]) -> Figure:
    """Plot the change at the longest length from ablating each channel of some heads."""
    measure, length = measure_of(result), str(result["lengths"][-1])
    heads = result["change"][measure][length]
    figure, grid = plt.subplots(len(heads), 1, figsize=(8, 1 + 2.2 * len(heads)), layout="constrained", squeeze=False)
    for axes, (name, values) in zip(grid[:, 0], heads.items(), strict=True):
        colours = ["#2166ac" if value > 0 else "#b2182b" for value in values]
        axes.bar(range(len(values)), values, color=colours)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=f"{name} at {length} tokens", xlabel="channel ablated", ylabel=MEASURES[measure])
    return figure


def quadrants(result: dict[str, Any]) -> Figure:
    """Plot scores over lengths with heads scaled by quadrant (Figure 2c)."""
    return score_curves(runs_by_setting(result), f"{title_of(result)}: scales from a map, nothing trained")


def controls(result: dict[str, Any]) -> Figure:
    """Plot scores over lengths of a tuned model beside its controls."""
    runs = {result["method"] if name == "tuned" else name: scores for name, scores in result["scores"].items()}
    return score_curves(runs, f"{title_of(result)}: {result['method']} and controls, {len(result['seeds'])} seeds")


def score_curves(runs: dict[str, list[dict[str, float]]], title: str) -> Figure:
    """Plot the mean and range over runs of scores by length, a curve per name."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, scores in runs.items():
        draw_curve(axes, name, [int(length) for length in scores[0]], np.array([list(run.values()) for run in scores]))
    finish_accuracy(axes, title)
    return figure


def direct(result: dict[str, Any]) -> Figure:
    """Plot direct effects on the right and the wrong token: heads as maps, MLPs as bars, then logits (Figure 4)."""
    models = result["models"]
    tokens = result["tokens"]
    figure, grid = plt.subplots(
        len(models), len(tokens) + 2, figsize=(4 * (len(tokens) + 2), 3.2 * len(models)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    heads = np.array([model["heads"] for model in models])
    limit = float(np.abs(heads).max())
    for row, model in zip(grid, models, strict=True):
        for axes, token, values in zip(row, tokens, np.array(model["heads"]), strict=False):
            image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            axes.set(xlabel="head", ylabel="layer", title=f"{model['method']}: heads on {token!r}")
            set_integer_ticks(axes)
            figure.colorbar(image, ax=axes, fraction=0.046)
        mlps = np.array(model["mlps"])
        width = 0.8 / len(tokens)
        for index, token in enumerate(tokens):
            row[-2].bar(np.arange(mlps.shape[1]) + index * width, mlps[index], width, label=repr(token))
        row[-2].set(xlabel="layer", ylabel="direct effect", title=f"{model['method']}: MLPs")
        row[-2].xaxis.get_major_locator().set_params(integer=True)
        row[-2].legend()
        row[-1].bar([repr(token) for token in result["candidates"]], model["candidate_logits"], color="#555555")
        row[-1].set(ylabel="logit", title=f"{model['method']}: final logits")
        row[-1].tick_params(axis="x", rotation=90)
        row[-1].set_ylim(min(0, min(model["candidate_logits"])), None)
    return figure


def transfer(result: dict[str, Any]) -> Figure:
    """Plot T(A -> B) as a matrix in colours that diverge around 0 (Figure 8); a dash where it is not defined."""
    names = list(result["transferability"])
    tasks = list(result["transferability"][names[0]])
    values = np.array([[result["transferability"][name][task] for task in tasks] for name in names], dtype=float)
    figure, axes = plt.subplots(figsize=(2.5 + len(tasks), 1.8 + 0.7 * len(names)), layout="constrained")
    limit = float(np.nanmax([0.1, *np.abs(values).ravel()]))
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text, colour = "–" if np.isnan(value) else f"{value:.2f}", "white" if abs(value) > 0.6 * limit else "k"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="scored on", ylabel="tuned on", title="transferability (equation 2)")
    figure.colorbar(image, ax=axes, fraction=0.046)
    return figure


def sweep(result: dict[str, Any]) -> Figure:
    """Plot the mean score over learning rates, one line for each number of samples and epochs (Table 7, Figure 9)."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for count, passes in sorted({(row["samples"], row["epochs"]) for row in result["over_seeds"]}):
        rows = [row for row in result["over_seeds"] if (row["samples"], row["epochs"]) == (count, passes)]
        rates, means = [row["rate"] for row in rows], [row["mean"] for row in rows]
        axes.plot(rates, means, marker="o", label=f"{count} samples, {passes} epoch{'s' if passes > 1 else ''}")
    axes.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="mean validation score",
        title=f"{result['method']}: {title_of(result)}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def scales(result: dict[str, Any]) -> Figure:
    """Plot scales by head, and for SEAL-C their standard deviation over a head's channels."""
    values = np.array(result["mean"])
    spread = np.array(result["spread"])
    by_channel = bool(spread.any())
    figure, grid = plt.subplots(
        1, 1 + by_channel, figsize=(5 + 4.5 * by_channel, 3.6), layout="constrained", squeeze=False
    )
    draw_scales(figure, grid[0, 0], values, f"{result['method']}: mean scale of each head")
    if by_channel:
        image = grid[0, 1].imshow(spread, cmap="viridis", aspect="auto")
        grid[0, 1].set(xlabel="head", ylabel="layer", title="standard deviation over its channels")
        set_integer_ticks(grid[0, 1])
        figure.colorbar(image, ax=grid[0, 1], fraction=0.046)
    return figure


DRAW: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "ablation": ablation, "gradient": scatter, "quadrants": quadrants, "controls": controls, "direct": direct,
    "transfer": transfer, "sweep": sweep, "scales": scales,
}  # fmt: skip
