"""Importance of heads and channels: how ablating each changes a task's scores by length (paper Figures 2b and 2d).

An ablation map is exact: every ablated model answers every prompt. A gradient map predicts all ablations from one
forward and one backward pass per prompt, or from a few. Both hold, for every length, the change of the score where they
know it and the change of the reference answer's log-probability; positive means that ablation helps.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from axolotl_plugins.common.io import load_json
from axolotl_plugins.seal.model_loading import LoadedModel
from axolotl_plugins.seal.tune import answer_loss
from data_gen.dataset import Request, samples_by_length
from data_gen.tasks import Task
from eval.generation import stop_ids
from eval.probe.ablation import Answer, HeadAblator
from eval.probe.hooks import Block, decoder_blocks, scaled_input, wrap
from eval.results import same_model
from eval.resume import Journal
from eval.score_samples import prompt_and_answer, truncate_at
from eval.spec import scored_task

# Probes read samples of the training split under a seed that nothing is trained on: test samples stay unseen.
PROBE_SEED = 9000
Unit = Literal["head", "channel"]
MEASURES = {"logprob": "log-probability of the answer", "score": "score"}


@dataclass(frozen=True)
class Prompt:
    """One encoded sample.

    Attributes:
        key: length and index, as ``512/3``.
        length: longest sample requested, in tokens.
        ids: of the prompt, with the prefix of the answer where a task has one.
        reference: of the reference answer with the token that ends it.
        references: what the metric looks for.
    """

    key: str
    length: int
    ids: list[int]
    reference: list[int]
    references: list[str]


def probe_prompts(
    loaded: LoadedModel, task: Task, lengths: list[int] | None, samples: int | None, seed: int
) -> list[Prompt]:
    """Return samples of the training split, or of a file, in the order of lengths.

    Raises:
        ValueError: a length does not fit into the window, or see ``samples_by_length`` and ``LoadedModel.check_room``.
    """
    if task.rows is None:
        loaded.check_lengths(lengths)
    prompts = []
    for sample in samples_by_length(task, loaded.tokenizer, lengths, samples, seed=seed):
        ids, reference = prompt_and_answer(loaded.tokenizer, sample)
        length = sample["length"]
        loaded.check_room(len(ids), task.answer_budget)
        prompts.append(Prompt(f"{length}/{sample['index']}", length, ids, reference, sample["references"]))
    return prompts


def check_heads(heads: Iterable[tuple[int, int]], layers: int, per_layer: int) -> None:
    """Raise ValueError unless every (layer, head) is one of a model's."""
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < per_layer):
            raise ValueError(f"heads: L{layer}H{head} is not in a model of {layers} layers x {per_layer} heads")


def ablation_scales(block: Block, layer: int, heads: list[tuple[int, int]] | None) -> torch.Tensor:
    """Return scales that ablate each head of a layer, or each channel of the chosen heads in it: shape (N, C)."""
    if heads is None:
        return torch.stack([block.without_head(head) for head in range(block.heads)])
    size = block.channels // block.heads
    channels = [head * size + i for head_layer, head in heads if head_layer == layer for i in range(size)]
    scales = torch.ones(len(channels), block.channels)
    scales[range(len(channels)), channels] = 0
    return scales


class MapRun:
    """A map in progress: its prompts, cached values, and the seconds it took, those of an interrupted run included.

    Args:
        loaded: the model; an adapter stays applied.
        task: see ``scored_task``.
        lengths: see ``samples_by_length``.
        samples: see ``samples_by_length``.
        journal: file that caches results, from which an interrupted run resumes.

    Raises:
        ValueError: see ``probe_prompts`` and ``hooks.decoder_blocks``.
    """

    def __init__(
        self, loaded: LoadedModel, task: str | Task, lengths: list[int] | None = None, *, samples: int | None = None,
        journal: Path | None = None,
    ) -> None:  # fmt: skip
        self.start = time.perf_counter()
        self.loaded, self.task = loaded, scored_task(task)
        self.model = wrap(loaded.model)
        self.blocks = decoder_blocks(self.model)
        self.prompts = probe_prompts(loaded, self.task, lengths, samples, PROBE_SEED)
        self.lengths = list(dict.fromkeys(prompt.length for prompt in self.prompts))
        self.cache = Journal(journal)
        self.spent = self.cache.values.get("seconds", 0.0)

    def seconds(self) -> float:
        """Return the seconds since the start, and before it."""
        return self.spent + time.perf_counter() - self.start

    def result(self, kind: str, unit: Unit, base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
        """Return the map as it is stored.

        Returns:
            ``kind`` (ablation or gradient), ``unit`` (head or channel), what was probed, ``base`` and ``change``: by
            measure and length; a change has the shape (layers, heads), or for channels one list per head.
        """
        loaded = self.loaded
        samples = max(Counter(prompt.length for prompt in self.prompts).values())
        return {
            "kind": kind, "unit": unit, "model": loaded.name, "base_model": loaded.base, "method": loaded.method,
            "dtype": loaded.dtype, "task": self.task.key, "title": self.task.title, "lengths": self.lengths,
            "samples": samples, "seed": PROBE_SEED, "base": base, "change": change,
            "seconds": round(self.seconds(), 1),
        }  # fmt: skip


def ablation_map(
    probe: MapRun, *, heads: list[tuple[int, int]] | None = None, batch: int = 8, score: bool = True
) -> dict[str, Any]:
    """Ablate every head, or every channel of some heads, one at a time, and score the answers.

    Args:
        probe: what to probe.
        heads: (layer, head) whose channels are ablated one by one; None ablates whole heads.
        batch: ablations per batch.
        score: decode answers and score them; else the log-probability of the reference answer is the only measure.

    Returns:
        See ``MapRun.result``. Models with a sliding window decode their answers, so that they have a score only.

    Raises:
        ValueError: there is no such head; or see ``HeadAblator``.
    """
    blocks, cache, tokenizer = probe.blocks, probe.cache, probe.loaded.tokenizer
    unit: Unit = "head" if heads is None else "channel"
    check_heads(heads or (), len(blocks), blocks[0].heads)
    budget = probe.task.answer_budget if score else 0
    ablator = HeadAblator(probe.model, stop_ids(probe.loaded.model, tokenizer), budget, batch)
    layers = list(range(len(blocks))) if heads is None else sorted({layer for layer, _ in heads})
    scales = {layer: ablation_scales(blocks[layer], layer, heads) for layer in layers}

    def row(answer: Answer, prompt: Prompt) -> list[float]:
        logprob = [answer.logprob] if ablator.drafts else []
        if not score:
            return logprob
        text = truncate_at(tokenizer.decode(answer.ids, skip_special_tokens=True), list(probe.task.stop))
        return [*logprob, probe.task.score(text, prompt.references)]

    for prompt in tqdm(probe.prompts, desc=f"ablating {unit}s"):
        if f"{prompt.key}/{layers[-1]}" in cache:
            continue
        trace = ablator.prefill(prompt.ids, prompt.reference)
        cache.add(prompt.key, row(trace.answer, prompt))
        for layer in layers:
            answers = ablator.ablate(trace, layer, scales[layer])
            cache.add(f"{prompt.key}/{layer}", [row(answer, prompt) for answer in answers])
        cache.add("seconds", probe.seconds())
    base, change = ablation_means(probe, layers, ["logprob"] * ablator.drafts + ["score"] * score)
    if heads is not None:
        for measure in change:
            change[measure] = {length: by_head(rows, layers, heads) for length, rows in change[measure].items()}
    return probe.result("ablation", unit, base, change)


def ablation_means(probe: MapRun, layers: list[int], measures: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return means over prompts, by measure and length: of the unchanged model, and changes by layer and ablation."""
    base: dict[str, Any] = {measure: {} for measure in measures}
    change: dict[str, Any] = {measure: {} for measure in measures}
    for length in probe.lengths:
        keys = [prompt.key for prompt in probe.prompts if prompt.length == length]
        own = np.array([probe.cache.values[key] for key in keys])  # prompts, measures
        ablated = [np.array([probe.cache.values[f"{key}/{layer}"] for key in keys]) for layer in layers]
        for column, measure in enumerate(base):
            base[measure][str(length)] = float(own[:, column].mean())
            change[measure][str(length)] = [
                (rows[:, :, column] - own[:, None, column]).mean(0).tolist() for rows in ablated
            ]
    return base, change


def by_head(rows: list[list[float]], layers: list[int], heads: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Split each layer's row, the channels of its chosen heads one after the other, into a list per head."""
    channels = {}
    for layer, row in zip(layers, rows, strict=True):
        in_layer = [head for head_layer, head in heads if head_layer == layer]
        for head, part in zip(in_layer, np.split(np.array(row), len(in_layer)), strict=True):
            channels[f"L{layer}H{head}"] = part.tolist()
    return channels


def gradient_map(probe: MapRun, *, points: tuple[float, ...] = (1.0,), groups: int = 1) -> dict[str, Any]:
    """Predict the effect of ablating every head from the gradient of the answer's loss with respect to all scales.

    Ablating head h is the step from s_h = 1 to 0, so to first order the log-probability changes by minus its
    gradient times 1. Effects that saturate show only at scales below 1, at which a model with all heads scaled
    fails: so heads are scaled in random groups, in another partition for each prompt. A head's gradient is the sum
    of its channels'. Gradients of prompts cancel in a mean where ablation breaks every one of them, so the map also
    holds their mean magnitude (Michel et al. 2019, equation 2): how much a head matters, not whether its ablation
    helps.

    Args:
        probe: what to probe.
        points: common scales of a group at which its gradients are taken and averaged; more than one makes it a path
            integral (integrated gradients, Sundararajan et al. 2017) at so many times the cost.
        groups: partition of the heads; of one group after the other scales are at a point, those of all others are 1,
            at so many times the cost.

    Returns:
        See ``MapRun.result``; its measures are ``logprob`` (``base``: the mean over all passes) and ``importance``
        (minus the mean magnitude of a head's gradient).

    Raises:
        ValueError: there are more groups than heads.
    """
    blocks, cache = probe.blocks, probe.cache
    if groups > (heads := len(blocks) * blocks[0].heads):
        raise ValueError(f"groups: found {groups}, expected at most {heads}, the model's heads")
    for prompt in tqdm(probe.prompts, desc="gradients"):
        if prompt.key not in cache:
            cache.add(prompt.key, prompt_gradient(probe.model, blocks, prompt, points, groups))
            cache.add("seconds", probe.seconds())
    base: dict[str, Any] = {"logprob": {}}
    change: dict[str, Any] = {"logprob": {}, "importance": {}}
    for length in probe.lengths:
        rows = [cache.values[prompt.key] for prompt in probe.prompts if prompt.length == length]
        base["logprob"][str(length)] = float(np.mean([row[0] for row in rows]))
        gradients = np.array([row[1] for row in rows])
        heads = gradients.reshape(len(rows), len(blocks), blocks[0].heads, -1).sum(-1)
        change["logprob"][str(length)] = heads.mean(0).tolist()
        change["importance"][str(length)] = (-np.abs(heads).mean(0)).tolist()
    return {**probe.result("gradient", "head", base, change), "points": list(points), "groups": groups}


def prompt_gradient(
    model: Any, blocks: list[Block], prompt: Prompt, points: tuple[float, ...], groups: int
) -> list[Any]:
    """Return the mean over passes of an answer's log-probability, and minus its gradient, lists by layer.

    A head's gradient is the mean over the points of its group, see ``gradient_map``.
    """
    ids = torch.tensor([prompt.ids + prompt.reference], device=model.device)
    layers, per_layer, channels = len(blocks), blocks[0].heads, blocks[0].channels
    heads = layers * per_layer
    order = random.Random(f"{PROBE_SEED}/{prompt.key}").sample(range(heads), heads)
    total = torch.zeros(layers, channels)
    logprob = 0.0
    for group, point in itertools.product(range(groups), points):
        chosen = torch.zeros(heads, dtype=torch.bool)
        chosen[order[group::groups]] = True
        of_channels = chosen.view(layers, per_layer).repeat_interleave(channels // per_layer, 1)
        start = torch.where(of_channels, point, 1.0).to(ids.device)
        scales = [row.clone().requires_grad_() for row in start]
        with contextlib.ExitStack() as stack:
            for block, scale in zip(blocks, scales, strict=True):
                stack.enter_context(scaled_input(block.projection, scale))
            loss = answer_loss(model, ids, len(prompt.ids))
            gradients = torch.stack(torch.autograd.grad(loss, scales)).cpu()
        # Ablation is a step of -1; what lowers the loss raises the log-probability.
        total += torch.where(of_channels, gradients, 0) / len(points)
        logprob -= loss.item() / (len(points) * groups)
    return [logprob, total.tolist()]


def read_map(file: Path, model: str) -> dict[str, Any]:
    """Read a map of a model's heads that ``probe heads`` or ``probe gradient`` wrote.

    Raises:
        ValueError: the file holds anything else, or a map of another model.
    """
    try:
        head_map = load_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as a map ({error})") from None
    is_map = isinstance(head_map, dict) and head_map.get("kind") in ("ablation", "gradient")
    if not is_map or head_map.get("unit") != "head":
        raise ValueError(f"{file}: not a map of heads: make one with `seal probe heads`")
    if not same_model(str(head_map.get("model")), model):
        raise ValueError(f"{file}: a map of {head_map.get('model')}, expected one of {model}: make it with "
                         f"`seal probe heads --model {model}`")  # fmt: skip
    return head_map


def measure_of(result: dict[str, Any]) -> str:
    """Return the measure by which a map is shown: score for heads, log-probability for channels, else the known one.

    A single channel seldom changes a score.
    """
    order = ("score", "logprob") if result["unit"] == "head" else ("logprob", "score")
    return next(measure for measure in order if measure in result["change"])


def changes(head_map: dict[str, Any], length: int, measure: str | None = None) -> np.ndarray:
    """Return a map's changes at a length, shape (layers, heads); by default of ``measure_of``.

    Raises:
        ValueError: the map is not of heads, or lacks the length.
    """
    if head_map["unit"] != "head":
        raise ValueError("map: it is of channels, expected one of heads")
    by_length = head_map["change"][measure or measure_of(head_map)]
    if str(length) not in by_length:
        raise ValueError(f"map: it has lengths {', '.join(by_length)}, not {length}")
    return np.array(by_length[str(length)])


def check_comparable(exact: dict[str, Any], task: Task, lengths: list[int] | None, samples: int | None) -> None:
    """Raise ValueError unless a stored map is an exact one of a task, lengths and samples; None means all of a file."""
    if exact["kind"] != "ablation":
        raise ValueError("compare: found a map of gradients, expected an exact one: make it with `seal probe heads`")
    drawn = Request.samples if task.rows is None else None
    for key, value in {"lengths": lengths, "task": task.key, "samples": samples or drawn}.items():
        if value and exact.get(key) != value:
            raise ValueError(
                f"compare: the map's {key}: found {exact.get(key)}, expected {value}: use the same options"
            )


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Compute Spearman's correlation over all heads, of two arrays of shape (layers, heads); nan if one is constant."""
    from scipy.stats import spearmanr

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first.ravel(), second.ravel()).statistic)


def agreement(exact: dict[str, Any], predicted: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Compute Spearman's correlation over all heads between an exact map and a predicted one.

    Returns:
        Measure of the predicted map -> measure of the exact one -> length -> correlation, without lengths at which
        it is not defined because all changes are equal.
    """

    def correlations(exact_measure: str, predicted_measure: str) -> dict[str, float]:
        values = {
            str(length): spearman(changes(exact, length, exact_measure), changes(predicted, length, predicted_measure))
            for length in exact["lengths"]
        }
        return {length: value for length, value in values.items() if np.isfinite(value)}

    return {
        predicted_measure: {
            exact_measure: correlations(exact_measure, predicted_measure) for exact_measure in exact["change"]
        }
        for predicted_measure in predicted["change"]
    }


def head_quadrants(head_map: dict[str, Any]) -> np.ndarray:
    """Return the quadrant of every head in the plane of its changes at a map's first and last length (Figure 2b).

    Returns:
        Integers of shape (layers, heads): 1 where ablation helps at both lengths, 3 where it hurts at both, 2 where it
        helps at the longer alone, 4 where it helps at the shorter alone, 0 on an axis.
    """
    mid, long = (changes(head_map, head_map["lengths"][i]) for i in (0, -1))
    return np.select(
        [(mid > 0) & (long > 0), (mid < 0) & (long > 0), (mid < 0) & (long < 0), (mid > 0) & (long < 0)],
        [1, 2, 3, 4],
        0,
    )
