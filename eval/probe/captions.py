"""One or two sentences with the numbers of a probe's result, to stand under its picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eval.probe.head_importance import changes, quadrants


def by_length(scores: dict[str, float]) -> str:
    """``0.90 at 512, 0.60 at 1448``."""
    return ", ".join(f"{score:.2f} at {length}" for length, score in scores.items())


def extreme(found: dict[str, Any]) -> str:
    """The heads whose removal helps and hurts most at a map's last length."""
    values = changes(found, found["lengths"][-1])
    places = [np.unravel_index(place, values.shape) for place in (values.argmax(), values.argmin())]
    return " and ".join(f"L{layer}H{head} {values[layer, head]:+.2f}" for layer, head in places)


def removal(found: dict[str, Any]) -> str:
    """What removing heads, or channels, does."""
    about = f"{found['model']}, {found['task']}, {found['samples']} samples per length"
    if found["unit"] == "channel":
        length = str(found["lengths"][-1])
        rows = {name: np.array(values) for name, values in found["change"]["logprob"][length].items()}
        parts = [
            f"in {name} {int((row > 0).sum())} of {row.size} channels help when removed ({row.min():+.3f} to "
            f"{row.max():+.3f})"
            for name, row in rows.items()
        ]
        return f"{about}. Log-probability of the answer: {'; '.join(parts)}."
    where = quadrants(found)
    counts = ", ".join(f"{int((where == place).sum())} in quadrant {place}" for place in (1, 2, 3, 4))
    return (
        f"{about}; all heads there: {by_length(found['base']['score'])}. Of {where.size} heads {counts}. "
        f"Removal at {found['lengths'][-1]} tokens helps and hurts most: {extreme(found)}. {found['seconds']:.0f} s."
    )


def gradient(found: dict[str, Any]) -> str:
    """How well gradients predict, where that was compared."""
    text = f"{found['model']}, {found['task']}, {found['samples']} samples per length, {found['seconds']:.0f} s. "
    if "spearman" in found:
        parts = "; ".join(
            f"{mine} with the exact {theirs} {by_length(rows)}"
            for mine, by in found["spearman"].items() for theirs, rows in by.items()
        )  # fmt: skip
        text += f"Spearman's correlation over heads: {parts}. {found['speedup']:.0f} times faster."
    return text


def quadrant_scaling(found: dict[str, Any]) -> str:
    """Scores with heads scaled by quadrant."""
    parts = "; ".join(f"{name}: {by_length(scores)}" for name, scores in found["scores"].items())
    return (
        f"{found['model']}, {found['task']}, {found['samples']} test samples per length, scales {found['down']:g} and "
        f"{found['up']:g}, nothing trained. {parts}."
    )


def direct(found: dict[str, Any]) -> str:
    """Which tokens are compared, and their logits."""
    right, mistaken = found["tokens"]
    parts = "; ".join(
        f"{model['method']}: {model['logits'][0]:.1f} against {model['logits'][1]:.1f}" for model in found["models"]
    )
    return (
        f"{found['task']}, {found['length']} tokens, sample {found['sample']}: the base model says {mistaken!r}, right "
        f"is {right!r}. Logits of right and wrong: {parts}."
    )


def transfer(found: dict[str, Any]) -> str:
    """The mean over tasks of every adapter."""
    parts = ", ".join(f"{name} {np.mean(list(row.values())):+.2f}" for name, row in found["transferability"].items())
    return f"{found['model']}, {found['samples']} test samples per length. Mean over the tasks scored: {parts}."


def sweep(found: dict[str, Any]) -> str:
    """The best setting."""
    best = found["best"]
    return (
        f"{found['model']}, {found['method']}, {found['task']}, {found['validation_samples']} validation samples per "
        f"length. Best: rate {best['rate']:g}, {best['samples']} samples, {best['epochs']} epochs: {best['mean']:.3f}."
    )


def controls(found: dict[str, Any]) -> str:
    """Mean over seeds at the longest length."""
    length = str(found["lengths"][-1])
    parts = ", ".join(
        f"{found['method'] if name == 'tuned' else name} {np.mean([run[length] for run in runs]):.2f}"
        for name, runs in found["scores"].items()
    )
    return (
        f"{found['model']}, {found['task']}, {found['validation_samples']} validation samples, {len(found['seeds'])} "
        f"seeds. At {length} tokens: {parts}."
    )


def scales(found: dict[str, Any]) -> str:
    """Range of scales, and what the map's quadrants got."""
    mean = np.array(found["mean"])
    text = f"{found['model']}: scales of heads from {mean.min():.2f} to {mean.max():.2f}."
    for quadrant, row in found.get("by_quadrant", {}).items():
        text += f" Quadrant {quadrant}: {row['lowered']} of {row['heads']} lowered, mean {row['mean']:.2f}."
    return text


CAPTION: dict[str, Callable[[dict[str, Any]], str]] = {
    "removal": removal, "gradient": gradient, "quadrants": quadrant_scaling, "controls": controls, "direct": direct,
    "transfer": transfer, "sweep": sweep, "scales": scales,
}  # fmt: skip
TITLE = {
    "removal": "Removing one head, or one channel, at a time (Figures 2b, 2d)",
    "gradient": "The same, predicted from gradients",
    "quadrants": "Scales from a map, nothing trained (Figure 2c)",
    "controls": "Controls: shuffled scales, wrong answers",
    "direct": "Direct effects on the right and the wrong token (Figure 4)",
    "transfer": "Transferability between tasks (equation 2, Figure 8)",
    "sweep": "Learning rate and samples (Table 7, Figure 9)",
    "scales": "Where the scales went",
}
