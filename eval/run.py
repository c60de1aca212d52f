"""Scores a model on a task over lengths, with lm-eval as the harness."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm

from axolotl_plugins.common.io import write_text
from axolotl_plugins.seal.model_loading import LoadedModel
from axolotl_plugins.seal.provenance import text_hash
from data_gen.dataset import Request
from data_gen.tasks import Split
from eval.generation import generate_answers, stop_ids
from eval.lm_eval_task import lm_eval_task
from eval.metrics import METRICS, wilson
from eval.result_cache import Journal

# What a result keeps of a sample.
KEPT = ("length", "index", "tokens", "depth", "line", "key", "haystack_repeats", "references")
# The paper scores a 32K window at 9K, 14K, 19K, 23K, 28K and 31K (Table 1): these shares of a window.
PAPER_LENGTHS = (9 / 32, 14 / 32, 19 / 32, 23 / 32, 28 / 32, 31 / 32)


class Responses(Journal):
    """Responses by prompt, with the method that lm-eval calls for every one of them."""

    @staticmethod
    def key(request: tuple[str, dict[str, Any]]) -> str:
        """Identifies a prompt and how it is to be answered."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def add_partial(self, kind: str, request: tuple[str, dict[str, Any]], response: str) -> None:
        """What lm-eval calls."""
        self.add(self.key(request), response)


class Harness(HFLM):
    """lm-eval's Hugging Face model, which refuses prompts that do not fit instead of cutting them.

    It decodes as ``eval.generation`` does, ``prompts_together`` at a time, and keeps responses in its ``journal``.
    Samples in ``refused`` (hashes of prompts) are not answered.
    """

    loaded: LoadedModel
    journal: Responses
    prompts_together: int | None = None
    refused: frozenset[str] = frozenset()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Check every prompt, then answer those that the journal has no answer to.

        Raises:
            ValueError: the model was tuned on the sample, or see ``LoadedModel.check_room``.
        """
        if self.refused and (count := sum(was_seen(request.doc, self.refused) for request in requests)):
            raise ValueError(
                f"{count} of {len(requests)} samples are in the model's training data: score it on others (--seed), or "
                "add --allow-contamination, which the result will say"
            )
        for request in requests:
            self.loaded.check_room(len(self.tok_encode(request.args[0])), request.args[1]["max_gen_toks"])
        self.cache_hook = self.journal
        if todo := [request for request in requests if self.journal.key(request.args) not in self.journal]:
            self.answer_all(todo, disable_tqdm)
        return [self.journal.values[self.journal.key(request.args)] for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Check every context with its continuation, then score them.

        Raises:
            ValueError: one does not fit into the window.
        """
        longest = max((len(context) + len(rest) for _, context, rest in requests), default=0)
        if longest > self.max_length + 1:  # the last token is only predicted
            raise ValueError(f"a prompt of {longest} tokens does not fit into the model's window of {self.max_length}")
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def answer_all(self, requests: list[Instance], disable_tqdm: bool) -> None:
        """Answer requests into the journal, together those with the same settings and RoPE frequencies."""
        groups = defaultdict(list)
        short = self.loaded.short_window or 0
        for request in requests:
            prompt = self.tok_encode(request.args[0])
            groups[json.dumps(request.args[1], sort_keys=True), len(prompt) > short].append((request, prompt))
        with tqdm(total=len(requests), desc="prompts", disable=disable_tqdm) as bar:
            for pairs in groups.values():
                group, prompts = map(list, zip(*pairs, strict=True))
                self.answer_group(group, prompts, bar)

    def answer_group(self, requests: list[Instance], prompts: list[list[int]], bar: tqdm) -> None:
        """Answer requests that have the same settings into the journal."""
        settings = requests[0].args[1]

        def text_of(ids: list[int]) -> str:
            return postprocess_generated_text(self.tok_decode(ids), settings["until"], None)

        def on_answer(index: int, ids: list[int]) -> None:
            self.journal.add_partial("generate_until", requests[index].args, text_of(ids))
            bar.update()

        def ends(ids: list[int]) -> bool:
            return bool(settings["until"]) and text_of(ids) != self.tok_decode(ids)

        generate_answers(
            self.model, prompts, max_new_tokens=settings["max_gen_toks"], stop=stop_ids(self.model, self.tokenizer),
            ends=ends, batch_size=self.prompts_together, on_answer=on_answer,
        )  # fmt: skip


def harness_for(
    loaded: LoadedModel, batch_size: int | None, journal: Path | None, *, add_bos_token: bool = False
) -> Harness:
    """What lets a model answer: itself, or the server that has it.

    Args:
        loaded: the model.
        batch_size: prompts decoded together; None takes what memory allows.
        journal: see ``run``.
        add_bos_token: for prompts without a chat template, which otherwise says whether there is one.
    """
    from eval.vllm_backend import Served, ServedHarness

    harness = (ServedHarness if isinstance(loaded, Served) else Harness)(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=loaded.window, batch_size=batch_size or 1,
        add_bos_token=add_bos_token,
    )  # fmt: skip
    harness.loaded = loaded
    harness.prompts_together = batch_size
    harness.journal = Responses(journal)
    return harness


def was_seen(document: dict[str, Any], texts: frozenset[str]) -> bool:
    """Whether a sample's prompt is among texts, given by their hashes."""
    return text_hash(document["messages"][0]["content"]) in texts


def default_lengths(window: int, answer: int = 128) -> list[int]:
    """Lengths in tokens that lie in a window as the paper's lie in 32K, with room for the answer."""
    return sorted({min(int(window * share), window - answer) for share in PAPER_LENGTHS})


def run(
    loaded: LoadedModel, task: str, *, lengths: list[int] | None = None, samples: int = 50, seed: int = 0,
    split: Split = "test", shots: int = 0, shot_tokens: int = 1000, haystack: str | None = None,
    depths: int | None = None, cases: str | None = None, batch_size: int | None = None, journal: Path | None = None,
    allow_contamination: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score a model.

    Args:
        loaded: the model with its tokenizer.
        task: one of ``METRICS``.
        lengths: longest samples, in tokens; None means ``default_lengths``.
        samples: per length.
        seed: of the samples.
        split: ``train`` with a seed that was not trained on gives validation data.
        shots: worked examples before every prompt (paper section 8: one).
        shot_tokens: longest example, in tokens (paper section 8: 1K).
        haystack: see ``data_gen.dataset.Request``.
        depths: see ``data_gen.dataset.Request``.
        cases: folder of LongEval's published line cases, scored instead of samples of ours; ``samples`` of each file.
        batch_size: prompts decoded together; None takes what memory allows.
        journal: file that keeps responses while they come in; a run that was cut off goes on from it.
        allow_contamination: also score samples that the model was tuned on.

    Returns:
        ``model``, ``base``, ``method``, ``task``, ``window``, ``seed``, ``shots``; ``contaminated``, how many samples
        the model was tuned on, None where that is not known; ``scores``, one entry per length with ``length``,
        ``tokens`` (mean), ``count``, ``score`` (mean) and its 95 % interval ``low``, ``high``; ``depths``, the same per
        length and ``depth`` of needles; ``mean``, the same of all samples; and ``responses``, one entry per sample.

    Raises:
        ValueError: bad input; the message is one line.
    """
    if task not in METRICS:
        raise ValueError(f"task: found {task!r}, expected one of {', '.join(METRICS)}")
    if cases and task != "line":
        raise ValueError(f"cases: they are LongEval's line cases, but the task is {task}")
    lengths = [] if cases else lengths or default_lengths(loaded.window)
    if max(lengths, default=0) > loaded.window:
        raise ValueError(f"lengths: {max(lengths)} tokens do not fit into the model's window of {loaded.window}")
    requests = [
        Request(task, str(length), samples=samples, seed=seed, split=split, haystack=haystack, depths=depths)
        for length in lengths
    ]
    example = asdict(Request(task, str(shot_tokens), samples=shots, seed=seed, haystack=haystack)) if shots else None
    metadata = {
        "tokenizer": loaded.tokenizer.name_or_path,
        "chat_template": loaded.tokenizer.chat_template,
        "requests": [asdict(request) for request in requests],
        "examples": example,
        "cases": {"folder": cases, "samples": samples} if cases else None,
    }
    responses = generate_responses(loaded, task, metadata, batch_size, journal, allow_contamination)
    seen = [row.pop("seen") for row in responses]
    return {
        "model": loaded.name,
        "base": loaded.base,
        "method": loaded.method,
        "task": task,
        "window": loaded.window,
        "seed": seed,
        "shots": shots,
        "contaminated": None if loaded.trained_on is None else sum(seen),
        "scores": summaries(responses, "length"),
        "depths": summaries(responses, "length", "depth") if task == "niah" else [],
        "mean": summaries(responses)[0],
        "responses": responses,
    }


def summaries(responses: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Mean scores of responses that have the same values of ``keys``, each with its interval."""
    groups = defaultdict(list)
    for row in responses:
        groups[tuple(row[key] for key in keys)].append(row)
    found = []
    for values, rows in groups.items():
        mean = sum(row["score"] for row in rows) / len(rows)
        low, high = wilson(mean, len(rows))
        found.append({
            **dict(zip(keys, values, strict=True)),
            "tokens": round(sum(row["tokens"] for row in rows) / len(rows), 1),
            "count": len(rows),
            "score": mean,
            "low": round(low, 4),
            "high": round(high, 4),
        })  # fmt: skip
    return found


def generate_responses(
    loaded: LoadedModel, task: str, metadata: dict[str, Any], batch_size: int | None, journal: Path | None,
    allow_contamination: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run lm-eval and keep, for each sample, what identifies it, the response, its score and whether it was ``seen``.

    Args:
        loaded: the model.
        task: one of ``METRICS``.
        metadata: arguments of ``eval.lm_eval_task.documents``.
        batch_size: prompts decoded together; None takes what memory allows.
        journal: see ``run``.
        allow_contamination: see ``run``.
    """
    name = f"seal_{task}"
    harness = harness_for(loaded, batch_size, journal)
    trained_on = loaded.trained_on or frozenset()
    harness.refused = frozenset() if allow_contamination else trained_on
    results = evaluate(harness, {name: lm_eval_task(task, **metadata)}, apply_chat_template=True, bootstrap_iters=0)
    return [
        {
            **{key: row["doc"][key] for key in KEPT if key in row["doc"]},
            "response": row["filtered_resps"][0],
            "score": row["score"],
            "seen": was_seen(row["doc"], trained_on),
        }
        for row in sorted(results["samples"][name], key=lambda row: row["doc_id"])
    ]


def save(result: dict[str, Any], out: Path) -> None:
    """Write a result as JSON and, beside it, its picture."""
    from eval.plots import accuracy_by_length

    accuracy_by_length([result], out.with_suffix(".png"))
    write_text(out, json.dumps(result, indent=1) + "\n")
