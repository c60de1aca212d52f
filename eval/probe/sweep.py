"""Probes that tune: learning rates and sample counts (paper appendix E, Table 7), and controls of the gain."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import replace
from itertools import product
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
from eval.lm_eval_model import is_contaminated
from eval.probe.head_importance import PROBE_SEED
from eval.resume import Journal
from eval.score_by_length import score_by_length
from eval.spec import scored_task

SOUND_SCALES = (0.2, 5.0)  # outside, a head is as good as removed, or drowns the others


def read_recipe(file: Path) -> dict[str, Any]:
    """Read the model, the data and the learning rate of a SEAL recipe.

    Returns:
        ``base_model``, ``model_config``, ``chat_template`` (file or None), ``template_arguments`` (of it, or None),
        ``trust_remote_code``, ``dtype`` (``auto``, the checkpoint's), ``scales`` (settings of ``SealConfig``),
        ``requests`` (of its data; none for a file of the user's), ``rows`` (of that file), ``rate``, ``epochs``.

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
            "trust_remote_code": recipe.get("trust_remote_code") is True,
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
    options = ("dtype", "chat_template", "template_arguments", "model_config", "trust_remote_code")
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
    if requests and any(samples * request.samples % total for request in requests):
        raise ValueError(f"samples: {samples} cannot be shared in the recipe's proportions of {len(requests)} tasks: "
                         f"name a multiple of {len(requests)}")  # fmt: skip
    for request in requests:
        changes = {"samples": samples * request.samples // total, "seed": request.seed + seed}
        rows += generate(replace(request, **changes), tokenizer)
    return [row["messages"] for row in rows], [row["references"][0] for row in rows]


class TuningRun:
    """Tuning of a recipe's scales in progress: its model, its validation samples, and cached scores on them.

    Args:
        recipe: see ``read_recipe``.
        lengths: longest validation samples, in tokens; None only for a file's samples.
        validation: samples per length and task of the recipe, or a file's samples.
        batch_size: prompts decoded together; None uses what memory allows.
        journal: file that caches scores, from which an interrupted run resumes.

    Attributes:
        parts: tasks that draw validation samples from the training split under a seed that nothing is trained on, or
            one that has them all; each with its options of ``eval.score_by_length.score_by_length``.

    Raises:
        ValueError: the recipe's data is a file, from whose task no samples are drawn.
    """

    def __init__(
        self, recipe: dict[str, Any], lengths: list[int] | None, validation: int | Task = 50,
        batch_size: int | None = None, journal: Path | None = None,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {"lengths": lengths, "batch_size": batch_size}
        drawn = options | {"seed": PROBE_SEED, "split": "train"}
        self.parts: list[tuple[Task, dict[str, Any]]] = []
        if not isinstance(validation, int):
            self.parts.append((validation, options if validation.rows else drawn))
        elif not recipe["requests"]:
            raise ValueError("validation: missing: name a file of samples that the recipe's own data does not have")
        else:
            for request in recipe["requests"]:
                own = {"samples": validation, "haystack": request.haystack, "ruler_version": request.ruler_version}
                self.parts.append((scored_task(request.task), drawn | own))
        self.cache = Journal(journal)
        self.loaded = load_untuned(recipe)

    def tune(self, chats: list[Messages], rate: float, epochs: int, seed: int) -> None:
        """Tune the scales from 1 on."""
        reset_scales(self.loaded.model)
        tune(self.loaded.model, chats, self.loaded.tokenizer, lr=rate, epochs=epochs, seed=seed)

    def score(self, key: str, chats: list[Messages]) -> None:
        """Cache ``scores`` by length (means over tasks), ``count`` of samples and the range of ``scales`` after tuning.

        Raises:
            ValueError: see ``score_by_length``; or a sample is among the chats.
        """
        if key in self.cache:
            return
        tuned_on = frozenset(text_hash(turn["content"]) for chat in chats for turn in chat)
        for task, _ in self.parts:
            if task.rows and any(is_contaminated(row, tuned_on) for row in task.rows(self.loaded.tokenizer)):
                raise ValueError(f"validation: {task.name} has a sample of the training data: name a file of others")
        results = [score_by_length(self.loaded, task, **options) for task, options in self.parts]
        scores = [result.by_length() for result in results]
        self.cache.add(key, {
            "scores": {str(length): sum(part[length] for part in scores) / len(scores) for length in scores[0]},
            "count": max(score.count for score in results[0].scores),
            "scales": scale_range(self.loaded.model),
        })  # fmt: skip

    def result(self, kind: str, **values: Any) -> dict[str, Any]:
        """Return a result as it is stored, with the values of its kind."""
        loaded, base = self.loaded, self.cache.values["base"]
        return {
            "kind": kind, "model": loaded.name, "base_model": loaded.base, "method": loaded.method,
            "dtype": loaded.dtype, "task": " + ".join(task.name for task, _ in self.parts),
            "title": " + ".join(task.title for task, _ in self.parts),
            "lengths": [int(length) for length in base["scores"]], "validation_samples": base["count"], **values,
        }  # fmt: skip


def sweep(
    recipe: dict[str, Any], *, rates: list[float], samples: list[int] | None, epochs: list[int], seeds: list[int],
    **options: Any,
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
        options: of ``TuningRun``.

    Returns:
        ``base``, scores by length (means over tasks) with all scales 1; ``cells``, each with ``rate``, ``samples``,
        ``epochs``, ``seed``, ``scores`` (by length), ``mean``, ``scales`` (least and greatest) and ``unsound`` (scales
        leave ``SOUND_SCALES``); ``over_seeds``, means over seeds by rate, samples and epochs, ``unsound`` if any seed
        is; ``best``, the greatest of these (of equals the smallest rate); and the swept values.

    Raises:
        ValueError: see ``training_data`` and ``TuningRun``.
    """
    probe = TuningRun(recipe, **options)
    probe.score("base", [])
    cells = []
    counts = samples or [sample_count(recipe)]
    for count, passes, rate, seed in tqdm([*product(counts, epochs, rates, seeds)], desc="tuning and scoring"):
        key = f"{rate}/{count}/{passes}/{seed}"
        if key not in probe.cache:
            chats, _ = training_data(recipe, probe.loaded.tokenizer, count, seed)
            probe.tune(chats, rate, passes, seed)
            probe.score(key, chats)
        cached = probe.cache.values[key]
        scores, (low, high) = cached["scores"], cached["scales"]
        cells.append({"rate": rate, "samples": count, "epochs": passes, "seed": seed, "scores": scores,
                      "mean": sum(scores.values()) / len(scores), "scales": [low, high],
                      "unsound": not SOUND_SCALES[0] <= low <= high <= SOUND_SCALES[1]})  # fmt: skip
    over_seeds = means_over_seeds(cells)
    best = max(over_seeds, key=lambda row: (row["mean"], -row["rate"]))
    base = probe.cache.values["base"]["scores"]
    return probe.result("sweep", base=base, cells=cells, seeds=seeds, over_seeds=over_seeds, best=best)


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


def controls(recipe: dict[str, Any], *, seeds: list[int], **options: Any) -> dict[str, Any]:
    """Score the base and the tuned model beside three controls, on validation samples.

    Controls: the tuned scales shuffled over heads, and scales tuned with the key fact, or the whole answer, of another
    sample. If the gain had another cause than the right heads and the right answers, they would show it too.

    Args:
        recipe: see ``read_recipe``.
        seeds: of data, order and shuffling.
        options: of ``TuningRun``.

    Returns:
        ``scores``: by name (``base``, ``tuned``, ``shuffled``, ``wrong facts``, ``wrong answers``) a list of scores by
        length, one entry per seed (one for base).
    """
    probe = TuningRun(recipe, **options)
    names = ("tuned", "shuffled", "wrong facts", "wrong answers")
    setting = recipe["rate"], recipe["epochs"]
    probe.score("base", [])
    for seed in tqdm(seeds, desc="controls"):
        if all(f"{seed}/{name}" in probe.cache for name in names):
            continue
        chats, facts = training_data(recipe, probe.loaded.tokenizer, None, seed)
        mistaken = wrong_facts(chats, facts, random.Random(seed))
        probe.tune(chats, *setting, seed)
        probe.score(f"{seed}/tuned", chats)
        shuffle_heads(probe.loaded.model, random.Random(seed))
        probe.score(f"{seed}/shuffled", chats)
        probe.tune(mistaken, *setting, seed)
        probe.score(f"{seed}/wrong facts", chats)
        probe.tune(wrong_answers(chats, random.Random(seed)), *setting, seed)
        probe.score(f"{seed}/wrong answers", chats)
    scores = {name: [probe.cache.values[f"{seed}/{name}"]["scores"] for seed in seeds] for name in names}
    return probe.result("controls", seeds=seeds, scores={"base": [probe.cache.values["base"]["scores"]], **scores})
