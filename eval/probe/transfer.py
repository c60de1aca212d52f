"""Transferability of scales from one task to another (paper section 7, equation 2, Figure 8)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from axolotl_plugins.seal.model_loading import LoadedModel, load_each
from axolotl_plugins.seal.provenance import seen_texts
from data_gen.tasks import Task
from eval.results import check_base
from eval.resume import journal_file
from eval.score_by_length import score_by_length

Scores = dict[str, dict[int, float]]  # by task, then by length


def transferability(base: dict[int, float], tuned: dict[int, float], task: str = "a task") -> float:
    """Compute T(A -> B) of equation 2: the summed gain on task B over the range of the base model's scores on it.

    Args:
        base: score of the base model on task B by length.
        tuned: score on task B by length with scales tuned on task A.
        task: name of B, for messages.

    Raises:
        ValueError: lengths differ, or the base model's score is the same at all of them, so that the range is zero.
    """
    if base.keys() != tuned.keys():
        raise ValueError(f"lengths: base has {sorted(base)}, tuned has {sorted(tuned)}: score both at the same")
    spread = max(base.values()) - min(base.values())
    if spread == 0:
        raise ValueError(
            f"{task}: the base model scores {next(iter(base.values())):g} at every length, so the transferability, "
            "which divides by the range over lengths, is not defined: score more or other --lengths"
        )
    return sum(tuned[length] - base[length] for length in base) / spread


def score_transfer(
    model: str, adapters: dict[str, str], tasks: list[Task], *, out: Path, options: dict[str, Any], **spec: Any
) -> tuple[dict[str, Any], list[Path]]:
    """Score a base model and its adapters on every task.

    Args:
        model: hub id or folder of the base model.
        adapters: folders by name.
        tasks: see ``scored_task``.
        out: result file, beside which responses are cached.
        options: of ``load_each``.
        spec: of ``EvalSpec``.

    Returns:
        The result, and the files that cache its responses. ``transferability`` is None where it is not defined, because
        the base model has the same score at all lengths.

    Raises:
        ValueError: there is one length only; an adapter is of another base model; or see ``score_by_length``.
    """
    if spec["lengths"] and len(spec["lengths"]) == 1:
        raise ValueError(f"lengths: found {spec['lengths'][0]} alone, expected several: equation 2 divides by the "
                         "range of the base model's scores over lengths")  # fmt: skip
    journals, counts = [], []

    def scores(name: str, loaded: LoadedModel) -> Scores:
        by_task = {}
        for task in tasks:
            identity = (task.name, dict(task.identity), options)
            journals.append(journal_file(out, loaded.name, name, *identity))
            result = score_by_length(loaded, task, journal=journals[-1], **spec)
            by_task[task.name] = result.by_length()
            counts.append(max(score.count for score in result.scores))
        return by_task

    base: Scores = {}
    tuned: dict[str, Scores] = {}
    for name, loaded in zip(adapters, load_each(adapters, **options), strict=True):
        check_base(loaded, model)
        if not base:
            untuned = replace(loaded, name=model, method="base", trained_on=seen_texts(Path(model)))
            with loaded.model.disable_adapter():
                base = scores("base", untuned)
        tuned[name] = scores(name, loaded)
    matrix = {
        name: {
            task: transferability(base[task], by_length, task) if len({*base[task].values()}) > 1 else None
            for task, by_length in by_task.items()
        }
        for name, by_task in tuned.items()
    }
    return {
        "kind": "transfer", "model": model, "base_model": model, "dtype": loaded.dtype, "samples": max(counts),
        "adapters": adapters, "scores": {"base": base, **tuned}, "transferability": matrix,
    }, journals  # fmt: skip
