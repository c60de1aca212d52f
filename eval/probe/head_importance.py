"""Maps of heads and channels: what removing each of them does to a task at several lengths (paper Figures 2b and 2d).

A removal map is exact: every variant answers every prompt. A gradient map predicts all variants at once from one pass
forward and one backward per prompt. Both hold, for every length, the change of the score where they know it and the
change of the reference answer's log-probability; positive means that removal helps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from axolotl_plugins.seal.model_loading import LoadedModel
from axolotl_plugins.seal.tune import answer_loss, encode
from data_gen.dataset import Request, generate
from eval.generation import stop_ids
from eval.metrics import METRICS
from eval.probe.ablation import HeadAblator
from eval.probe.hooks import Block, blocks, probing, wrapped
from eval.result_cache import Journal
from eval.scoring import answer_budget

# Probes look at samples of the training split under a seed that nothing is trained on: test samples stay unseen.
PROBE_SEED = 9000
Unit = Literal["head", "channel"]


@dataclass(frozen=True)
class Prompt:
    """One sample ready for a model.

    Attributes:
        key: length and index, as ``512/3``.
        length: longest sample asked for, in tokens.
        ids: of the prompt.
        reference: of the reference answer with what ends it.
        references: what the scorer looks for.
    """

    key: str
    length: int
    ids: list[int]
    reference: list[int]
    references: list[str]


def prompts(loaded: LoadedModel, task: str, lengths: list[int], samples: int, seed: int) -> Iterator[Prompt]:
    """Samples of the training split, in the order of lengths.

    Raises:
        ValueError: the task is not one of ``METRICS``, a length does not fit into the window, or see
            ``LoadedModel.check_room``.
    """
    if task not in METRICS:
        raise ValueError(f"task: found {task!r}, expected one of {', '.join(METRICS)}")
    if max(lengths) > loaded.window:
        raise ValueError(f"lengths: {max(lengths)} tokens do not fit into the model's window of {loaded.window}")
    budget = answer_budget(task)
    for length in lengths:
        for sample in generate(Request(task, str(length), samples=samples, seed=seed), loaded.tokenizer):
            ids, start = encode(sample["messages"], loaded.tokenizer)
            row = ids[0].tolist()
            loaded.check_room(start, budget)
            yield Prompt(f"{length}/{sample['index']}", length, row[:start], row[start:], sample["references"])


def variants(block: Block, layer: int, unit: Unit, heads: list[tuple[int, int]] | None) -> torch.Tensor:
    """Scales that remove every head of a layer, or every channel of the chosen heads in it: shape (N, C)."""
    if unit == "head":
        return torch.stack([block.without_head(head) for head in range(block.heads)])
    size = block.channels // block.heads
    channels = [head * size + place for at, head in heads or [] if at == layer for place in range(size)]
    scales = torch.ones(len(channels), block.channels)
    scales[range(len(channels)), channels] = 0
    return scales


def removal_map(
    loaded: LoadedModel, task: str, lengths: list[int], *, samples: int = 50, seed: int = PROBE_SEED,
    heads: list[tuple[int, int]] | None = None, batch: int = 8, journal: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Remove every head, or every channel of some heads, one at a time, and score the answers.

    Args:
        loaded: the model; an adapter stays applied.
        task: one of ``METRICS``.
        lengths: longest samples, in tokens.
        samples: per length.
        seed: of the samples, from the training split.
        heads: (layer, head) whose channels are removed one by one; None removes whole heads.
        batch: variants that go through the model together.
        journal: file that keeps results while they come in.

    Returns:
        See ``result``; ``score`` and ``logprob`` are the unchanged model's.

    Raises:
        ValueError: see ``prompts`` and ``anatomy.blocks``, or there is no such head.
    """
    start = time.perf_counter()
    model = wrapped(loaded.model)
    found = blocks(model)
    unit: Unit = "head" if heads is None else "channel"
    for layer, head in heads or ():
        if not (0 <= layer < len(found) and 0 <= head < found[layer].heads):
            raise ValueError(
                f"heads: L{layer}H{head} is not in a model of {len(found)} layers x {found[0].heads} heads"
            )
    every = list(prompts(loaded, task, lengths, samples, seed))
    remover = HeadAblator(model, stop_ids(loaded.model, loaded.tokenizer), answer_budget(task), batch)
    layers = range(len(found)) if heads is None else sorted({layer for layer, _ in heads})
    scales = {layer: variants(found[layer], layer, unit, heads) for layer in layers}
    kept = Journal(journal)
    spent = kept.values.get("seconds", 0.0)  # by a run that was cut off

    def score(ids: list[int], prompt: Prompt) -> float:
        return METRICS[task](loaded.tokenizer.decode(ids, skip_special_tokens=True), prompt.references)

    for prompt in tqdm(every, desc=f"removing {unit}s"):
        if f"{prompt.key}/{layers[-1]}" in kept:
            continue
        reading = remover.read(prompt.ids, prompt.reference)
        kept.add(prompt.key, [score(reading.answer.ids, prompt), reading.answer.logprob])
        for layer in layers:
            answers = remover.variants(reading, layer, scales[layer])
            kept.add(f"{prompt.key}/{layer}", [[score(one.ids, prompt), one.logprob] for one in answers])
        kept.add("seconds", spent + time.perf_counter() - start)
    base: dict[str, Any] = {"score": {}, "logprob": {}}
    change: dict[str, Any] = {"score": {}, "logprob": {}}
    for place, what in enumerate(("score", "logprob")):
        for length in lengths:
            keys = [prompt.key for prompt in every if prompt.length == length]
            base[what][length] = float(np.mean([kept.values[key][place] for key in keys]))
            change[what][length] = [
                np.mean(
                    [np.array(kept.values[f"{key}/{layer}"])[:, place] - kept.values[key][place] for key in keys],
                    axis=0,
                ).tolist()
                for layer in layers
            ]
    if heads is not None:
        for what in change:
            change[what] = {length: by_head(rows, layers, heads) for length, rows in change[what].items()}
    seconds = spent + time.perf_counter() - start
    return result(loaded, task, lengths, samples, seed, "removal", unit, base, change, seconds)


def by_head(rows: list[list[float]], layers: Any, heads: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Values of all channels of a layer's chosen heads, one after the other, as one list for each head."""
    found = {}
    for layer, row in zip(layers, rows, strict=True):
        mine = [head for at, head in heads if at == layer]
        for head, part in zip(mine, np.split(np.array(row), len(mine)), strict=True):
            found[f"L{layer}H{head}"] = part.tolist()
    return found


def gradient_map(
    loaded: LoadedModel, task: str, lengths: list[int], *, samples: int = 50, seed: int = PROBE_SEED,
    points: tuple[float, ...] = (1.0,), journal: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Predict what removing every head does from the gradient of the answer's loss with respect to all scales.

    Removing head h is the step from s_h = 1 to 0, so to first order the log-probability changes by minus its gradient
    times 1. A head's gradient is the sum of its channels'. Slopes of prompts cancel in a mean where removal breaks
    every one of them, so the map also holds their mean size (Michel et al. 2019, equation 2): how much a head matters,
    not whether its removal helps.

    Args:
        loaded: the model; an adapter stays applied.
        task: one of ``METRICS``.
        lengths: longest samples, in tokens.
        samples: per length.
        seed: of the samples, from the training split.
        points: common scales of all heads at which gradients are taken and averaged; more than one makes it a path
            integral (integrated gradients, Sundararajan et al. 2017) at so many times the cost.
        journal: file that keeps results while they come in.

    Returns:
        See ``result``; its measures are ``logprob`` and ``importance`` (minus the mean size of a head's gradient), and
        beside ``change`` it has ``channels``: the change of ``logprob`` by channel.
    """
    start = time.perf_counter()
    model = wrapped(loaded.model)
    found = blocks(model)
    kept = Journal(journal)
    spent = kept.values.get("seconds", 0.0)  # by a run that was cut off
    every = list(prompts(loaded, task, lengths, samples, seed))
    for prompt in tqdm(every, desc="gradients"):
        if prompt.key in kept:
            continue
        ids = torch.tensor([prompt.ids + prompt.reference], device=loaded.model.device)
        total = [torch.zeros(block.channels) for block in found]
        logprob = 0.0
        for point in points:
            scales = [
                torch.full((block.channels,), point, device=ids.device, requires_grad=True) for block in found
            ]  # fmt: skip
            with contextlib.ExitStack() as stack:
                for block, scale in zip(found, scales, strict=True):
                    stack.enter_context(probing(block.projection, scale))
                loss = answer_loss(model, ids, len(prompt.ids))
                gradients = torch.autograd.grad(loss, scales)
            # Removal is a step of -1; what lowers the loss raises the log-probability.
            total = [a + g.cpu() / len(points) for a, g in zip(total, gradients, strict=True)]
            logprob -= loss.item() / len(points)
        kept.add(prompt.key, [logprob, [one.tolist() for one in total]])
        kept.add("seconds", spent + time.perf_counter() - start)
    base: dict[str, Any] = {"logprob": {}}
    heads: dict[str, Any] = {"logprob": {}, "importance": {}}
    channels: dict[str, Any] = {"logprob": {}}
    for length in lengths:
        rows = [kept.values[prompt.key] for prompt in every if prompt.length == length]
        base["logprob"][length] = float(np.mean([row[0] for row in rows]))
        slopes = np.array([row[1] for row in rows])
        by_prompt = slopes.reshape(len(rows), len(found), found[0].heads, -1).sum(-1)
        channels["logprob"][length] = slopes.mean(0).tolist()
        heads["logprob"][length] = by_prompt.mean(0).tolist()
        heads["importance"][length] = (-np.abs(by_prompt).mean(0)).tolist()
    seconds = spent + time.perf_counter() - start
    out = result(loaded, task, lengths, samples, seed, "gradient", "head", base, heads, seconds)
    return {**out, "points": list(points), "channels": channels}


def result(
    loaded: LoadedModel, task: str, lengths: list[int], samples: int, seed: int, kind: str, unit: Unit,
    base: dict[str, Any], change: dict[str, Any], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """A map as it is saved.

    Returns:
        ``kind`` (removal or gradient), ``unit`` (head or channel), what was probed, ``base`` and ``change``: by measure
        and length; a change has the shape (layers, heads), or for channels one list per head.
    """
    text = lambda values: {  # noqa: E731 - keys as JSON has them
        what: {str(length): found for length, found in by_length.items()} for what, by_length in values.items()
    }
    return {
        "kind": kind, "unit": unit, "model": loaded.name, "base_model": loaded.base, "method": loaded.method,
        "task": task, "lengths": lengths, "samples": samples, "seed": seed, "base": text(base), "change": text(change),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def changes(found: dict[str, Any], length: int, measure: str | None = None) -> np.ndarray:
    """A map's changes at a length, shape (layers, heads); by default of the score, or of the log-probability.

    Raises:
        ValueError: the map is not of heads, or does not know the length.
    """
    if found["unit"] != "head":
        raise ValueError("map: it is of channels, expected one of heads")
    measure = measure or ("score" if "score" in found["change"] else "logprob")
    by_length = found["change"][measure]
    if str(length) not in by_length:
        raise ValueError(f"map: it has lengths {', '.join(by_length)}, not {length}")
    return np.array(by_length[str(length)])


def agreement(exact: dict[str, Any], predicted: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Spearman's correlation over all heads between an exact map and a predicted one.

    Returns:
        Measure of the predicted map -> measure of the exact one -> length -> correlation.
    """
    from scipy.stats import spearmanr

    return {
        mine: {
            theirs: {
                str(n): float(
                    spearmanr(changes(exact, n, theirs).ravel(), changes(predicted, n, mine).ravel()).statistic
                )
                for n in exact["lengths"]
            }
            for theirs in exact["change"]
        }
        for mine in predicted["change"]
    }


def quadrants(found: dict[str, Any]) -> np.ndarray:
    """The quadrant of every head in the plane of its changes at a map's first and last length (paper Figure 2b).

    Returns:
        Integers of shape (layers, heads): 1 where removal helps at both lengths, 3 where it hurts at both, 2 where it
        helps at the longer alone, 4 where it helps at the shorter alone, 0 on an axis.
    """
    mid, long = (changes(found, found["lengths"][place]) for place in (0, -1))
    return np.select(
        [(mid > 0) & (long > 0), (mid < 0) & (long > 0), (mid < 0) & (long < 0), (mid > 0) & (long < 0)],
        [1, 2, 3, 4],
        0,
    )
