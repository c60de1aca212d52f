"""Build lm-eval's task of a task and its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from data_gen.tasks import Task
from eval.scoring import prompt_turns


class ChatTask(ConfigurableTask):
    """Samples whose prompts are chats, of one turn or several."""

    def fewshot_context(
        self, doc: dict[str, Any], *_: Any, chat_template: Callable[..., str], gen_prefix: str | None = None, **__: Any
    ) -> str:
        """Render a sample's turns before its answer, and the prefix that begins the answer."""
        turns = prompt_turns(doc, doc["shown"])
        if gen_prefix:
            turns.append({"role": "assistant", "content": gen_prefix})
        return chat_template(turns, add_generation_prompt=not gen_prefix)


def lm_eval_task(task: Task, samples: list[dict[str, Any]], shown: str = "") -> ChatTask:
    """Build lm-eval's task.

    Args:
        task: has a metric.
        samples: see ``data_gen.dataset.samples_by_length``.
        shown: see ``prompt_turns``.
    """
    rows = [{"prefix": "", "shown": shown, **sample} for sample in samples]
    return ChatTask(config={
        "task": f"seal_{task.name}", "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test", "output_type": "generate_until", "doc_to_target": "answer", "gen_prefix": "prefix",
        "doc_to_text": lambda document: document["messages"][-2]["content"],
        "process_results": lambda document, results: {"score": task.score(results[0], document["references"])},
        "num_fewshot": 0, "generation_kwargs": {
            "do_sample": False, "max_gen_toks": task.answer_budget, "until": list(task.stop),
        },
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    })  # fmt: skip
