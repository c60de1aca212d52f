"""Probes that tune: learning rates against samples (paper appendix E, Table 7), and controls of the gain."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from axolotl_plugins.common.io import load_yaml
from axolotl_plugins.common.tokenizer import Messages
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.args import parse_block
from axolotl_plugins.seal.model_loading import LoadedModel, load, with_adapter
from axolotl_plugins.seal.tune import tune
from data_gen.dataset import Request, generate
from eval.controls import seal_layers, shuffle_heads, wrong_answers, wrong_facts
from eval.probe.head_importance import PROBE_SEED
from eval.result_cache import Journal
from eval.run import run


def read_recipe(file: Path) -> dict[str, Any]:
    """What a SEAL recipe says about the model, the data and the rate.

    Returns:
        ``base_model``, ``model_config``, ``chat_template`` (file or None), ``scales`` (settings of ``SealConfig``),
        ``request`` (of its data), ``rate``, ``epochs``.

    Raises:
        ValueError: it is not a recipe of SEAL that describes its data.
    """
    try:
        recipe = load_yaml(file)
        block = parse_block(recipe["seal"])
        if block.data is None or len(block.data) != 1:
            raise ValueError(f"{file}: seal.data: found {len(block.data or [])} descriptions, expected one")
        if not 0 < float(recipe["learning_rate"]) < math.inf:
            raise ValueError(f"{file}: learning_rate: found {recipe['learning_rate']}, expected a number above 0")
        return {
            "base_model": recipe["base_model"],
            "model_config": recipe.get("model_config"),
            "chat_template": recipe.get("chat_template_jinja"),
            "scales": block.adapter_settings(),
            "request": Request(**block.data[0].model_dump()),
            "rate": float(recipe["learning_rate"]),
            "epochs": int(recipe["num_epochs"]),
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a recipe with `adapter: seal` and `seal: data:` ({error!r})") from None


def load_new(recipe: dict[str, Any]) -> LoadedModel:
    """The recipe's base model with new scales, all 1."""
    loaded = load(
        recipe["base_model"], chat_template=recipe["chat_template"], model_config=recipe["model_config"]
    )  # fmt: skip
    return with_adapter(loaded, SealConfig(**recipe["scales"]))


@torch.no_grad()
def reset(model: nn.Module) -> None:
    """Set all scales to 1."""
    for layer in seal_layers(model):
        layer.seal_scale["default"].fill_(1)


def training_data(request: Request, tokenizer: Any, samples: int, seed: int) -> tuple[list[Messages], list[str]]:
    """The first ``samples`` chats of a recipe's data under a seed, and what is looked for in each answer."""
    drawn = Request(**{**vars(request), "samples": samples, "seed": seed})
    rows = list(generate(drawn, tokenizer))
    return [row["messages"] for row in rows], [row["references"][0] for row in rows]


def sweep(
    recipe: dict[str, Any], *, rates: list[float], samples: list[int], epochs: list[int], seeds: list[int],
    lengths: list[int], validation: int = 50, batch_size: int | None = None, journal: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tune with every combination and score each on fresh validation samples, which no test sample can equal.

    Args:
        recipe: see ``read_recipe``.
        rates: learning rates.
        samples: numbers of samples; fewer are the first of more.
        epochs: passes over the samples.
        seeds: of data and order.
        lengths: longest validation samples, in tokens.
        validation: samples per length.
        batch_size: prompts decoded together; None takes what memory allows.
        journal: file that keeps results while they come in.

    Returns:
        ``cells``, each with ``rate``, ``samples``, ``epochs``, ``seed``, ``scores`` (by length) and ``mean``;
        ``over_seeds``, their means over seeds by rate, samples and epochs; ``best``, the greatest of these (of equals
        the smallest rate); and what was swept.
    """
    kept = Journal(journal)
    loaded = load_new(recipe)
    cells = []
    grid = [(rate, count, passes, seed) for count in samples for passes in epochs for rate in rates for seed in seeds]
    for rate, count, passes, seed in tqdm(grid, desc="tuning and scoring"):
        key = f"{rate}/{count}/{passes}/{seed}"
        if key not in kept:
            request = recipe["request"]
            chats, _ = training_data(request, loaded.tokenizer, count, request.seed + seed)
            reset(loaded.model)
            tune(loaded.model, chats, loaded.tokenizer, lr=rate, epochs=passes, seed=seed)
            kept.add(key, validation_scores(loaded, recipe, lengths, validation, batch_size))
        scores = kept.values[key]
        cells.append({"rate": rate, "samples": count, "epochs": passes, "seed": seed, "scores": scores,
                      "mean": sum(scores.values()) / len(scores)})  # fmt: skip
    means = defaultdict(list)
    for cell in cells:
        means[cell["rate"], cell["samples"], cell["epochs"]].append(cell["mean"])
    over_seeds = [
        {"rate": rate, "samples": count, "epochs": passes, "mean": sum(values) / len(values)}
        for (rate, count, passes), values in sorted(means.items())
    ]
    return {
        "kind": "sweep", "model": loaded.name, "base_model": loaded.base, "method": loaded.method,
        "task": recipe["request"].task, "lengths": lengths, "validation_samples": validation, "cells": cells,
        "seeds": seeds, "over_seeds": over_seeds, "best": max(over_seeds, key=lambda one: (one["mean"], -one["rate"])),
    }  # fmt: skip


def validation_scores(
    loaded: LoadedModel, recipe: dict[str, Any], lengths: list[int], samples: int, batch_size: int | None
) -> dict[str, float]:
    """Score by length on samples of the training split under a seed that nothing is trained on."""
    haystack = recipe["request"].haystack
    found = run(loaded, recipe["request"].task, lengths=lengths, samples=samples, seed=PROBE_SEED, split="train",
                haystack=haystack, batch_size=batch_size)  # fmt: skip
    return {str(score["length"]): score["score"] for score in found["scores"]}


def controls(
    recipe: dict[str, Any], *, seeds: list[int], lengths: list[int], validation: int = 50,
    batch_size: int | None = None, journal: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Base and tuned beside three controls, on validation samples.

    Controls: the tuned scales shuffled over heads, and scales tuned with the key fact, or the whole answer, of another
    sample. If the gain came from anything but the right heads and the right answers, they would show it too.

    Args:
        recipe: see ``read_recipe``.
        seeds: of data, order and shuffling.
        lengths: longest validation samples, in tokens.
        validation: samples per length.
        batch_size: prompts decoded together; None takes what memory allows.
        journal: file that keeps results while they come in.

    Returns:
        ``scores``: by name (``base``, ``tuned``, ``shuffled``, ``wrong facts``, ``wrong answers``) a list of scores by
        length, one entry per seed (one for base).
    """
    kept = Journal(journal)
    loaded = load_new(recipe)

    def scored(key: str) -> dict[str, float]:
        if key not in kept:
            kept.add(key, validation_scores(loaded, recipe, lengths, validation, batch_size))
        return kept.values[key]

    scores: dict[str, list[dict[str, float]]] = {
        "base": [scored("base")],
        "tuned": [],
        "shuffled": [],
        "wrong facts": [],
        "wrong answers": [],
    }
    settings = {"lr": recipe["rate"], "epochs": recipe["epochs"]}
    for seed in tqdm(seeds, desc="controls"):
        if f"{seed}/wrong answers" not in kept:
            request = recipe["request"]
            chats, facts = training_data(request, loaded.tokenizer, request.samples, request.seed + seed)
            reset(loaded.model)
            tune(loaded.model, chats, loaded.tokenizer, seed=seed, **settings)
            scored(f"{seed}/tuned")
            shuffle_heads(loaded.model, random.Random(seed))
            scored(f"{seed}/shuffled")
            for name, taught in (
                ("wrong facts", wrong_facts(chats, facts, random.Random(seed))),
                ("wrong answers", wrong_answers(chats, random.Random(seed))),
            ):
                reset(loaded.model)
                tune(loaded.model, taught, loaded.tokenizer, seed=seed, **settings)
                scored(f"{seed}/{name}")
        for name in list(scores)[1:]:
            scores[name].append(kept.values[f"{seed}/{name}"])
    return {
        "kind": "controls", "model": loaded.name, "base_model": loaded.base, "method": loaded.method,
        "task": recipe["request"].task, "lengths": lengths, "validation_samples": validation, "seeds": seeds,
        "scores": scores,
    }  # fmt: skip
