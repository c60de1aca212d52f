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
from eval.lm_eval_model import Harness, Responses, is_contaminated, lm_eval_task
from eval.results import EvalResult, LengthScore
from eval.spec import EvalSpec, scored_task
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
        journal: file that caches responses as they come in; an interrupted run resumes from it.
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


def score_by_length(
    loaded: LoadedModel, task: str | Task, *, split: Split = "test", journal: Path | None = None, **options: Any
) -> EvalResult:
    """Score a model on a task.

    Args:
        loaded: the model with its tokenizer.
        task: see ``scored_task``.
        split: ``train`` with a seed that was not trained on yields validation data.
        journal: see ``harness_for``.
        options: of ``EvalSpec``.

    Raises:
        ValueError: bad input; the message is one line.
    """
    task, spec = scored_task(task), EvalSpec(**options)
    check_version(loaded.name, task.name, spec.ruler_version)
    drawing = spec.sample_options(task, loaded.window)
    shots, shot_tokens = drawing.pop("shots", 0), drawing.pop("shot_tokens", 0)
    if task.rows is None:
        loaded.check_lengths(drawing["lengths"])
    samples = samples_by_length(task, loaded.tokenizer, **drawing, drawn=draw, split=split)
    shown = ""  # worked examples, put before every prompt in the same turn (paper section 8)
    if shots:
        example = {key: drawing[key] for key in ("seed", "haystack", "ruler_version")}
        for row in draw(Request(task.key, str(shot_tokens), samples=shots, **example), loaded.tokenizer):
            shown += "\n".join(message["content"] for message in row["messages"]) + "\n\n"
    harness = harness_for(loaded, spec.batch_size, journal)
    trained_on = loaded.trained_on or frozenset()
    harness.refused = frozenset() if spec.allow_contamination else trained_on
    lm_task = lm_eval_task(task, list(samples), loaded.tokenizer, shown)
    answered = evaluate(harness, {task.name: lm_task}, bootstrap_iters=0)["samples"][task.name]
    answered.sort(key=lambda row: row["doc_id"])
    responses = [
        {
            **{key: row["doc"][key] for key in SAMPLE_FIELDS if key in row["doc"]},
            "response": row["filtered_resps"][0],
            "score": row["score"],
        }
        for row in answered
    ]
    seen = sum(is_contaminated(row["doc"], trained_on) for row in answered)
    return EvalResult(
        model=loaded.name, base=loaded.base, method=loaded.method, task=task.name, title=task.title,
        window=loaded.window, dtype=loaded.dtype, seed=drawing.get("seed", 0), shots=shots,
        contaminated=None if loaded.trained_on is None else seen,
        scores=mean_scores(responses, "length"),
        depths=mean_scores(responses, "length", "depth") if task.name == "niah" else [],
        mean=mean_scores(responses)[0], responses=responses,
    )  # fmt: skip


def check_version(name: str, task: str, version: int | None) -> None:
    """Raise ValueError if a model was tuned on the text of one of RULER's versions and none is asked for."""
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
