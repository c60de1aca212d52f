"""What a task is, and the registry that all lists of tasks are derived from."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from data_gen.fit_length import LengthBudget
from data_gen.import_object import import_object
from data_gen.split import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fields of ``Request`` that only some tasks accept.
OPTIONS = ("lines", "haystack", "needles", "depths", "data", "ruler_version")
RULER_VERSIONS = (2024, 2025)


@dataclass(frozen=True)
class Task:
    """A benchmark's prompts, answers and metric.

    Attributes:
        name: in files and results; of a registered task, on command lines.
        title: heading of tables and figures.
        description: the title within a sentence.
        source: paper or program whose wording, metric and generation settings the task takes.
        sample: draws the sample of an index: ``prompt``, ``answer`` (the assistant's turn), ``references`` (correct
            answers), optionally ``prefix`` (what the answer begins with, given to the model), ``example`` (prompt and
            answer of an earlier exchange in the chat) and any JSON values that describe the sample. Randomness comes
            from the generator alone, and the chat has at most ``budget.tokens`` tokens. Raises ValueError if no sample
            is that short. None if there is nothing to draw.
        metric: score of a response in [0, 1], from the response and the references; None if lm-eval scores the
            benchmark with its own tasks.
        max_new_tokens: longest response; None without a metric.
        stop: texts that end a response.
        options: those of ``OPTIONS`` that the task accepts.
        splits: those that samples can be drawn of.
        group: name that stands for several tasks in ``seal eval --task``.
        shortest: length in tokens that holds a sample with any usual tokenizer.
        sources: hashes of the files that samples depend on, for the manifest.
        spec: what ``resolve_task`` finds a task by that is not registered: its file, or ``module:object``.
        rows: returns all samples of a task that draws none, see ``data_gen.file_task``.
        identity: what determines samples and scores of a task that is not registered; results store it.
    """

    name: str
    title: str
    description: str
    source: str
    shortest: int
    sample: Callable[[Request, random.Random, int, LengthBudget], dict[str, Any]] | None = None
    metric: Callable[[str, list[str]], float] | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    splits: tuple[Split, ...] = ("train", "test")
    group: str | None = None
    sources: Callable[[Request], dict[str, str]] = lambda request: {}
    spec: str | None = None
    rows: Callable[[PreTrainedTokenizerBase], list[dict[str, Any]]] | None = None
    identity: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return what ``resolve_task`` finds the task by."""
        return self.spec or self.name

    @property
    def answer_budget(self) -> int:
        """Return the longest response of a task with a metric, in tokens."""
        assert self.max_new_tokens is not None  # see ``register``
        return self.max_new_tokens

    def score(self, response: str, references: list[str]) -> float:
        """Return the metric of a response, in [0, 1]."""
        assert self.metric is not None
        return self.metric(response, references)


TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Add a task to the registry.

    Returns:
        The task.

    Raises:
        ValueError: the name is taken, an option is unknown, or a scored task lacks a response length or a test split.
    """
    if task.name in TASKS:
        raise ValueError(f"task: {task.name!r} is registered already: choose another name")
    if unknown := set(task.options) - set(OPTIONS):
        raise ValueError(f"task {task.name}: unknown option {min(unknown)!r}, expected some of {', '.join(OPTIONS)}")
    if task.metric and (task.max_new_tokens is None or "test" not in task.splits):
        raise ValueError(f"task {task.name}: a task with a metric needs max_new_tokens and a test split")
    TASKS[task.name] = task
    return task


def resolve_task(spec: str | Task, metric: str | None = None, max_new_tokens: int | None = None) -> Task:
    """Return a task.

    Args:
        spec: a registered name, a file of samples (``.jsonl``), a description (``.yml``), or ``module:object``.
        metric: of a file of samples, see ``data_gen.metrics.resolve_metric``.
        max_new_tokens: longest response to a sample of a file.

    Raises:
        ValueError: there is no such task, or it has a metric and a response length of its own.
    """
    if isinstance(spec, Task):
        return spec
    suffix = Path(spec).suffix
    if spec not in TASKS and suffix == ".jsonl":
        from data_gen.file_task import file_task

        return file_task(Path(spec), metric, max_new_tokens)
    for option, value in (("metric", metric), ("max-new-tokens", max_new_tokens)):
        if value is not None:
            raise ValueError(f"{option}: {spec} has its own; only a file of samples (.jsonl) needs it")
    if spec in TASKS:
        return TASKS[spec]
    if suffix in (".yml", ".yaml"):
        from data_gen.described_task import load_description

        return replace(load_description(Path(spec)), spec=spec)
    if suffix in (".csv", ".tsv"):
        raise ValueError(f"task: {spec} is a table: name it by `table:` in a description (docs/own-task.md)")
    if ":" not in spec:
        raise ValueError(
            f"task: found {spec!r}, expected one of {', '.join(TASKS)}, a file of samples (.jsonl), a description "
            "(.yml), or module:object"
        )
    task = import_object(spec, "task")
    if not isinstance(task, Task):
        raise ValueError(f"task: {spec} is a {type(task).__name__}, expected a data_gen.tasks.Task")
    return task if TASKS.get(task.name) is task else replace(task, spec=spec)


class TaskAttribute(Mapping[str, Any]):
    """A live view of one attribute of all registered tasks, by name; tasks where it is None are left out."""

    def __init__(self, attribute: str, **others: Any) -> None:
        """View an attribute, and ``others``: values of names that are no registered tasks."""
        self.attribute, self.others = attribute, others

    def current(self) -> dict[str, Any]:
        """Return the values of the tasks that are registered now."""
        values = {name: getattr(task, self.attribute) for name, task in TASKS.items()}
        return {name: value for name, value in values.items() if value is not None} | self.others

    def __getitem__(self, name: str) -> Any:
        return self.current()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.current())

    def __len__(self) -> int:
        return len(self.current())


def tasks_with(option: str) -> tuple[str, ...]:
    """Return the names of the tasks that accept an option."""
    return tuple(name for name, task in TASKS.items() if option in task.options)


def tasks_of(group: str) -> tuple[str, ...]:
    """Return the names of the tasks of a group."""
    return tuple(name for name, task in TASKS.items() if task.group == group)


@dataclass(frozen=True)
class Request:
    """A set of samples; equal requests give equal bytes.

    Attributes:
        task: see ``resolve_task``.
        tokens: longest sample, as ``"31000"``, or a range ``"8000:31000"`` that lengths are drawn from.
        lines: number of lines instead, for the line task.
        samples: how many.
        seed: of everything random.
        split: samples of ``train`` and ``test`` never coincide, see ``data_gen.split``.
        haystack: for niah, a folder of text files, ``essays`` (from the hub) or ``prose`` (built in, the default).
        needles: for niah, a file of training needles; defaults to the paper's ten.
        depths: for niah, how many depths from 0 to 100 per cent test samples step through; defaults to ten.
        data: for longbench, a local file instead of the hub's.
        ruler_version: for RULER's tasks, the year of NVIDIA's program whose text and steps of size samples have; by
            default the text of 2025, with as many words as fit, and worked examples in the prompt itself.

    Raises:
        ValueError: a field is invalid.
    """

    task: str
    tokens: str | int | None = None
    lines: int | None = None
    samples: int = 50
    seed: int = 0
    split: Split = "train"
    haystack: str | None = None
    needles: str | None = None
    depths: int | None = None
    data: str | None = None
    ruler_version: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        task = resolve_task(self.task)
        if self.split not in get_args(Split):
            raise ValueError(f"split: found {self.split!r}, expected train or test")
        if self.samples < 1:
            raise ValueError(f"samples: found {self.samples}, expected at least 1")
        for option in OPTIONS:
            if getattr(self, option) is not None and option not in task.options:
                raise ValueError(f"{option}: {task.name} has no such option, only {' and '.join(tasks_with(option))}")
        if self.split not in task.splits:
            raise ValueError(f"split: {self.task} samples are for training; score with `seal eval --task {self.task}`")
        if self.ruler_version not in (None, *RULER_VERSIONS):
            raise ValueError(f"ruler_version: found {self.ruler_version!r}, expected 2024 or 2025")
        if self.depths is not None and (self.depths < 2 or self.split == "train"):
            raise ValueError(f"depths: found {self.depths}, expected at least 2, and only for test samples")
        if (self.tokens is None) == (self.lines is None):
            raise ValueError("give the length either as tokens or as lines")
        if self.lines is not None and self.lines < 1:
            raise ValueError(f"lines: found {self.lines}, expected at least 1")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", str(self.tokens))
            self.token_range()

    def token_range(self) -> tuple[int, int]:
        """Return the shortest and the longest length to draw, in tokens."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", str(self.tokens))
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 0 < low <= high:
            raise ValueError(f"tokens: found {self.tokens!r}, expected N or N:M with 0 < N <= M, such as 8000:31000")
        return low, high
