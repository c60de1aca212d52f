"""Render recipes: those of the paper, from ``matrix.yml``, and those of any other model."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from textwrap import fill
from typing import Any

import jinja2
import yaml

from axolotl_plugins.common.io import load_json
from data_gen.tasks import resolve_task, tasks_of
from recipes.tools.cost import (
    CARD_SHARE,
    CARDS,
    CPU_FLOPS,
    CPU_GIB,
    Cost,
    Shape,
    StepConfig,
    cpu_gib,
    fastest,
    host_bytes,
    recipe_cost,
    training_bytes,
)
from recipes.tools.methods import GRANULARITY, METHODS, PROJECTIONS, RANK

FOLDER = Path(__file__).parents[1]
TEMPLATES = FOLDER / "templates"
# Mixtures of tasks, an equal share of the samples each; the demo has lengths, samples and rates of its own.
MIXTURES = {"multi": ("line", "niah", "vt", "cwe", "fwe"), "demo": ("line",)}
RULER = tasks_of("ruler")
SHORTEST_RULER = 8000  # tokens; lengths are drawn from here to the model's longest (appendix B.3)
CARD = 80  # GiB of the GPU that recipes are for
LIGER_MODELS = ("llama", "mistral", "qwen2", "qwen3")  # whose norms, RoPE and SwiGLU Liger replaces
RESULTS = FOLDER.parent / "results"
README = FOLDER / "README.md"
MARK = "<!-- Written by `seal recipe write`; edits below this line are lost. -->\n"


@dataclass(frozen=True)
class OwnData:
    """A file of chats to train on.

    Attributes:
        path: as the recipe names it.
        lengths: of its chats, in tokens.
    """

    path: str
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """Everything that one recipe's text depends on.

    Attributes:
        file: path of the recipe.
        model: an entry of ``models`` in ``matrix.yml``.
        task: see ``resolve_task``, several with commas between, or a key of ``MIXTURES``.
        method: a key of ``METHODS``.
        rate: learning rate.
        shows: the purpose, such as the table of the paper that it reproduces.
        shape: of the model, for the cost estimate; None if unknown.
        card: memory of the GPU in GiB, which decides what a step recomputes; a key of ``CARDS``.
        samples: training samples.
        epochs: passes over them.
        sharding: ``fsdp2`` or ``zero3`` to shard weights across devices.
        context_parallel_size: devices that every sample's tokens are sharded across.
        ruler_version: of RULER's tasks, see ``data_gen.dataset.Request``.
        own: file to train on instead of a task's samples.
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
    card: int = CARD
    ruler_version: int | None = None
    own: OwnData | None = None

    @property
    def name(self) -> str:
        """Name of the recipe, and of its adapter's folder in outputs/."""
        return self.file.stem

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that samples are drawn from."""
        return MIXTURES.get(self.task) or tuple(self.task.split(","))

    @property
    def titles(self) -> list[str]:
        """Descriptions of the tasks, or the user's file."""
        return [self.own.path] if self.own else [resolve_task(task).description for task in self.tasks]

    @property
    def gpu(self) -> bool:
        """Whether the recipe is for a GPU: bfloat16 and FlashAttention."""
        return self.model.get("gpu", True)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        if self.own:
            return max(self.own.lengths)
        return max(int(str(sample_tokens(self.model, self.task, part)).rpartition(":")[2]) for part in self.tasks)

    @property
    def self_extend(self) -> bool:
        """Whether attention is Self-Extend's."""
        return "self_extend" in str(self.model.get("model_config"))

    @property
    def chooses(self) -> bool:
        """Whether ``card`` decides what is recomputed: on one GPU, with attention that the estimate is for."""
        alone = self.sharding is None and self.context_parallel_size == 1
        return self.gpu and alone and self.shape is not None and not self.self_extend and not self.window_attention

    @property
    def window_attention(self) -> bool:
        """Whether some layers attend to a sliding window, for which PyTorch's attention builds a mask of T x T."""
        return bool(self.model.get("window_attention"))

    @cached_property
    def step(self) -> StepConfig:
        """Settings of a step: the fastest that fits the card; without a choice recomputed, on CPUs if memory lacks.

        Raises:
            ValueError: nothing fits.
        """
        if not self.gpu:
            stored = StepConfig(4, recompute=False)
            fits = self.shape is None or cpu_gib(training_bytes(self.shape, self.longest, step=stored)) <= CPU_GIB
            return stored if fits else StepConfig(4)
        step = StepConfig(low_rank=self.method not in GRANULARITY)
        if not self.chooses:
            return step
        assert self.shape is not None
        step = replace(step, liger=self.model.get("type") in LIGER_MODELS)
        return fastest(self.shape, self.longest, self.card, step, CARDS[self.card])

    @cached_property
    def cost(self) -> Cost | None:
        """Estimate of memory and time from the model's shape; None if that is unknown."""
        return self.cost_with({})

    def cost_with(self, changes: dict[str, Any]) -> Cost | None:
        """Estimate the cost with some settings changed."""
        settings, lengths = yaml.safe_load(self.render(None)) | changes, self.own.lengths if self.own else ()
        return recipe_cost(settings, self.shape, lengths) if self.shape else None

    @cached_property
    def text(self) -> str:
        """Content of the file: YAML under a header of comments."""
        return self.render(self.cost)

    def data_parts(self) -> list[dict[str, Any]]:
        """Return the data file of every part of the training data, and its task, tokens and samples."""
        if self.own:
            return [{"path": self.own.path}]
        # Equal data have equal names, on however many devices and by whatever method.
        key = self.name.removesuffix(f"_{self.sharding}").removesuffix(f"_cp{self.context_parallel_size}")
        key = key.removesuffix(f"_{self.method}")
        return [
            {
                "task": part,
                "tokens": sample_tokens(self.model, self.task, part),
                "samples": self.samples // len(self.tasks),
                "ruler_version": self.ruler_version if part in RULER else None,
                "path": f"data/{key}.jsonl" if len(self.tasks) == 1 else f"data/{key}_{resolve_task(part).name}.jsonl",
            }
            for part in self.tasks
        ]

    def render(self, cost: Cost | None) -> str:
        """Render the template, with memory and time in its header unless ``cost`` is None."""
        return environment().get_template("recipe.yml.jinja").render(
            recipe=self, model=self.model, parts=self.data_parts(), launch_path=shlex.quote(str(self.file)),
            granularity=GRANULARITY.get(self.method), rank=RANK, projections=PROJECTIONS,
            step=self.step, cost=cost,
        )  # fmt: skip


@cache
def environment() -> jinja2.Environment:
    """Return the Jinja environment of the recipes' template."""
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.ChainableUndefined,
    )  # fmt: skip
    jinja.globals |= {"CPU_FLOPS": CPU_FLOPS, "CARD_SHARE": CARD_SHARE, "FULL": FULL, "CARDS": CARDS}
    jinja.globals |= {
        "METHODS": METHODS,
        "device_name": device_name,
        "host_bytes": host_bytes,
        "measurement": measurement,
    }
    jinja.filters |= {"comment": comment, "minutes": in_minutes, "small": round_small}
    # Quoted where it must be.
    jinja.filters["yaml_text"] = lambda text: yaml.safe_dump(text, width=1000).removesuffix("\n...\n").rstrip()
    jinja.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False).rstrip()
    return jinja


def comment(text: str) -> str:
    """Wrap a text into comment lines, without the last line's end."""
    text = " ".join(text.split())
    return fill(text, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def in_minutes(seconds: float) -> str:
    """Return a time in words: minutes, with a decimal below 10."""
    if seconds < 30:
        return "less than a minute"
    return f"{seconds / 60:.1f} minutes" if seconds < 570 else f"{seconds / 60:.0f} minutes"


def round_small(value: float, places: int) -> str:
    """Return a number with so many decimal places, or one digit if that would be 0."""
    return f"{value:.{places}f}" if value >= 10**-places else f"{value:.1g}"


# Settings of a recipe that recomputes everything.
FULL = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": None, "selective_checkpointing": False,
        "activation_offloading": False}  # fmt: skip


def sample_tokens(model: dict[str, Any], task: str, part: str) -> int | str:
    """Return the longest sample of a task, or of a part of a mixture, in tokens, or the range to draw lengths from."""
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
    """Return the name of a recipe; what differs from defaults in its row of ``matrix.yml`` becomes part of it."""
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
            shape = matrix["shapes"][model["shape"]]
            model = model | {"tokens": row.get("tokens", model["tokens"]), "type": shape["model_type"]}
            if name in recipes:
                raise ValueError(f"matrix.yml: two rows make {name}.yml")
            recipes[name] = Recipe(
                Path("recipes") / f"{name}.yml", model, task, method,
                rate=rate(model.get("rates", matrix["rates"]), key, task, method),
                shows=f"{row['shows']} of arXiv 2501.15225", shape=Shape.of(shape),
                samples=row.get("samples", 50), epochs=row.get("epochs", 1), sharding=row.get("sharding"),
                context_parallel_size=row.get("context_parallel", 1), card=row.get("card", matrix["card"]),
                ruler_version=row.get("ruler_version"),
            )  # fmt: skip
    return list(recipes.values())


@cache
def measured_steps() -> list[dict[str, Any]]:
    """Read the steps that ``recipes.bench`` measured on GPUs."""
    return [row for file in sorted(RESULTS.glob("bench_gpu*.json")) for row in load_json(file)["rows"]]


def device_name(row: dict[str, Any]) -> str:
    """Return the short name of the GPU of a measured step, such as ``H200``."""
    return row["device"].replace("NVIDIA ", "").split()[0].split("-")[0]


def measurement(recipe: Recipe) -> dict[str, Any] | None:
    """Return the latest measured step of a recipe's shape, method, setting and sample length; None if there is none."""
    if not recipe.chooses or recipe.own:
        return None
    tokens = {sample_tokens(recipe.model, recipe.task, part) for part in recipe.tasks}
    methods = ("SEAL-C", "SEAL-H") if recipe.method in GRANULARITY else (METHODS[recipe.method],)  # equal work
    rows = [
        row for row in measured_steps()
        if row["shape"] == recipe.model.get("shape") and row["method"] in methods and tokens == {row["tokens"]}
        and "error" not in row and set(row["setting"].split("+")) == set(recipe.step.name.split("+"))
    ]  # fmt: skip
    return max(rows, key=lambda row: row["date"]) if rows else None


def readme(recipes: list[Recipe]) -> str:
    """Return recipes/README.md with its table replaced: a row per recipe, ordered by model, task and method.

    Raises:
        ValueError: the line above the table is missing.
    """
    head, mark, _ = README.read_text().partition(MARK)
    if not mark:
        raise ValueError(f"{README}: the line above its table is missing: {MARK.strip()}")
    models, tasks, methods = (list(dict.fromkeys(names)) for names in zip(
        *((recipe.model["name"], recipe.task, recipe.method) for recipe in recipes), strict=True))  # fmt: skip
    rows = sorted(recipes, key=lambda r: (models.index(r.model["name"]), tasks.index(r.task), methods.index(r.method)))
    return head + MARK + environment().get_template("readme.md.jinja").render(recipes=rows)
