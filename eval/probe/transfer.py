"""Transferability of scales from one task to another (paper section 7, equation 2, Figure 8)."""

from __future__ import annotations

from typing import Any


def transferability(base: dict[int, float], tuned: dict[int, float]) -> float:
    """T(A -> B) of equation 2: the summed gain on task B over the range of the base model's scores on it.

    Args:
        base: score of the base model on task B by length.
        tuned: score on task B by length with scales tuned on task A.

    Raises:
        ValueError: other lengths, or the base model's score is the same at all of them, so that the range is zero.
    """
    if base.keys() != tuned.keys():
        raise ValueError(f"lengths: base has {sorted(base)}, tuned has {sorted(tuned)}: score both at the same")
    spread = max(base.values()) - min(base.values())
    if spread == 0:
        raise ValueError(
            f"the base model scores {next(iter(base.values())):g} at every length, so the transferability, which "
            "divides by the range over lengths, is not defined: score more or other --lengths"
        )
    return sum(tuned[length] - base[length] for length in base) / spread


def by_length(result: dict[str, Any]) -> dict[int, float]:
    """Scores of a result of ``eval.run.run`` by length."""
    return {score["length"]: score["score"] for score in result["scores"]}


def matrix(base: dict[str, dict[str, Any]], tuned: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """T(A -> B) for every adapter A and task B.

    Args:
        base: result of the base model by task.
        tuned: result by adapter name, then by task.

    Raises:
        ValueError: see ``transferability``; the message names the task.
    """
    found: dict[str, dict[str, float]] = {}
    for name, results in tuned.items():
        found[name] = {}
        for task, result in results.items():
            try:
                found[name][task] = transferability(by_length(base[task]), by_length(result))
            except ValueError as error:
                raise ValueError(f"{task}: {error}") from None
    return found
