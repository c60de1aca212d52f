"""Score models on tasks: the Python interface of ``python -m eval run``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

from axolotl_plugins.seal.model_loading import LoadedModel
from data_gen.tasks import Task
from eval.benchmarks import run_benchmark
from eval.result_cache import check_replaced, journal_file
from eval.results import EvalResult, Result, write_result
from eval.run import run
from eval.spec import EvalSpec, find_task


def evaluate(
    models: Iterable[LoadedModel], tasks: Sequence[str | Task], spec: EvalSpec, *,
    outputs: Iterable[Mapping[str, Path]] | None = None, cache_key: Sequence[object] = (),
    on_start: Callable[[str, dict[str, Any]], object] = lambda task, options: None,
    on_result: Callable[[Result, Path | None], object] = lambda result, out: None,
) -> list[Result]:  # fmt: skip
    """Score each model on each task.

    Args:
        models: see ``load``; an iterator may load each model when it is needed.
        tasks: see ``eval.spec.find_task``.
        spec: samples and decoding.
        outputs: for each model, result files by task. Responses are cached beside them until every result is written,
            so that an interrupted evaluation resumes. None writes nothing.
        cache_key: what else determines responses, such as a chat template.
        on_start: called with a task and the options of its samples before it is scored.
        on_result: called with each result and its file.

    Raises:
        ValueError: bad input; or a result file holds a result of other samples.
    """
    results, journals = [], []
    found = [find_task(task) for task in tasks]
    files_by_model: Iterable[Mapping[str, Path]] = repeat({}) if outputs is None else outputs
    for loaded, files in zip(models, files_by_model, strict=outputs is not None):
        for task in found:
            options = spec.sample_options(task, loaded.window)
            journal = None
            if out := files.get(task.name):
                journal = journal_file(out, loaded.name, loaded.dtype, *cache_key)
                journals.append(journal)
                check_replaced(out, {**options, **task.identity})
            on_start(task.name, options)
            result = score_task(loaded, task, spec, journal)
            if out:
                save(result, out)
            on_result(result, out)
            results.append(result)
    for journal in journals:  # only now, so that a resumed evaluation does not score the first tasks again
        journal.unlink(missing_ok=True)
    return results


def score_task(loaded: LoadedModel, task: Task, spec: EvalSpec, journal: Path | None) -> Result:
    """Score one model on one task."""
    options = spec.sample_options(task, loaded.window)
    if task.metric is None:
        benchmark = run_benchmark(loaded, task.name, **options, batch_size=spec.batch_size, journal=journal)
        return replace(benchmark, asked=options)
    result = run(loaded, task, **options, batch_size=spec.batch_size, journal=journal,
                 allow_contamination=spec.allow_contamination)  # fmt: skip
    return replace(result, asked={**options, **task.identity})


def save(result: Result, out: Path) -> None:
    """Write a result as JSON and, for scores by length, a plot beside it."""
    if isinstance(result, EvalResult):
        from eval.plots import accuracy_by_length

        accuracy_by_length([result], out.with_suffix(".png"))
    write_result(result, out)
