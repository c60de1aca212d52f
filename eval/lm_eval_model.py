"""lm-eval's Hugging Face model with batched decoding, a response cache and no truncation, and lm-eval's tasks."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm

from axolotl_plugins.seal.model_loading import LoadedModel
from axolotl_plugins.seal.provenance import text_hash
from data_gen.tasks import Task
from eval.generation import generate_answers, stop_ids
from eval.resume import Journal
from eval.score_samples import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Responses(Journal):
    """Responses by prompt, with the method that lm-eval calls for each of them."""

    @staticmethod
    def key(request: tuple[str, dict[str, Any]]) -> str:
        """Return a hash of a prompt and its generation settings."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def add_partial(self, kind: str, request: tuple[str, dict[str, Any]], response: str) -> None:
        """Store a response, as lm-eval's cache hook."""
        self.add(self.key(request), response)


class Harness(HFLM):
    """lm-eval's Hugging Face model, which refuses prompts that exceed the window instead of truncating them.

    Attributes:
        loaded: the model.
        journal: responses by prompt.
        prompts_together: prompts decoded together, see ``eval.generation``; None uses what memory allows.
        refused: hashes of prompts that are not answered.
    """

    loaded: LoadedModel
    journal: Responses
    prompts_together: int | None = None
    refused: frozenset[str] = frozenset()

    @property
    def eot_token_id(self) -> int:
        """Return an id that ends texts; where the tokenizer names none, one of the model's."""
        own = self.tokenizer.eos_token_id
        return min(stop_ids(self.model, self.tokenizer), default=0) if own is None else own

    @property
    def prefix_token_id(self) -> int:
        """Return an id that texts begin with."""
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else own

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Check every prompt, then answer those that are not in the journal.

        Raises:
            ValueError: the model was tuned on a sample, or see ``LoadedModel.check_room``.
        """
        if self.refused and (count := sum(is_contaminated(request.doc, self.refused) for request in requests)):
            raise ValueError(
                f"{count} of {len(requests)} samples are in the model's training data: score it on others (--seed), or "
                "add --allow-contamination, which the result will state"
            )
        for request in requests:
            self.loaded.check_room(len(self.tok_encode(request.args[0])), request.args[1]["max_gen_toks"])
        self.cache_hook = self.journal
        if missing := [request for request in requests if self.journal.key(request.args) not in self.journal]:
            self.answer_all(missing, disable_tqdm)
        return [self.journal.values[self.journal.key(request.args)] for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Check the length of every context with its continuation, then score them.

        Raises:
            ValueError: one does not fit into the window.
        """
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
        if longest > self.max_length + 1:  # the last token is only predicted
            raise ValueError(f"a prompt of {longest} tokens does not fit into the model's window of {self.max_length}")
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def answer_all(self, requests: list[Instance], disable_tqdm: bool) -> None:
        """Answer requests into the journal, batching those with the same settings and RoPE frequencies."""
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
        """Answer requests with the same settings into the journal."""
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


def is_contaminated(document: dict[str, Any], texts: frozenset[str]) -> bool:
    """Return whether the hashes of all turns before a sample's answer are among those of training texts."""
    return all(text_hash(turn["content"]) in texts for turn in document["messages"][:-1])


def lm_eval_task(
    task: Task, samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, shown: str = ""
) -> ConfigurableTask:
    """Build lm-eval's task of a task with a metric and of samples, rendered by ``eval.score_samples.prompt_text``."""
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
