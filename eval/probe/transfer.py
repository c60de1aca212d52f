"""Transferability of scales from one task to another (paper section 7, equation 2, Figure 8)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from axolotl_plugins.seal.model_loading import LoadedModel, load_each
from axolotl_plugins.seal.provenance import seen_texts
from data_gen.tasks import Task
from eval.probe.head_importance import same_model
from eval.result_cache import journal_file
from eval.run import run

Scores = dict[str, dict[int, float]]  # by task, then by length


def transferability(base: dict[int, float], tuned: dict[int, float]) -> float:
    """Compute T(A -> B) of equation 2: the summed gain on task B over the range of the base model's scores on it.

    Args:
        base: score of the base model on task B by length.
        tuned: score on task B by length with scales tuned on task A.

    Raises:
        ValueError: lengths differ, or the base model's score is the same at all of them, so that the range is zero.
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


def transfer_matrix(base: Scores, tuned: dict[str, Scores]) -> dict[str, dict[str, float]]:
    """Compute T(A -> B) for every adapter A and task B.

    Args:
        base: scores of the base model.
        tuned: scores by adapter name.

    Raises:
        ValueError: see ``transferability``; the message names the task.
    """
    matrix: dict[str, dict[str, float]] = {}
    for name, scores in tuned.items():
        matrix[name] = {}
        for task, by_length in scores.items():
            try:
                matrix[name][task] = transferability(base[task], by_length)
            except ValueError as error:
                raise ValueError(f"{task}: {error}") from None
    return matrix


def score_transfer(
    model: str, adapters: dict[str, str], tasks: list[Task], *, lengths: list[int] | None, samples: int | None,
    batch_size: int | None, out: Path, options: dict[str, Any],
) -> tuple[dict[str, Any], list[Path]]:  # fmt: skip
    """Score a base model and its adapters on every task.

    Args:
        model: hub id or folder of the base model.
        adapters: folders by name.
        tasks: see ``scored_task``.
        lengths: see ``eval.run.run``.
        samples: see ``eval.run.run``.
        batch_size: prompts decoded together; None uses what memory allows.
        out: result file, beside which responses are cached.
        options: of ``load_each``.

    Returns:
        The result, and the files that cache its responses.

    Raises:
        ValueError: an adapter is of another base model; or see ``run`` and ``transferability``.
    """
    journals, counts = [], []

    def scores(name: str, loaded: LoadedModel) -> Scores:
        by_task = {}
        for task in tasks:
            identity = (task.name, dict(task.identity), lengths, samples, options)
            journals.append(journal_file(out, loaded.name, name, *identity))
            result = run(loaded, task, lengths=lengths, samples=samples, batch_size=batch_size, journal=journals[-1])
            by_task[task.name] = result.by_length()
            counts.append(max(score.count for score in result.scores))
        return by_task

    base: Scores = {}
    tuned: dict[str, Scores] = {}
    for name, loaded in zip(adapters, load_each(adapters, **options), strict=True):
        if not same_model(loaded.base, model):
            raise ValueError(f"adapter: {loaded.name} is of {loaded.base}, expected one of {model}: name its --model")
        if not base:
            untuned = replace(loaded, name=model, method="base", trained_on=seen_texts(Path(model)))
            with loaded.model.disable_adapter():
                base = scores("base", untuned)
        tuned[name] = scores(name, loaded)
    return {
        "kind": "transfer", "model": model, "base_model": model, "dtype": loaded.dtype, "samples": max(counts),
        "adapters": adapters, "scores": {"base": base, **tuned}, "transferability": transfer_matrix(base, tuned),
    }, journals  # fmt: skip
