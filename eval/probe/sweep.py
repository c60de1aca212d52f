"""Probes that tune: learning rates and sample counts (paper appendix E, Table 7), and controls of the gain."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from axolotl_plugins.common.io import load_yaml, read_rows
from axolotl_plugins.common.tokenizer import Messages
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.args import parse_block
from axolotl_plugins.seal.model_loading import LoadedModel, load, with_adapter
from axolotl_plugins.seal.provenance import text_hash
from axolotl_plugins.seal.tune import tune
from data_gen.dataset import Request, generate
from data_gen.file_task import read_sample
from data_gen.tasks import Task
from eval.controls import seal_layers, shuffle_heads, wrong_answers, wrong_facts
from eval.harness import is_contaminated
from eval.probe.head_importance import PROBE_SEED
from eval.result_cache import Journal
from eval.run import run
from eval.spec import scored_task

SOUND_SCALES = (0.2, 5.0)  # outside, a head is as good as removed, or drowns the others


def read_recipe(file: Path) -> dict[str, Any]:
    """Read the model, the data and the learning rate of a SEAL recipe.

    Returns:
        ``base_model``, ``model_config``, ``chat_template`` (file or None), ``template_arguments`` (of it, or None),
        ``dtype`` (``auto``, the checkpoint's), ``scales`` (settings of ``SealConfig``), ``requests`` (of its data; none
        for a file of the user's), ``rows`` (of that file), ``rate``, ``epochs``.

    Raises:
        ValueError: the file is not a SEAL recipe of data to generate or of one file, or a row of that is not a chat.
    """
    try:
        recipe = load_yaml(file)
        block = parse_block(recipe["seal"])
        rows = training_rows(file, recipe["datasets"]) if block.data is None else []
        if not 0 < float(recipe["learning_rate"]) < math.inf:
            raise ValueError(f"{file}: learning_rate: found {recipe['learning_rate']}, expected a number above 0")
        return {
            "base_model": recipe["base_model"],
            "model_config": recipe.get("model_config"),
            "chat_template": recipe.get("chat_template_jinja"),
            "template_arguments": recipe.get("chat_template_kwargs"),
            "dtype": "auto",
            "scales": block.adapter_settings(),
            "requests": [Request(**part.model_dump()) for part in block.data or ()],
            "rows": rows,
            "rate": float(recipe["learning_rate"]),
            "epochs": int(recipe["num_epochs"]),
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a recipe with `adapter: seal` and its data ({error!r})") from None


def training_rows(recipe: Path, datasets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples of a recipe's own data file, see ``data_gen.file_task.read_sample``.

    Raises:
        ValueError: there is not one file, or a row is not a chat.
    """
    if len(datasets) != 1:
        raise ValueError(f"{recipe}: datasets: found {len(datasets)}, expected one")
    file, rows = Path(datasets[0]["path"]), []
    for number, row in read_rows(file):
        try:
            rows.append(read_sample(row))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    return rows


def load_untuned(recipe: dict[str, Any]) -> LoadedModel:
    """Load a recipe's base model with new scales, all 1."""
    options = ("dtype", "chat_template", "template_arguments", "model_config")
    loaded = load(recipe["base_model"], **{option: recipe[option] for option in options})
    return with_adapter(loaded, SealConfig(**recipe["scales"]))


@torch.no_grad()
def reset_scales(model: nn.Module) -> None:
    """Set all scales to 1."""
    for layer in seal_layers(model):
        layer.seal_scale["default"].fill_(1)


def sample_count(recipe: dict[str, Any]) -> int:
    """Return how many samples a recipe trains on."""
    return sum(request.samples for request in recipe["requests"]) or len(recipe["rows"])


def training_data(
    recipe: dict[str, Any], tokenizer: Any, samples: int | None, seed: int
) -> tuple[list[Messages], list[str]]:
    """Return the first chats of a recipe's data, of each part in proportion, and the key fact of each answer.

    Args:
        recipe: see ``read_recipe``.
        tokenizer: counts tokens.
        samples: how many; None takes all.
        seed: added to that of the data, if it is drawn.

    Raises:
        ValueError: a file has fewer samples.
    """
    requests, rows, total = recipe["requests"], recipe["rows"], sample_count(recipe)
    samples = samples or total
    if rows and samples > total:
        raise ValueError(f"samples: the recipe's file has {total}, {samples} are asked for: name fewer")
    rows = rows[:samples]
    for request in requests:
        changes = {"samples": max(1, samples * request.samples // total), "seed": request.seed + seed}
        rows += generate(replace(request, **changes), tokenizer)
    return [row["messages"] for row in rows], [row["references"][0] for row in rows]


def sweep(
    recipe: dict[str, Any], *, rates: list[float], samples: list[int] | None, epochs: list[int], seeds: list[int],
    lengths: list[int] | None, validation: int | Task = 50, batch_size: int | None = None, journal: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tune with every combination and score each on validation samples, which are disjoint from the test split.

    Scales far from 1 can lower the loss on short samples and break long ones: combinations that leave ``SOUND_SCALES``
    are marked, and so is the best if it is one of them.

    Args:
        recipe: see ``read_recipe``.
        rates: learning rates.
        samples: numbers of samples, fewer are the first of more; None uses the recipe's.
        epochs: passes over the samples.
        seeds: of data and order.
        lengths: longest validation samples, in tokens; None only for a file's samples.
        validation: samples per length and task of the recipe, or a file's samples.
        batch_size: prompts decoded together; None uses what memory allows.
        journal: file that caches scores, from which an interrupted run resumes.

    Returns:
        ``base``, scores by length (means over tasks) with all scales 1; ``cells``, each with ``rate``, ``samples``,
        ``epochs``, ``seed``, ``scores`` (by length), ``mean``, ``scales`` (least and greatest) and ``unsound`` (scales
        leave ``SOUND_SCALES``); ``over_seeds``, means over seeds by rate, samples and epochs, ``unsound`` if any seed
        is; ``best``, the greatest of these (of equals the smallest rate); and the swept values.

    Raises:
        ValueError: see ``training_data`` and ``Validation.score``.
    """
    cache = Journal(journal)
    held_out = Validation.of(recipe, lengths, validation, batch_size)
    loaded = load_untuned(recipe)
    if "base" not in cache:
        cache.add("base", held_out.score(loaded, []))
    cells = []
    grid = [
        (rate, count, passes, seed)
        for count in samples or [sample_count(recipe)]
        for passes in epochs
        for rate in rates
        for seed in seeds
    ]
    for rate, count, passes, seed in tqdm(grid, desc="tuning and scoring"):
        key = f"{rate}/{count}/{passes}/{seed}"
        if key not in cache:
            chats, _ = training_data(recipe, loaded.tokenizer, count, seed)
            reset_scales(loaded.model)
            tune(loaded.model, chats, loaded.tokenizer, lr=rate, epochs=passes, seed=seed)
            cache.add(key, {**held_out.score(loaded, chats), "scales": scale_range(loaded.model)})
        low, high = cache.values[key]["scales"]
        scores = cache.values[key]["scores"]
        cells.append({"rate": rate, "samples": count, "epochs": passes, "seed": seed, "scores": scores,
                      "mean": sum(scores.values()) / len(scores), "scales": [low, high],
                      "unsound": not SOUND_SCALES[0] <= low <= high <= SOUND_SCALES[1]})  # fmt: skip
    over_seeds = means_over_seeds(cells)
    base = cache.values["base"]
    return {
        "kind": "sweep", "model": loaded.name, "base_model": loaded.base, "method": loaded.method,
        "dtype": loaded.dtype, **held_out.labels, "lengths": [int(length) for length in base["scores"]],
        "validation_samples": base["count"], "base": base["scores"], "cells": cells, "seeds": seeds,
        "over_seeds": over_seeds, "best": max(over_seeds, key=lambda row: (row["mean"], -row["rate"])),
    }  # fmt: skip


def means_over_seeds(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean of each combination of a sweep over its seeds."""
    groups = defaultdict(list)
    for cell in cells:
        groups[cell["rate"], cell["samples"], cell["epochs"]].append(cell)
    return [
        {"rate": rate, "samples": count, "epochs": passes, "mean": sum(cell["mean"] for cell in group) / len(group),
         "unsound": any(cell["unsound"] for cell in group)}
        for (rate, count, passes), group in sorted(groups.items())
    ]  # fmt: skip


def scale_range(model: nn.Module) -> list[float]:
    """Return the least and the greatest scale."""
    scales = torch.cat([layer.seal_scale["default"].detach().cpu().flatten() for layer in seal_layers(model)])
    return [scales.min().item(), scales.max().item()]


@dataclass(frozen=True)
class Validation:
    """Samples that scales are chosen by.

    Attributes:
        parts: tasks that draw them from the training split under a seed that nothing is trained on, or one that has
            them all; each with its options of ``eval.run.run``.
    """

    parts: list[tuple[Task, dict[str, Any]]]

    @property
    def labels(self) -> dict[str, str]:
        """Return ``task`` and ``title`` of a result."""
        return {key: " + ".join(getattr(task, name) for task, _ in self.parts)
                for key, name in (("task", "name"), ("title", "title"))}  # fmt: skip

    @classmethod
    def of(
        cls, recipe: dict[str, Any], lengths: list[int] | None, validation: int | Task, batch_size: int | None
    ) -> Validation:
        """Return a recipe's validation samples, see ``sweep``.

        Raises:
            ValueError: the recipe's data is a file, from whose task no samples are drawn.
        """
        options: dict[str, Any] = {"lengths": lengths, "batch_size": batch_size}
        drawn = options | {"seed": PROBE_SEED, "split": "train"}
        if not isinstance(validation, int):
            return cls([(validation, options if validation.rows else drawn)])
        if not recipe["requests"]:
            raise ValueError("validation: missing: name a file of samples that the recipe's own data does not have")
        return cls([
            (scored_task(request.task), {**drawn, "samples": validation, "haystack": request.haystack,
                                         "ruler_version": request.ruler_version})
            for request in recipe["requests"]
        ])  # fmt: skip

    def score(self, loaded: LoadedModel, chats: list[Messages]) -> dict[str, Any]:
        """Return ``scores`` by length, means over tasks, and ``count`` (most samples of a length, of each task).

        Args:
            loaded: the model.
            chats: that it was tuned on.

        Raises:
            ValueError: see ``run``; or a sample is among the chats.
        """
        tuned_on = frozenset(text_hash(turn["content"]) for chat in chats for turn in chat)
        for task, _ in self.parts:
            if task.rows and any(is_contaminated(row, tuned_on) for row in task.rows(loaded.tokenizer)):
                raise ValueError(f"validation: {task.name} has a sample of the training data: name a file of others")
        results = [run(loaded, task, **options) for task, options in self.parts]
        scores = [result.by_length() for result in results]
        return {"scores": {str(length): sum(part[length] for part in scores) / len(scores) for length in scores[0]},
                "count": max(score.count for score in results[0].scores)}  # fmt: skip


def controls(
    recipe: dict[str, Any], *, seeds: list[int], lengths: list[int] | None, validation: int | Task = 50,
    batch_size: int | None = None, journal: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score the base and the tuned model beside three controls, on validation samples.

    Controls: the tuned scales shuffled over heads, and scales tuned with the key fact, or the whole answer, of another
    sample. If the gain had another cause than the right heads and the right answers, they would show it too.

    Args:
        recipe: see ``read_recipe``.
        seeds: of data, order and shuffling.
        lengths: see ``sweep``.
        validation: see ``sweep``.
        batch_size: prompts decoded together; None uses what memory allows.
        journal: file that caches scores, from which an interrupted run resumes.

    Returns:
        ``scores``: by name (``base``, ``tuned``, ``shuffled``, ``wrong facts``, ``wrong answers``) a list of scores by
        length, one entry per seed (one for base).
    """
    cache = Journal(journal)
    held_out = Validation.of(recipe, lengths, validation, batch_size)
    loaded = load_untuned(recipe)
    chats: list[Messages] = []

    def score(key: str) -> dict[str, float]:
        if key not in cache:
            cache.add(key, held_out.score(loaded, chats))
        return cache.values[key]["scores"]

    def tune_on(chats: list[Messages], seed: int) -> None:
        reset_scales(loaded.model)
        tune(loaded.model, chats, loaded.tokenizer, lr=recipe["rate"], epochs=recipe["epochs"], seed=seed)

    scores: dict[str, list[dict[str, float]]] = {"base": [score("base")]}
    for seed in tqdm(seeds, desc="controls"):
        if f"{seed}/wrong answers" not in cache:
            chats, facts = training_data(recipe, loaded.tokenizer, None, seed)
            tune_on(chats, seed)
            score(f"{seed}/tuned")
            shuffle_heads(loaded.model, random.Random(seed))
            score(f"{seed}/shuffled")
            tune_on(wrong_facts(chats, facts, random.Random(seed)), seed)
            score(f"{seed}/wrong facts")
            tune_on(wrong_answers(chats, random.Random(seed)), seed)
            score(f"{seed}/wrong answers")
        for name in ("tuned", "shuffled", "wrong facts", "wrong answers"):
            scores.setdefault(name, []).append(cache.values[f"{seed}/{name}"]["scores"])
    return {
        "kind": "controls", "model": loaded.name, "base_model": loaded.base, "method": loaded.method,
        "dtype": loaded.dtype, **held_out.labels, "lengths": [int(length) for length in scores["base"][0]],
        "validation_samples": cache.values["base"]["count"], "seeds": seeds, "scores": scores,
    }  # fmt: skip
