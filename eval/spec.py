"""What an evaluation scores: tasks, and the samples of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.file_task import longeval_cases
from data_gen.tasks import TASKS, Task, TaskAttribute, resolve_task, tasks_of
from eval.cli_options import split_names

METRICS = TaskAttribute("metric")  # task -> score of a response in [0, 1], from the response and the references
SEAL_TASKS = tuple(METRICS)
LM_EVAL_TASKS = ("longbench", "mmlu")
MMLU = Task(name="mmlu", title="MMLU", description="MMLU", source="cais/mmlu", shortest=1)
TASK_GROUPS = {"ruler": tasks_of("ruler"), "all": (*SEAL_TASKS, *LM_EVAL_TASKS)}
# The paper scores a 32K window at 9K, 14K, 19K, 23K, 28K and 31K (Table 1): these fractions of the window.
PAPER_FRACTIONS = (9 / 32, 14 / 32, 19 / 32, 23 / 32, 28 / 32, 31 / 32)


@dataclass(frozen=True)
class EvalSpec:
    """Samples to score, and how to decode.

    Attributes:
        lengths: longest samples, in tokens; None uses ``default_lengths`` of the model's window, and for a file's
            samples their own lengths.
        samples: per length; None uses 50, and all samples of a file or of a benchmark's sets.
        limit: upper bound on the samples of each length or set.
        seed: of the samples.
        shots: worked examples before every prompt (paper section 8: one).
        shot_tokens: longest example, in tokens (paper section 8: 1K).
        haystack: see ``data_gen.dataset.Request`` (niah).
        depths: see ``data_gen.dataset.Request`` (niah).
        ruler_version: see ``data_gen.dataset.Request`` (RULER's tasks).
        data: folder with the files of longbench or mmlu; None fetches them from the hub.
        batch_size: prompts decoded together; None uses what memory allows.
        allow_contamination: also score samples that the model was tuned on.

    Raises:
        ValueError: a number is too small.
    """

    lengths: list[int] | None = None
    samples: int | None = None
    limit: int | None = None
    seed: int = 0
    shots: int = 0
    shot_tokens: int = 1000
    haystack: str | None = None
    depths: int | None = None
    ruler_version: int | None = None
    data: str | None = None
    batch_size: int | None = None
    allow_contamination: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        minima = {"samples": 1, "limit": 1, "shot_tokens": 1, "batch_size": 1, "shots": 0}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name.replace('_', '-')}: found {value}, expected at least {minimum}")

    def sample_options(self, task: Task, window: int) -> dict[str, Any]:
        """Return the options that determine a task's samples, for a model with a window of so many tokens.

        They are stored with the result.
        """
        bounds = [count for count in (self.samples, self.limit) if count is not None]
        if task.metric is None:
            return {"data": self.data, "limit": min(bounds, default=None)}
        if task.rows is not None:
            return {"lengths": self.lengths, "samples": min(bounds, default=None)}
        task_only = ("haystack", "depths", "ruler_version")
        return {
            "lengths": self.lengths or default_lengths(window),
            "samples": min([self.samples or 50, *bounds]),
            "seed": self.seed,
            "shots": self.shots,
            "shot_tokens": self.shot_tokens,
            **{option: getattr(self, option) if option in task.options else None for option in task_only},
        }


def default_lengths(window: int) -> list[int]:
    """Return the paper's fractions of a window, in tokens, each with room for an answer of 128."""
    return sorted({min(int(window * fraction), window - 128) for fraction in PAPER_FRACTIONS})


def accepts(task: Task, option: str) -> bool:
    """Return whether a task has an option of ``EvalSpec`` that only some have."""
    if option == "data":
        return task.metric is None
    if option in ("seed", "shots"):
        return task.metric is not None and task.rows is None
    return task.metric is not None if option == "lengths" else option in task.options


def find_task(name: str | Task, metric: str | None = None, max_new_tokens: int | None = None) -> Task:
    """Return a task that can be scored: ``MMLU``, or see ``data_gen.tasks.resolve_task``.

    Raises:
        ValueError: see there; or the task has neither a metric nor tasks of lm-eval.
    """
    task = MMLU if name == MMLU.name else resolve_task(name, metric, max_new_tokens)
    if task.metric is None and task.name not in LM_EVAL_TASKS:
        raise ValueError(f"task: {task.name} has no metric to score it by")
    return task


def scored_task(name: str | Task, metric: str | None = None, max_new_tokens: int | None = None) -> Task:
    """Return a task with a metric of its own, which benchmarks of lm-eval lack.

    Raises:
        ValueError: see ``find_task``; or the task is such a benchmark.
    """
    task = find_task(name, metric, max_new_tokens)
    if task.metric is None:
        raise ValueError(f"task: found {task.name!r}, expected one of {', '.join(METRICS)}, or your own")
    return task


def resolve_tasks(
    name: str, spec: EvalSpec, *, metric: str | None = None, max_new_tokens: int | None = None,
    cases: str | None = None, lines: list[int] | None = None,
) -> tuple[Task, ...]:  # fmt: skip
    """Return the tasks that a task's or group's name stands for.

    Args:
        name: of a group, or see ``find_task``, several with commas between.
        spec: its options are checked.
        metric: see ``find_task``; of several tasks, it is of the files of samples.
        max_new_tokens: as ``metric``.
        cases: folder of LongEval's published cases, the samples of ``line`` then.
        lines: numbers of lines of the files of ``cases`` to score; None scores all.

    Raises:
        ValueError: the name is unknown, or an option applies to none of the tasks.
    """
    parts = TASK_GROUPS.get(name) or split_names(name)
    files = [part for part in parts if part.endswith(".jsonl")] or parts
    tasks = tuple(find_task(part, *((metric, max_new_tokens) if part in files else ())) for part in parts)
    if cases:
        if name != "line":
            raise ValueError(f"cases: {name} has no such option, only line")
        if spec.lengths:
            raise ValueError("lengths: published cases have their own: choose files by --lines, such as 200,300")
        tasks = (longeval_cases(Path(cases), lines),)
    elif lines:
        raise ValueError("lines: choose files of --cases, which is not given; generated samples have --lengths")
    if spec.data and len(tasks) > 1:
        raise ValueError(f"data: holds one benchmark, but {name} stands for several tasks: score them one by one")
    for option in ("haystack", "depths", "ruler_version", "data", "lengths", "shots", "seed"):
        if getattr(spec, option) and not any(accepts(task, option) for task in tasks):
            names = [task.name for task in (*TASKS.values(), MMLU) if accepts(task, option)]
            raise ValueError(f"{option.replace('_', '-')}: {name} has no such option, only {' and '.join(names)}")
    return tasks
