"""Captions of probes' plots: one or two sentences with the numbers of a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eval.probe.head_importance import MEASURES, changes, head_quadrants, measure_of
from eval.probe.quadrants import RANDOM, runs_by_setting
from eval.results import title_of


def by_length(scores: dict[str, float]) -> str:
    """Return text such as ``0.90 at 512, 0.60 at 1448``."""
    return ", ".join(f"{score:.2f} at {length}" for length, score in scores.items())


def extreme(result: dict[str, Any]) -> str:
    """Return the heads whose ablation helps and hurts most at a map's last length."""
    values = changes(result, result["lengths"][-1])
    heads = [np.unravel_index(index, values.shape) for index in (values.argmax(), values.argmin())]
    return " and ".join(f"L{layer}H{head} {values[layer, head]:+.2f}" for layer, head in heads)


def ablation(result: dict[str, Any]) -> str:
    """Describe the effect of ablating heads or channels."""
    setting = f"{result['model']}, {title_of(result)}, {result['samples']} samples per length"
    measure = measure_of(result)
    if result["unit"] == "channel":
        length = str(result["lengths"][-1])
        rows = {name: np.array(values) for name, values in result["change"][measure][length].items()}
        parts = [
            f"in {name} {int((row > 0).sum())} of {row.size} channels help when ablated ({row.min():+.3f} to "
            f"{row.max():+.3f})"
            for name, row in rows.items()
        ]
        return f"{setting}. {MEASURES[measure].capitalize()}: {'; '.join(parts)}."
    quadrants = head_quadrants(result)
    counts = ", ".join(f"{int((quadrants == number).sum())} in quadrant {number}" for number in (1, 2, 3, 4))
    return (
        f"{setting}; {MEASURES[measure]} with no head ablated: "
        f"{by_length(result['base'][measure])}. Of {quadrants.size} heads {counts}. "
        f"Ablation at {result['lengths'][-1]} tokens helps and hurts most: {extreme(result)}. "
        f"{result['seconds']:.0f} s."
    )


def gradient(result: dict[str, Any]) -> str:
    """Describe how well gradients predict an exact map, if they were compared."""
    text = f"{result['model']}, {title_of(result)}, {result['samples']} samples per length, {result['seconds']:.0f} s. "
    if "spearman" in result:
        parts = "; ".join(
            f"{predicted} with the exact {exact} {by_length(rows)}"
            for predicted, by_exact in result["spearman"].items() for exact, rows in by_exact.items()
        )  # fmt: skip
        text += f"Spearman's correlation over heads: {parts}. {result['speedup']:.0f} times faster."
    return text


def quadrant_scaling(result: dict[str, Any]) -> str:
    """Describe scores with heads scaled by quadrant, of random heads mean and range over all draws."""
    runs = runs_by_setting(result)
    random = runs.pop(RANDOM, [])
    parts = "; ".join(f"{name}: {by_length(scores)}" for name, (scores,) in runs.items())
    if random:
        columns = {length: [scores[length] for scores in random] for length in random[0]}
        ranges = (
            f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f}) at {length}"
            for length, values in columns.items()
        )
        parts += f"; as many {RANDOM}, mean and range of {len(random)} draws: {', '.join(ranges)}"
    return (
        f"{result['model']}, {title_of(result)}, {result['samples']} test samples per length, scales "
        f"{result['down']:g} and {result['up']:g}, nothing trained. {parts}."
    )


def direct(result: dict[str, Any]) -> str:
    """Describe the compared tokens and their logits."""
    right, mistaken = result["tokens"]
    parts = "; ".join(
        f"{model['method']}: {model['logits'][0]:.1f} against {model['logits'][1]:.1f}" for model in result["models"]
    )
    return (
        f"{title_of(result)}, {result['length']} tokens, sample {result['sample']}: the base model writes "
        f"{mistaken!r}, right is {right!r}. Logits of right and wrong: {parts}."
    )


def transfer(result: dict[str, Any]) -> str:
    """Describe the mean over tasks of every adapter."""
    defined = {
        name: [value for value in row.values() if value is not None] for name, row in result["transferability"].items()
    }
    parts = ", ".join(f"{name} {np.mean(values):+.2f}" for name, values in defined.items() if values)
    return (
        f"{result['model']}, {result['samples']} test samples per length. Mean over the tasks on which the base "
        f"model's scores differ between lengths: {parts or 'there is none'}."
    )


def sweep(result: dict[str, Any]) -> str:
    """Describe the best setting."""
    best = result["best"]
    passes = f"{best['epochs']} epoch{'s' * (best['epochs'] > 1)}"
    return (
        f"{result['model']}, {result['method']}, {title_of(result)}, {result['validation_samples']} validation samples "
        f"per length. Best: rate {best['rate']:g}, {best['samples']} samples, {passes}: {best['mean']:.3f}."
        + unsound_scales(result)
    )


def unsound_scales(result: dict[str, Any]) -> str:
    """Return a warning about the rates of a sweep whose scales went far from 1, or an empty text."""
    cells = [cell for cell in result.get("cells", ()) if cell.get("unsound")]
    if not cells:
        return ""
    rates = ", ".join(f"{rate:g}" for rate in sorted({cell["rate"] for cell in cells}))
    low, high = min(cell["scales"][0] for cell in cells), max(cell["scales"][1] for cell in cells)
    chosen = " The best is one of them: prefer a lower rate." if result["best"]["unsound"] else ""
    return f" Warning: scales far from 1 (from {low:.3g} to {high:.3g}) at the rates {rates}.{chosen}"


def controls(result: dict[str, Any]) -> str:
    """Describe means over seeds at the longest length."""
    length = str(result["lengths"][-1])
    parts = ", ".join(
        f"{result['method'] if name == 'tuned' else name} {np.mean([run[length] for run in runs]):.2f}"
        for name, runs in result["scores"].items()
    )
    return (
        f"{result['model']}, {title_of(result)}, {result['validation_samples']} validation samples, "
        f"{len(result['seeds'])} seeds. At {length} tokens: {parts}."
    )


def scales(result: dict[str, Any]) -> str:
    """Describe the range of scales, and the scales in a map's quadrants."""
    mean = np.array(result["mean"])
    text = f"{result['model']}: scales of heads from {mean.min():.2f} to {mean.max():.2f}."
    for quadrant, row in result.get("by_quadrant", {}).items():
        text += f" Quadrant {quadrant}: {row['lowered']} of {row['heads']} lowered, mean {row['mean']:.2f}."
    if result.get("spearman"):
        text += f" Spearman's correlation with the effect of ablation: {by_length(result['spearman'])}."
    return text


CAPTION: dict[str, Callable[[dict[str, Any]], str]] = {
    "ablation": ablation, "gradient": gradient, "quadrants": quadrant_scaling, "controls": controls, "direct": direct,
    "transfer": transfer, "sweep": sweep, "scales": scales,
}  # fmt: skip
TITLE = {
    "ablation": "Ablation of one head, or one channel, at a time (Figures 2b, 2d)",
    "gradient": "Ablation predicted from gradients",
    "quadrants": "Scales from a map, nothing trained (Figure 2c)",
    "controls": "Controls: shuffled scales, wrong answers",
    "direct": "Direct effects on the right and the wrong token (Figure 4)",
    "transfer": "Transferability between tasks (equation 2, Figure 8)",
    "sweep": "Learning rate and samples (Table 7, Figure 9)",
    "scales": "Scales by layer and head",
}
