"""Results of evaluations, and their JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from axolotl_plugins.common.environment import origin
from axolotl_plugins.common.io import load_json, write_text
from axolotl_plugins.common.schema import first_error
from data_gen.tasks import TaskAttribute

if TYPE_CHECKING:
    from axolotl_plugins.seal.model_loading import LoadedModel

TITLES = TaskAttribute("title", mmlu="MMLU")
# Fields that are left out of a file where they are None.
OMITTED = ("length", "depth", "title", "asked", "fingerprint", "origin")


def title_of(result: Mapping[str, Any]) -> str:
    """Return the title of a result's task: the stored one, as a description may be gone, else the registered one's."""
    return result.get("title") or TITLES.get(result["task"], result["task"])


def same_model(name: str, other: str) -> bool:
    """Return whether two names are of the same folder, or of the same repository on the hub."""
    return Path(name).resolve() == Path(other).resolve()


def check_base(adapter: LoadedModel, model: str) -> None:
    """Raise ValueError unless an adapter is of a base model."""
    if not same_model(adapter.base, model):
        raise ValueError(f"adapter: {adapter.name} is of {adapter.base}, expected one of {model}: name its --model")


@dataclass(frozen=True, kw_only=True)
class LengthScore:
    """Mean score of the samples of one length, with its 95 % interval.

    Attributes:
        length: requested prompt length, tokens; None for the mean over all lengths.
        depth: position of the needle, per cent of the prompt; None where it is not distinguished.
        tokens: mean measured prompt length.
        count: samples.
        score: mean, in [0, 1].
        low: lower bound of the interval.
        high: upper bound of the interval.
    """

    length: int | None = None
    depth: int | None = None
    tokens: float
    count: int
    score: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """Score of one set of a benchmark.

    Attributes:
        name: of the set.
        count: samples.
        score: mean, per cent.
        low: lower bound of the 95 % interval; None where lm-eval reports no standard error.
        high: upper bound of the 95 % interval, or None.
        cut: prompts that were truncated in the middle.
    """

    name: str
    count: int
    score: float
    low: float | None = None
    high: float | None = None
    cut: int = 0


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Scores of a model on one of SEAL's tasks, by length.

    Attributes:
        model: hub id or folder.
        base: hub id or folder of its base model.
        method: ``base``, ``SEAL-H``, ``SEAL-C``, ``LoRA``, ``DoRA`` or another PEFT type.
        task: its name.
        title: of the task; None in results of earlier versions.
        window: the model's context window, tokens.
        dtype: of the model's weights, such as ``bfloat16``; None where it is unknown.
        seed: of the samples.
        shots: worked examples before every prompt.
        contaminated: how many samples the model was tuned on; None where its training data is unknown.
        scores: one entry per length.
        depths: one entry per length and depth (needles only).
        mean: over all samples.
        responses: one row per sample: what identifies it, ``response`` and ``score``.
        asked: options that determine the samples; None where the result was not made by ``eval.evaluate``.
        fingerprint: see ``eval.resume.fingerprint``; an evaluation with the same one is not run again.
        origin: command, date, commit and machine; None where the result was not written to a file.
    """

    model: str
    base: str
    method: str
    task: str
    title: str | None = None
    window: int
    dtype: str | None = None
    seed: int = 0
    shots: int = 0
    contaminated: int | None = None
    scores: list[LengthScore]
    depths: list[LengthScore] = field(default_factory=list)
    mean: LengthScore
    responses: list[dict[str, Any]]
    asked: dict[str, Any] | None = None
    fingerprint: str | None = None
    origin: dict[str, str | None] | None = field(default=None, compare=False)

    def by_length(self) -> dict[int, float]:
        """Return mean scores by requested length."""
        return {row.length: row.score for row in self.scores if row.length is not None}


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Scores of a model on a benchmark of several sets; other attributes as in ``EvalResult``.

    Attributes:
        sets: one entry per set.
        mean: of the sets' scores, per cent.
    """

    model: str
    base: str
    method: str
    task: str
    window: int
    dtype: str | None = None
    sets: list[SetScore]
    mean: float
    asked: dict[str, Any] | None = None
    fingerprint: str | None = None
    origin: dict[str, str | None] | None = field(default=None, compare=False)


Result = EvalResult | BenchmarkResult


def to_json(result: Result) -> dict[str, Any]:
    """Return a result as its JSON file holds it."""
    return asdict(
        result,
        dict_factory=lambda items: {key: value for key, value in items if value is not None or key not in OMITTED},
    )


def from_json(values: dict[str, Any]) -> Result:
    """Build a result from the contents of its JSON file; other keys than its fields are ignored.

    Raises:
        ValueError: a key is missing, or a value of another type.
    """
    kind: type[Result] = BenchmarkResult if "sets" in values else EvalResult
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"incomplete result ({first_error(error)})") from None


def write_result(result: Result, out: Path) -> None:
    """Write a result as JSON, with the command that made it."""
    write_text(out, json.dumps(to_json(replace(result, origin=origin())), indent=1) + "\n")


def read_objects(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the JSON objects in the ``*.json`` files of a folder, by file in the order of names.

    Raises:
        ValueError: a file is not JSON, or too large.
    """
    values = {file: load_json(file) for file in sorted(folder.glob("*.json")) if file.is_file()}
    return {file: value for file, value in values.items() if isinstance(value, dict)}


def read_results(folder: Path) -> list[Result]:
    """Return all results in a folder, in the order of file names; other JSON files are ignored.

    Raises:
        ValueError: see ``read_objects``; or a result is incomplete.
    """
    results = []
    for file, values in read_objects(folder).items():
        if not ({"scores", "responses"} <= values.keys() or {"sets", "mean"} <= values.keys()):
            continue
        if not {"base", "method", "task"} <= values.keys():
            continue
        try:
            results.append(from_json(values))
        except ValueError as error:
            raise ValueError(f"{file}: {error}: score the model again, or move the file") from None
    return results
