"""Score models on tasks: the Python interface of ``seal eval``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.io import load_json
from data_gen.tasks import Task
from eval.results import EvalResult, Result, from_json, write_result
from eval.resume import check_replaced, fingerprint, journal_file
from eval.spec import EvalSpec, find_task

if TYPE_CHECKING:
    from axolotl_plugins.seal.model_loading import LoadedModel


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
        outputs: for each model, result files by task. Responses are cached beside a file until it is written, so that
            an interrupted evaluation resumes; a finished result is read, see ``stored_result``. None writes nothing.
        cache_key: what else determines responses, such as a chat template.
        on_start: called with a task and the options of its samples before it is scored.
        on_result: called with each result and its file.

    Raises:
        ValueError: bad input; or a result file holds a result of another model or of other samples.
    """
    results = []
    resolved = [find_task(task) for task in tasks]
    files_by_model: Iterable[Mapping[str, Path]] = repeat({}) if outputs is None else outputs
    remaining = iter(files_by_model)
    for loaded in models:
        files = next(remaining)
        for task in resolved:
            out = files.get(task.name)
            result = stored_result(loaded.name, task, spec, out, cache_key) if out else None
            if result is None or result.dtype != loaded.dtype:
                options = spec.sample_options(task, loaded.window)
                asked = {**options, **task.identity}
                journal = journal_file(out, loaded.name, loaded.dtype, *cache_key) if out else None
                if out:
                    check_replaced(out, loaded.name, task.name, asked)
                on_start(task.name, options)
                mark = run_fingerprint(loaded.name, task, spec, cache_key)
                result = replace(score_task(loaded, task, spec, journal), asked=asked, fingerprint=mark)
                if out and journal:
                    save(result, out)
                    journal.unlink(missing_ok=True)
            on_result(result, out)
            results.append(result)
        del loaded  # two models do not fit into memory
    return results


def run_fingerprint(model: str, task: Task, spec: EvalSpec, cache_key: Sequence[object]) -> str:
    """Return the ``fingerprint`` of everything that a result depends on."""
    settings = {key: value for key, value in asdict(spec).items() if key != "batch_size"}  # answers are the same
    folders = [Path(name) for name in (spec.haystack, spec.data) if name and Path(name).is_dir()]
    files = [file for folder in folders for file in sorted(folder.rglob("*"))]
    # Modules of the user's that draw a task's samples or score them.
    names = sorted({getattr(part, "__module__", "") for part in (task.sample, task.metric)})
    modules = [sys.modules.get(name) for name in names if name.partition(".")[0] != "data_gen"]
    files += [Path(file) for file in (getattr(module, "__file__", None) for module in modules) if file]
    state = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return fingerprint(model, task.name, dict(task.identity), settings, state, *cache_key)


def stored_result(model: str, task: Task, spec: EvalSpec, out: Path, cache_key: Sequence[object]) -> Result | None:
    """Return the result in ``out`` if the same evaluation of the same model wrote it."""
    if not out.is_file():
        return None
    values = load_json(out)
    if not isinstance(values, dict) or values.get("fingerprint") != run_fingerprint(model, task, spec, cache_key):
        return None
    result = from_json(values)
    journal_file(out, model, result.dtype, *cache_key).unlink(missing_ok=True)  # of a run killed after its result
    return result


def stored_results(
    models: Sequence[str], tasks: Sequence[Task], spec: EvalSpec, outputs: Iterable[Mapping[str, Path]],
    cache_key: Sequence[object], on_result: Callable[[Result, Path | None], object],
) -> list[Result]:  # fmt: skip
    """Return what ``evaluate`` would return for models by name if all of it is stored, else an empty list."""
    files = [
        (model, task, by_task[task.name]) for model, by_task in zip(models, outputs, strict=True) for task in tasks
    ]
    results = [stored_result(model, task, spec, out, cache_key) for model, task, out in files]
    stored = [result for result in results if result is not None]
    if len(stored) < len(files):
        return []
    for result, (_, _, out) in zip(stored, files, strict=True):
        on_result(result, out)
    return stored


def score_task(loaded: LoadedModel, task: Task, spec: EvalSpec, journal: Path | None) -> Result:
    """Score one model on one task."""
    from eval.benchmarks import run_benchmark  # with lm-eval, which a stored result does not need
    from eval.score_by_length import score_by_length

    if task.metric is None:
        options = spec.sample_options(task, loaded.window)
        return run_benchmark(loaded, task.name, **options, batch_size=spec.batch_size, journal=journal)
    return score_by_length(loaded, task, journal=journal, **vars(spec))


def save(result: Result, out: Path) -> None:
    """Write a result as JSON and, for scores by length, a plot beside it."""
    if isinstance(result, EvalResult):
        from eval.score_plots import accuracy_by_length

        accuracy_by_length([result], out.with_suffix(".png"))
    write_result(result, out)
