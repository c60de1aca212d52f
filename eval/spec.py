"""What an evaluation scores: tasks, and the samples of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_gen.tasks import tasks_of, tasks_with
from eval.metrics import METRICS

SEAL_TASKS = tuple(METRICS)
LM_EVAL_TASKS = ("longbench", "mmlu")
TASK_GROUPS = {"ruler": tasks_of("ruler"), "all": (*SEAL_TASKS, *LM_EVAL_TASKS)}
# Options that apply to some tasks only.
TASK_OPTIONS = {
    **{option: tasks_with(option) for option in ("cases", "haystack", "depths", "ruler_version")},
    "lines": tasks_with("cases"),
    "data": LM_EVAL_TASKS,
    "lengths": SEAL_TASKS,
    "shots": SEAL_TASKS,
}
# The paper scores a 32K window at 9K, 14K, 19K, 23K, 28K and 31K (Table 1): these fractions of the window.
PAPER_FRACTIONS = (9 / 32, 14 / 32, 19 / 32, 23 / 32, 28 / 32, 31 / 32)


@dataclass(frozen=True)
class EvalSpec:
    """Samples to score, and how to decode.

    Attributes:
        lengths: longest samples, in tokens; None uses ``default_lengths`` of the model's window.
        samples: per length; None uses 50, and all samples of a benchmark's sets.
        limit: upper bound on the samples of each length or set.
        seed: of the samples.
        shots: worked examples before every prompt (paper section 8: one).
        shot_tokens: longest example, in tokens (paper section 8: 1K).
        haystack: see ``data_gen.dataset.Request`` (niah).
        depths: see ``data_gen.dataset.Request`` (niah).
        cases: folder of LongEval's published line cases, scored instead of generated samples (line).
        lines: numbers of lines of the files of ``cases`` to score; None scores all.
        ruler_version: see ``data_gen.dataset.Request`` (RULER's tasks).
        data: folder with the files of longbench or mmlu; None fetches them from the hub.
        batch_size: prompts decoded together; None uses what memory allows.
        allow_contamination: also score samples that the model was tuned on.

    Raises:
        ValueError: a number is too small, or lengths are given another way than the samples have them.
    """

    lengths: list[int] | None = None
    samples: int | None = None
    limit: int | None = None
    seed: int = 0
    shots: int = 0
    shot_tokens: int = 1000
    haystack: str | None = None
    depths: int | None = None
    cases: str | None = None
    lines: list[int] | None = None
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
        if self.lengths and self.cases:
            raise ValueError("lengths: published cases have their own: choose files by --lines, such as 200,300")
        if self.lines and not self.cases:
            raise ValueError("lines: choose files of --cases, which is not given; generated samples have --lengths")

    def sample_options(self, task: str, window: int) -> dict[str, Any]:
        """Return the options that determine a task's samples, for a model with a window of so many tokens.

        They are arguments of ``eval.benchmarks.run_benchmark`` or ``eval.run.run``, and are stored with the result.
        """
        bounds = [count for count in (self.samples, self.limit) if count is not None]
        if task in LM_EVAL_TASKS:
            return {"data": self.data, "limit": min(bounds, default=None)}
        task_only = {
            option: getattr(self, option) if task in TASK_OPTIONS[option] else None
            for option in ("haystack", "depths", "cases", "lines", "ruler_version")
        }
        return {
            "lengths": None if self.cases else self.lengths or default_lengths(window),
            "samples": min([self.samples or 50, *bounds]),
            "seed": self.seed,
            "shots": self.shots,
            "shot_tokens": self.shot_tokens,
            **task_only,
        }


def default_lengths(window: int, answer: int = 128) -> list[int]:
    """Return the paper's fractions of a window, in tokens, each with room for an answer."""
    return sorted({min(int(window * fraction), window - answer) for fraction in PAPER_FRACTIONS})


def resolve_tasks(name: str, spec: EvalSpec) -> tuple[str, ...]:
    """Return the tasks that a task's or group's name stands for.

    Raises:
        ValueError: the name is unknown, or an option of ``spec`` applies to none of the tasks.
    """
    tasks = TASK_GROUPS.get(name, (name,))
    if unknown := [task for task in tasks if task not in SEAL_TASKS + LM_EVAL_TASKS]:
        raise ValueError(
            f"task: found {unknown[0]!r}, expected one of {', '.join((*SEAL_TASKS, *LM_EVAL_TASKS, *TASK_GROUPS))}"
        )
    if spec.data and len(tasks) > 1:
        raise ValueError(f"data: holds one benchmark, but {name} stands for several tasks: score them one by one")
    for option, applicable in TASK_OPTIONS.items():
        if getattr(spec, option) and not set(applicable) & set(tasks):
            raise ValueError(f"{option.replace('_', '-')}: {name} has no such option, only {' and '.join(applicable)}")
    return tasks
