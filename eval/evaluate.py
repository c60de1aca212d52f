"""Score models on tasks: the Python interface of ``seal eval``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

from axolotl_plugins.seal.model_loading import LoadedModel
from eval.benchmarks import run_benchmark
from eval.result_cache import check_replaced, journal_file
from eval.results import EvalResult, Result, write_result
from eval.run import run
from eval.spec import LM_EVAL_TASKS, EvalSpec


def evaluate(
    models: Iterable[LoadedModel], tasks: Sequence[str], spec: EvalSpec, *,
    outputs: Iterable[Mapping[str, Path]] | None = None, cache_key: Sequence[object] = (),
    on_start: Callable[[str, dict[str, Any]], object] = lambda task, options: None,
    on_result: Callable[[Result, Path | None], object] = lambda result, out: None,
) -> list[Result]:  # fmt: skip
    """Score each model on each task.

    Args:
        models: see ``load``; an iterator may load each model when it is needed.
        tasks: of ``SEAL_TASKS`` and ``LM_EVAL_TASKS``.
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
    files_by_model: Iterable[Mapping[str, Path]] = repeat({}) if outputs is None else outputs
    for loaded, files in zip(models, files_by_model, strict=outputs is not None):
        for task in tasks:
            options = spec.sample_options(task, loaded.window)
            journal = None
            if out := files.get(task):
                journal = journal_file(out, loaded.name, *cache_key)
                journals.append(journal)
                check_replaced(out, options)
            on_start(task, options)
            result = score_task(loaded, task, spec, journal)
            if out:
                save(result, out)
            on_result(result, out)
            results.append(result)
    for journal in journals:  # only now, so that a resumed evaluation does not score the first tasks again
        journal.unlink(missing_ok=True)
    return results


def score_task(loaded: LoadedModel, task: str, spec: EvalSpec, journal: Path | None) -> Result:
    """Score one model on one task."""
    options = spec.sample_options(task, loaded.window)
    if task in LM_EVAL_TASKS:
        benchmark = run_benchmark(loaded, task, **options, batch_size=spec.batch_size, journal=journal)
        return replace(benchmark, asked=options)
    result = run(loaded, task, **options, batch_size=spec.batch_size, journal=journal,
                 allow_contamination=spec.allow_contamination)  # fmt: skip
    return replace(result, asked=options)


def save(result: Result, out: Path) -> None:
    """Write a result as JSON and, for scores by length, a plot beside it."""
    if isinstance(result, EvalResult):
        from eval.plots import accuracy_by_length

        accuracy_by_length([result], out.with_suffix(".png"))
    write_result(result, out)
