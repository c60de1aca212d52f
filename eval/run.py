"""Score a model on one of SEAL's tasks by length, with lm-eval as the harness."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from lm_eval import evaluate

from axolotl_plugins.seal import provenance
from axolotl_plugins.seal.model_loading import LoadedModel
from data_gen.dataset import Request, draw, samples_by_length
from data_gen.tasks import Split, Task
from eval.confidence import wilson
from eval.harness import Harness, Responses, is_contaminated
from eval.lm_eval_task import lm_eval_task
from eval.results import EvalResult, LengthScore
from eval.spec import default_lengths, scored_task
from eval.vllm_backend import Served, ServedHarness

# Fields of a sample that a result stores.
SAMPLE_FIELDS = ("length", "index", "tokens", "depth", "line", "key", "haystack_repeats", "references")


def harness_for(
    loaded: LoadedModel, batch_size: int | None, journal: Path | None, *, add_bos_token: bool = False
) -> Harness:
    """Return lm-eval's model for a local or a served model.

    Args:
        loaded: the model.
        batch_size: prompts decoded together; None uses what memory allows.
        journal: see ``run``.
        add_bos_token: for prompts without a chat template, which otherwise writes the token itself.
    """
    harness = (ServedHarness if isinstance(loaded, Served) else Harness)(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=loaded.window, batch_size=batch_size or 1,
        add_bos_token=add_bos_token,
    )  # fmt: skip
    harness.loaded = loaded
    harness.chat_template_args = {}  # lm-eval would set enable_thinking, which training does not
    harness.prompts_together = batch_size
    harness.journal = Responses(journal)
    return harness


def run(
    loaded: LoadedModel, task: str | Task, *, lengths: list[int] | None = None, samples: int | None = None,
    seed: int = 0, split: Split = "test", shots: int = 0, shot_tokens: int = 1000, haystack: str | None = None,
    depths: int | None = None, ruler_version: int | None = None, batch_size: int | None = None,
    journal: Path | None = None,
    allow_contamination: bool = False,
) -> EvalResult:  # fmt: skip
    """Score a model on a task.

    Args:
        loaded: the model with its tokenizer.
        task: see ``scored_task``.
        lengths: longest samples, in tokens; None uses ``default_lengths``, or those of a file's samples.
        samples: per length; None uses 50, or all of a file.
        seed: of the samples.
        split: ``train`` with a seed that was not trained on yields validation data.
        shots: worked examples before every prompt (paper section 8: one).
        shot_tokens: longest example, in tokens (paper section 8: 1K).
        haystack: see ``data_gen.dataset.Request``.
        depths: see ``data_gen.dataset.Request``.
        ruler_version: see ``data_gen.dataset.Request``.
        batch_size: prompts decoded together; None uses what memory allows.
        journal: file that caches responses as they come in; an interrupted run resumes from it.
        allow_contamination: also score samples that the model was tuned on.

    Raises:
        ValueError: bad input; the message is one line.
    """
    task = scored_task(task)
    check_version(loaded.name, task.name, ruler_version)
    if task.rows is None:
        lengths = lengths or default_lengths(loaded.window)
        loaded.check_lengths(lengths)
    options: dict[str, Any] = {"seed": seed, "haystack": haystack, "ruler_version": ruler_version}
    rows = list(samples_by_length(task, loaded.tokenizer, lengths, samples, drawn=draw, split=split, depths=depths,
                                  **options))  # fmt: skip
    example = Request(task.key, str(shot_tokens), samples=shots, **options) if shots else None
    shown = "".join(
        "\n".join(message["content"] for message in row["messages"]) + "\n\n"
        for row in (draw(example, loaded.tokenizer) if example else ())
    )
    responses = generate_responses(loaded, task, rows, shown, batch_size, journal, allow_contamination)
    seen = [row.pop("seen") for row in responses]
    return EvalResult(
        model=loaded.name, base=loaded.base, method=loaded.method, task=task.name, window=loaded.window,
        dtype=loaded.dtype, seed=seed, shots=shots, contaminated=None if loaded.trained_on is None else sum(seen),
        scores=mean_scores(responses, "length"),
        depths=mean_scores(responses, "length", "depth") if task.name == "niah" else [],
        mean=mean_scores(responses)[0], responses=responses,
    )  # fmt: skip


def check_version(name: str, task: str, version: int | None) -> None:
    """Raise if a model was tuned on the text of one of RULER's versions and none is asked for.

    Raises:
        ValueError: see above.
    """
    if version is None and (tuned := provenance.ruler_version(Path(name), task)):
        raise ValueError(f"ruler-version: {name} was tuned on {task} of RULER {tuned}: add --ruler-version {tuned}")


def mean_scores(responses: list[dict[str, Any]], *keys: str) -> list[LengthScore]:
    """Return the mean score of each group of responses with equal values of ``keys`` (``length``, ``depth``)."""
    groups = defaultdict(list)
    for row in responses:
        groups[tuple(row[key] for key in keys)].append(row)
    scores = []
    for values, rows in groups.items():
        mean = sum(row["score"] for row in rows) / len(rows)
        low, high = wilson(mean, len(rows))
        scores.append(
            LengthScore(
                **dict(zip(keys, values, strict=True)),
                tokens=round(sum(row["tokens"] for row in rows) / len(rows), 1), count=len(rows), score=mean,
                low=round(low, 4), high=round(high, 4),
            )
        )  # fmt: skip
    return scores


def generate_responses(
    loaded: LoadedModel, task: Task, samples: list[dict[str, Any]], shown: str, batch_size: int | None,
    journal: Path | None, allow_contamination: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run lm-eval on a task and return a row per sample.

    Args:
        loaded: the model.
        task: has a metric.
        samples: see ``samples_by_length``.
        shown: worked examples, put before every prompt in the same turn (paper section 8).
        batch_size: prompts decoded together; None uses what memory allows.
        journal: see ``run``.
        allow_contamination: see ``run``.

    Returns:
        ``SAMPLE_FIELDS`` of each sample, its ``response`` and ``score``, and whether it was ``seen`` in training.
    """
    harness = harness_for(loaded, batch_size, journal)
    trained_on = loaded.trained_on or frozenset()
    harness.refused = frozenset() if allow_contamination else trained_on
    lm_task = lm_eval_task(task, samples, loaded.tokenizer, shown)
    results = evaluate(harness, {task.name: lm_task}, bootstrap_iters=0)
    return [
        {
            **{key: row["doc"][key] for key in SAMPLE_FIELDS if key in row["doc"]},
            "response": row["filtered_resps"][0],
            "score": row["score"],
            "seen": is_contaminated(row["doc"], trained_on),
        }
        for row in sorted(results["samples"][task.name], key=lambda row: row["doc_id"])
    ]
