"""Scores a model on a task over lengths, with lm-eval as the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from axolotl_plugins.seal.load import Loaded, load
from data_gen.files import write_text
from eval.score import wilson

TASK_FOLDER = Path(__file__).parent / "tasks"
# The paper scores a 32K window at 9K, 14K, 19K, 23K, 28K and 31K (Table 1): these shares of a window.
PAPER_LENGTHS = (9 / 32, 14 / 32, 19 / 32, 23 / 32, 28 / 32, 31 / 32)


class Harness(HFLM):
    """lm-eval's Hugging Face model, which refuses prompts that do not fit instead of cutting them."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Check every prompt, then answer them all.

        Raises:
            ValueError: a prompt and its answer do not fit into the window.
        """
        for request in requests:
            prompt, options = request.args
            length, room = len(self.tok_encode(prompt)), options["max_gen_toks"]
            if length + room > self.max_length:
                raise ValueError(
                    f"a prompt of {length} tokens and {room} tokens of answer do not fit into the model's window of "
                    f"{self.max_length}: ask for shorter --lengths"
                )
        return super().generate_until(requests, disable_tqdm)


def default_lengths(window: int, answer: int = 128) -> list[int]:
    """Lengths in tokens that lie in a window as the paper's lie in 32K, with room for the answer."""
    return [min(int(window * share), window - answer) for share in PAPER_LENGTHS]


def run(
    model: str, task: str, *, lengths: list[int] | None = None, samples: int = 50, seed: int = 0,
    batch_size: int = 1, trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score a model.

    Args:
        model: hub id, model folder or adapter folder.
        task: ``line``.
        lengths: longest samples, in tokens; None means ``default_lengths``.
        samples: per length.
        seed: of the test samples.
        batch_size: prompts generated together.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        ``model``, ``base``, ``method``, ``task``, ``window``, ``seed``; ``scores``, one entry per length with
        ``length``, ``tokens`` (mean), ``count``, ``correct``, ``accuracy`` and its 95 % interval ``low``, ``high``; and
        ``responses``, one entry per sample.

    Raises:
        ValueError: bad input; the message is one line.
    """
    loaded = load(model, trust_remote_code=trust_remote_code)
    lengths = lengths or default_lengths(loaded.window)
    if max(lengths) > loaded.window:
        raise ValueError(f"lengths: {max(lengths)} tokens do not fit into the model's window of {loaded.window}")
    responses = generate_responses(loaded, model, task, lengths, samples, seed, batch_size)
    scores = []
    for length in lengths:
        rows = [row for row in responses if row["length"] == length]
        correct = sum(row["correct"] for row in rows)
        low, high = wilson(correct, len(rows))
        scores.append({
            "length": length,
            "tokens": round(sum(row["tokens"] for row in rows) / len(rows), 1),
            "count": len(rows),
            "correct": correct,
            "accuracy": correct / len(rows),
            "low": round(low, 4),
            "high": round(high, 4),
        })  # fmt: skip
    return {
        "model": model,
        "base": loaded.base,
        "method": loaded.method,
        "task": task,
        "window": loaded.window,
        "seed": seed,
        "scores": scores,
        "responses": responses,
    }


def generate_responses(
    loaded: Loaded, model: str, task: str, lengths: list[int], samples: int, seed: int, batch_size: int
) -> list[dict[str, Any]]:
    """Run lm-eval and keep, for each sample, what identifies it, the response and whether that is right."""
    name = f"seal_{task}"
    metadata = {"tokenizer": loaded.tokenizer.name_or_path, "lengths": lengths, "samples": samples, "seed": seed}
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)
    if name not in manager.all_tasks:
        known = ", ".join(sorted(task.removeprefix("seal_") for task in manager.all_tasks))
        raise ValueError(f"task: found {task!r}, expected one of {known}")
    harness = Harness(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        max_length=loaded.window,
        batch_size=batch_size,
        add_bos_token=False,  # the chat template says whether there is one, as in training
    )
    results = simple_evaluate(
        model=harness, tasks=[name], apply_chat_template=True, task_manager=manager, bootstrap_iters=0,
        log_samples=True, metadata=metadata,
    )  # fmt: skip
    return [
        {
            "length": row["doc"]["length"],
            "index": row["doc"]["index"],
            "tokens": row["doc"]["tokens"],
            "answer": row["doc"]["answer"],
            "response": row["filtered_resps"][0],
            "correct": bool(row["accuracy"]),
        }
        for row in sorted(results["samples"][name], key=lambda row: row["doc_id"])
    ]


def save(result: dict[str, Any], out: Path) -> None:
    """Write a result as JSON and, beside it, its picture."""
    from eval.plot import accuracy_by_length

    accuracy_by_length([result], out.with_suffix(".png"))
    write_text(out, json.dumps(result, indent=1) + "\n")
