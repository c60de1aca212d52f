"""Render recipes: those of the paper, from ``matrix.yml``, and those of any other model."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from textwrap import fill
from typing import Any

import jinja2
import yaml

from data_gen.tasks import TaskAttribute, tasks_of
from recipes.tools.estimate import CPU_FLOPS, GOOD_SHARE, PAPER_SHARE, Cost, Shape, needs_checkpointing, recipe_cost
from recipes.tools.methods import GRANULARITY, METHODS, PROJECTIONS, RANK

FOLDER = Path(__file__).parents[1]
TEMPLATES = FOLDER / "templates"
TASKS = TaskAttribute("description")
# Mixtures of tasks, an equal share of the samples each; the demo has lengths, samples and rates of its own.
MIXTURES = {"multi": ("line", "niah", "vt", "cwe", "fwe"), "demo": ("line",)}
RULER = tasks_of("ruler")
SHORTEST_RULER = 8000  # tokens; lengths are drawn from here to the model's longest (appendix B.3)


@dataclass(frozen=True)
class Recipe:
    """Everything that one recipe's text depends on.

    Attributes:
        file: path of the recipe.
        model: an entry of ``models`` in ``matrix.yml``.
        task: a key of ``TASKS`` or ``MIXTURES``.
        method: a key of ``METHODS``.
        rate: learning rate.
        shows: the purpose, such as the table of the paper that it reproduces.
        shape: of the model, for the cost estimate; None if unknown.
        samples: training samples.
        epochs: passes over them.
        sharding: ``fsdp2`` or ``zero3`` to shard weights across devices.
        context_parallel_size: devices that every sample's tokens are sharded across.
        measured: ``seconds`` per sample and peak ``gib`` on an H200, see ``matrix.yml``; empty if not measured.
        ruler_version: of RULER's tasks, see ``data_gen.dataset.Request``.
    """

    file: Path
    model: dict[str, Any]
    task: str
    method: str
    rate: float
    shows: str
    shape: Shape | None
    samples: int = 50
    epochs: int = 1
    sharding: str | None = None
    context_parallel_size: int = 1
    measured: dict[str, Any] = field(default_factory=dict)
    ruler_version: int | None = None

    @property
    def name(self) -> str:
        """Name of the recipe, and of its adapter's folder in outputs/."""
        return self.file.stem

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that samples are drawn from."""
        return MIXTURES.get(self.task, (self.task,))

    @property
    def gpu(self) -> bool:
        """Whether the recipe is for a GPU: bfloat16 and FlashAttention."""
        return self.model.get("gpu", True)

    @property
    def recompute(self) -> bool:
        """Whether activations are recomputed (gradient checkpointing): on GPUs, and on CPUs that lack the memory."""
        longest = max(int(str(sample_tokens(self.model, self.task, part)).rpartition(":")[2]) for part in self.tasks)
        return self.gpu or (self.shape is not None and needs_checkpointing(self.shape, longest))

    @cached_property
    def cost(self) -> Cost | None:
        """Estimate of memory and time from the model's shape; None if that is unknown."""
        return recipe_cost(yaml.safe_load(self.render("")), self.shape) if self.shape else None

    @cached_property
    def text(self) -> str:
        """Content of the file: YAML under a header of comments."""
        return self.render(expectation(self))

    def data_parts(self) -> list[dict[str, Any]]:
        """Return task, tokens, samples and data file of every part of the training data."""
        # Equal data have equal names, on however many devices and by whatever method.
        key = self.name.removesuffix(f"_{self.sharding}").removesuffix(f"_cp{self.context_parallel_size}")
        key = key.removesuffix(f"_{self.method}")
        return [
            {
                "task": part,
                "tokens": sample_tokens(self.model, self.task, part),
                "samples": self.samples // len(self.tasks),
                "ruler_version": self.ruler_version if part in RULER else None,
                "file": key if len(self.tasks) == 1 else f"{key}_{part}",
            }
            for part in self.tasks
        ]

    def render(self, expectation: str) -> str:
        """Render the template with a text on memory and time in its header."""
        title = f"{METHODS[self.method]} on {self.model['name']}, {' + '.join(TASKS[part] for part in self.tasks)}"
        return environment().get_template("recipe.yml.jinja").render(
            recipe=self, model=self.model, parts=self.data_parts(), launch_path=shlex.quote(str(self.file)),
            title=f"{title}: {self.shows}.", expectation=expectation, granularity=GRANULARITY.get(self.method),
            rank=RANK, projections=PROJECTIONS, self_extend="self_extend" in str(self.model.get("model_config")),
        )  # fmt: skip


@cache
def environment() -> jinja2.Environment:
    """Return the Jinja environment of the recipes' template."""
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.ChainableUndefined,
    )  # fmt: skip
    jinja.filters["comment"] = comment
    jinja.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False).rstrip()
    return jinja


def comment(text: str) -> str:
    """Wrap a text into comment lines, without the last line's end."""
    return fill(text, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def expectation(recipe: Recipe) -> str:
    """Describe a recipe's memory and time and how they are known; empty if the model's shape is unknown."""
    cost, shape = recipe.cost, recipe.shape
    if cost is None or shape is None:
        return ""
    if not recipe.gpu:
        minutes = "a minute" if cost.cpu_minutes == 1 else f"{cost.cpu_minutes} minutes"
        return (
            f"Takes about {cost.cpu_gib:.0f} GiB, and {minutes} on two CPU cores: computed from shapes "
            f"(`python -m recipes cost`), at the {CPU_FLOPS / 1e9:.0f} GFLOP/s in float32 that tuning SmolLM2-135M "
            "with 1,024 tokens reached on two idle cores with AVX-512; others may take several times as long."
        )
    fast, slow = cost.minutes("a100")
    devices = recipe.context_parallel_size
    on_each, cards = (" on each", str(devices)) if devices > 1 else ("", "one")
    text = (
        f"Takes about {cost.gib:.0f} GiB{on_each}, and {fast:.0f} to {slow:.0f} minutes on {cards} A100 80 GB: "
        f"computed from shapes (`python -m recipes cost`), at {GOOD_SHARE:.0%} of the card's peak and at the "
        f"{PAPER_SHARE:.0%} that the authors' 40 minutes for 7B models and 31K tokens (section 5) come to."
    )
    if measured := recipe.measured:
        fast, slow = cost.minutes("h200")
        text += (
            f" Measured with random weights of these shapes on one H200 (docs/performance.md): {measured['seconds']} s "
            f"a sample and {measured['gib']} GiB, so {measured_minutes(recipe):.0f} minutes, where the estimate is "
            f"{cost.gib:.0f} GiB and {fast:.0f} to {slow:.0f} minutes."
        )
    if devices > 1:
        text += f" Start {devices} processes, which share every sample."
    if recipe.sharding:
        weights = cost.memory.element * shape.parameters / 2**30
        text += (
            f" Of that, {weights:.0f} GiB are weights, which several devices shard; each takes samples of its own: "
            "`--num-epochs=N` makes as many steps on N devices as one makes."
        )
    return text


def measured_minutes(recipe: Recipe) -> float:
    """Return the minutes of all steps at the measured seconds per sample."""
    return recipe.measured["seconds"] * recipe.samples * recipe.epochs / 60


def sample_tokens(model: dict[str, Any], task: str, part: str) -> int | str:
    """Return the longest sample of a task in tokens, or the range that lengths are drawn from.

    Args:
        model: an entry of ``models`` in ``matrix.yml``; its ``tokens`` hold for all tasks, or are a mapping by task.
        task: a key of ``TASKS`` or ``MIXTURES``.
        part: the task itself, or one of the mixture.
    """
    tokens = model["tokens"]
    if isinstance(tokens, dict):
        tokens = tokens.get(task, tokens.get(part))
    if part in RULER and ":" not in str(tokens):
        tokens = f"{min(SHORTEST_RULER, int(tokens) // 2)}:{tokens}"
    return tokens


def read_matrix() -> dict[str, Any]:
    """Read ``matrix.yml``."""
    return yaml.safe_load((FOLDER / "matrix.yml").read_text())


def rate(rates: dict[str, dict[str, float]], model: str, task: str, method: str) -> float:
    """Return the paper's learning rate: the model's own, else the task's.

    Raises:
        ValueError: there is none.
    """
    by_method = rates.get(task, {})
    if (value := by_method.get(f"{model} {method}", by_method.get(method))) is None:
        raise ValueError(f"matrix.yml: no rate for {task}, {model}, {method}")
    return value


def recipe_name(model: str, task: str, method: str, row: dict[str, Any]) -> str:
    """Return the name of a recipe, which is also that of its adapter's folder.

    Args:
        model: a key of ``models`` in ``matrix.yml``.
        task: a key of ``TASKS`` or ``MIXTURES``.
        method: a key of ``METHODS``.
        row: an entry of ``recipes``; what differs from the model's defaults becomes part of the name.
    """
    tokens = f"_{round(row['tokens'] / 1024)}k" if "tokens" in row else ""
    epochs = f"_{row['samples']}x{row['epochs']}" if "epochs" in row else ""
    sharding = f"_{row['sharding']}" if "sharding" in row else ""
    context_parallel = f"_cp{row['context_parallel']}" if "context_parallel" in row else ""
    return f"{model}{tokens}_{task}_{method}{epochs}{sharding}{context_parallel}"


def matrix_recipes() -> list[Recipe]:
    """Return every recipe of ``matrix.yml``, in its order.

    Raises:
        ValueError: a rate is missing, or two rows make the same file.
    """
    matrix = read_matrix()
    recipes: dict[str, Recipe] = {}
    for row in matrix["recipes"]:
        for key, task, method in itertools.product(row["models"], row["tasks"], row["methods"]):
            name, model = recipe_name(key, task, method, row), matrix["models"][key]
            model = model | {"tokens": row.get("tokens", model["tokens"])}
            if name in recipes:
                raise ValueError(f"matrix.yml: two rows make {name}.yml")
            one_device = "sharding" not in row and "context_parallel" not in row
            recipes[name] = Recipe(
                Path("recipes") / f"{name}.yml", model, task, method,
                rate=rate(model.get("rates", matrix["rates"]), key, task, method),
                shows=f"{row['shows']} of arXiv 2501.15225", shape=Shape.of(matrix["shapes"][model["shape"]]),
                samples=row.get("samples", 50), epochs=row.get("epochs", 1), sharding=row.get("sharding"),
                context_parallel_size=row.get("context_parallel", 1),
                measured=measurement(matrix, model, task, method) if one_device else {},
                ruler_version=row.get("ruler_version"),
            )  # fmt: skip
    return list(recipes.values())


def measurement(matrix: dict[str, Any], model: dict[str, Any], task: str, method: str) -> dict[str, Any]:
    """Return the measured step of a model's shape, method and sample length; empty if there is none."""
    if "self_extend" in str(model.get("model_config")):
        return {}  # its attention is another
    tokens = [sample_tokens(model, task, part) for part in MIXTURES.get(task, (task,))]
    for row in matrix["measured"]:
        if row["shape"] == model["shape"] and method in row["methods"] and tokens == [row["tokens"]]:
            return row
    return {}


def all_recipes() -> dict[str, str]:
    """Return name and text of every recipe of ``matrix.yml``.

    Raises:
        ValueError: a rate is missing, or two rows make the same file.
    """
    return {recipe.name: recipe.text for recipe in matrix_recipes()}
