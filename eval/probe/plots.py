"""Pictures of what probes found, one function for each kind of result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from eval.plots import COLOURS, draw_scales, whole_ticks
from eval.probe.head_importance import changes

LABELLED = 12  # heads whose names stand in a scatter plot


def removal(found: dict[str, Any]) -> Figure:
    """A removal map: heads in the plane of two lengths (Figure 2b), or channels as bars (Figure 2d)."""
    return scatter(found) if found["unit"] == "head" else bars(found)


def gradient(found: dict[str, Any]) -> Figure:
    """A gradient map: the same plane, of predicted changes of the log-probability."""
    return scatter(found)


def scatter(found: dict[str, Any]) -> Figure:
    """Every head's change at the first and the last length; the extreme ones named, quadrants one and three shaded."""
    measure = "score" if "score" in found["change"] else "logprob"
    first, last = found["lengths"][0], found["lengths"][-1]
    mid, long = (changes(found, length, measure) for length in (first, last))
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    (left, right), (bottom, top) = limits = [around_zero(values) for values in (mid, long)]
    axes.fill_between((0, right), 0, top, color="#2166ac", alpha=0.08, linewidth=0)
    axes.fill_between((left, 0), bottom, 0, color="#b2182b", alpha=0.08, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.scatter(mid, long, s=18, color="#333333", zorder=3)
    axes.set(xlim=limits[0], ylim=limits[1])
    order = np.argsort(-(np.abs(mid) / (right - left) + np.abs(long) / (top - bottom)).ravel())[:LABELLED]
    names: dict[tuple[float, float], list[str]] = {}  # heads that do the same share a label
    for layer, head in (np.unravel_index(flat, mid.shape) for flat in order):
        names.setdefault((float(mid[layer, head]), float(long[layer, head])), []).append(f"L{layer}H{head}")
    figure.draw_without_rendering()  # labels can be placed only then
    label_apart(axes, {" ".join(heads): at for at, heads in names.items()})
    what = "score" if measure == "score" else "log-probability of the answer"
    how = "one head removed" + ("" if found["kind"] == "removal" else " (by its gradient)")
    axes.set(xlabel=f"change of {what} at {first} tokens", ylabel=f"at {last} tokens",
             title=f"{found['task']}, {found['samples']} samples: {how}")  # fmt: skip
    return figure


def around_zero(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that show all values, and some room on either side of them and of zero."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    room = 0.2 * (high - low) or 1.0
    return low - room, high + room


def label_apart(axes: Axes, names: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, on the first side where they cover no point and no earlier name; else none.

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


def bars(found: dict[str, Any]) -> Figure:
    """The change at the longest length that removing each channel of some heads makes."""
    measure, length = "logprob", str(found["lengths"][-1])
    heads = found["change"][measure][length]
    figure, grid = plt.subplots(len(heads), 1, figsize=(8, 1 + 2.2 * len(heads)), layout="constrained", squeeze=False)
    for axes, (name, values) in zip(grid[:, 0], heads.items(), strict=True):
        colours = ["#2166ac" if value > 0 else "#b2182b" for value in values]
        axes.bar(range(len(values)), values, color=colours)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=f"{name} at {length} tokens", xlabel="channel removed", ylabel="log-probability")
    return figure


def quadrants(found: dict[str, Any]) -> Figure:
    """Scores over lengths with heads scaled by quadrant (Figure 2c)."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, scores in found["scores"].items():
        lines(axes, name, [scores])
    finish(axes, f"{found['task']}: scales from a map, nothing trained")
    return figure


def controls(found: dict[str, Any]) -> Figure:
    """Scores over lengths of a tuned model beside its controls."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, runs in found["scores"].items():
        lines(axes, found["method"] if name == "tuned" else name, runs)
    finish(axes, f"{found['task']}: {found['method']} and controls, {len(found['seeds'])} seeds")
    return figure


def lines(axes: Axes, name: str, runs: list[dict[str, float]]) -> None:
    """Mean over runs of scores by length, and their range."""
    lengths = [int(length) for length in runs[0]]
    table = np.array([list(run.values()) for run in runs])
    drawn = axes.plot(lengths, table.mean(0), marker="o", label=name, color=COLOURS.get(name))
    axes.fill_between(lengths, table.min(0), table.max(0), alpha=0.12, color=drawn[0].get_color())


def finish(axes: Axes, title: str) -> None:
    """What all pictures of scores over lengths have."""
    axes.set(xlabel="prompt length (tokens)", ylabel="score", ylim=(-0.02, 1.04), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def direct(found: dict[str, Any]) -> Figure:
    """Direct effects on the right and the wrong token: heads as maps, MLPs as bars, then the logits (Figure 4)."""
    models = found["models"]
    tokens = found["tokens"]
    figure, grid = plt.subplots(
        len(models), len(tokens) + 2, figsize=(4 * (len(tokens) + 2), 3.2 * len(models)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    heads = np.array([model["heads"] for model in models])
    reach = float(np.abs(heads).max())
    for row, model in zip(grid, models, strict=True):
        for axes, token, values in zip(row, tokens, np.array(model["heads"]), strict=False):
            image = axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
            axes.set(xlabel="head", ylabel="layer", title=f"{model['method']}: heads on {token!r}")
            whole_ticks(axes, values.shape)
            figure.colorbar(image, ax=axes, fraction=0.046)
        mlps = np.array(model["mlps"])
        width = 0.8 / len(tokens)
        for place, token in enumerate(tokens):
            row[-2].bar(np.arange(mlps.shape[1]) + place * width, mlps[place], width, label=repr(token))
        row[-2].set(xlabel="layer", ylabel="direct effect", title=f"{model['method']}: MLPs")
        row[-2].xaxis.get_major_locator().set_params(integer=True)
        row[-2].legend()
        row[-1].bar([repr(token) for token in found["candidates"]], model["candidate_logits"], color="#555555")
        row[-1].set(ylabel="logit", title=f"{model['method']}: final logits")
        row[-1].tick_params(axis="x", rotation=90)
        row[-1].set_ylim(min(0, min(model["candidate_logits"])), None)
    return figure


def transfer(found: dict[str, Any]) -> Figure:
    """T(A -> B) as a matrix in colours that diverge around 0 (Figure 8)."""
    names = list(found["transferability"])
    tasks = list(found["transferability"][names[0]])
    values = np.array([[found["transferability"][name][task] for task in tasks] for name in names])
    figure, axes = plt.subplots(figsize=(2.5 + len(tasks), 1.8 + 0.7 * len(names)), layout="constrained")
    reach = max(0.1, float(np.abs(values).max()))
    image = axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.6 * reach else "k"
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="scored on", ylabel="tuned on", title="transferability (equation 2)")
    figure.colorbar(image, ax=axes, fraction=0.046)
    return figure


def sweep(found: dict[str, Any]) -> Figure:
    """Mean score over rates, one line for each number of samples and epochs (Table 7, Figure 9)."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for count, passes in sorted({(one["samples"], one["epochs"]) for one in found["over_seeds"]}):
        mine = [one for one in found["over_seeds"] if (one["samples"], one["epochs"]) == (count, passes)]
        rates, means = [one["rate"] for one in mine], [one["mean"] for one in mine]
        axes.plot(rates, means, marker="o", label=f"{count} samples, {passes} epoch{'s' if passes > 1 else ''}")
    axes.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="mean validation score",
        title=f"{found['method']}: {found['task']}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def scales(found: dict[str, Any]) -> Figure:
    """Learned scales by head, and for SEAL-C how far a head's channels spread."""
    values = np.array(found["mean"])
    spread = np.array(found["spread"])
    wide = bool(spread.any())
    figure, grid = plt.subplots(1, 1 + wide, figsize=(5 + 4.5 * wide, 3.6), layout="constrained", squeeze=False)
    draw_scales(figure, grid[0, 0], values, f"{found['method']}: mean scale of each head")
    if wide:
        image = grid[0, 1].imshow(spread, cmap="viridis", aspect="auto")
        grid[0, 1].set(xlabel="head", ylabel="layer", title="standard deviation over its channels")
        whole_ticks(grid[0, 1], spread.shape)
        figure.colorbar(image, ax=grid[0, 1], fraction=0.046)
    return figure


DRAW: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "removal": removal, "gradient": gradient, "quadrants": quadrants, "controls": controls, "direct": direct,
    "transfer": transfer, "sweep": sweep, "scales": scales,
}  # fmt: skip
