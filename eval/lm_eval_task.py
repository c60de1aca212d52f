"""Build lm-eval's task of a task and its samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from data_gen.tasks import Task
from eval.scoring import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def lm_eval_task(
    task: Task, samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, shown: str = ""
) -> ConfigurableTask:
    """Build lm-eval's task, whose prompts are rendered with the model's chat template.

    Args:
        task: has a metric.
        samples: see ``data_gen.dataset.samples_by_length``.
        tokenizer: with a chat template.
        shown: see ``prompt_text``.
    """
    rows = [{**sample, "prompt": prompt_text(tokenizer, sample, shown)} for sample in samples]
    return ConfigurableTask(config={
        "task": f"seal_{task.name}", "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test", "output_type": "generate_until",
        "doc_to_text": lambda document: document["prompt"], "doc_to_target": lambda document: document["answer"],
        "process_results": lambda document, results: {"score": task.score(results[0], document["references"])},
        "num_fewshot": 0, "generation_kwargs": {
            "do_sample": False, "max_gen_toks": task.answer_budget, "until": list(task.stop),
        },
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    })  # fmt: skip
