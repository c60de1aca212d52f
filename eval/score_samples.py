"""Answer and score samples without lm-eval, with the prompts, budgets and metrics of the lm-eval tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.tokenizer import render_prompt
from axolotl_plugins.common.window import stated_window
from data_gen.tasks import Task, resolve_task
from eval.generation import generate_answers, stop_ids

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prompt_text(tokenizer: PreTrainedTokenizerBase, sample: dict[str, Any], shown: str = "") -> str:
    """Render a sample's prompt with the model's chat template.

    Args:
        tokenizer: with a chat template.
        sample: its ``messages`` end with the answer; ``prefix``, if any, begins the model's.
        shown: worked examples, put before the last turn's text.
    """
    *context, last, _ = sample["messages"]
    turns = [*context, {**last, "content": shown + last["content"]}]
    return render_prompt(tokenizer, turns, sample.get("prefix", ""))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, sample: dict[str, Any], shown: str = "") -> list[int]:
    """Return the token ids of ``prompt_text``."""
    return tokenizer(prompt_text(tokenizer, sample, shown), add_special_tokens=False)["input_ids"]


def prompt_and_answer(tokenizer: PreTrainedTokenizerBase, sample: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the token ids of a sample's prompt, as it is scored, and of its answer with the token that ends it.

    Raises:
        ValueError: the prompt's tokens do not begin those of the sample; or see ``tune.encode``.
    """
    from axolotl_plugins.seal.tune import encode

    prompt, ids = prompt_ids(tokenizer, sample), encode(sample["messages"], tokenizer)[0][0].tolist()
    if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
        raise ValueError(
            f"prefix: {sample.get('prefix', '')!r} at the end of a prompt is tokenised otherwise than in the answer"
        )
    return prompt, ids[len(prompt) :]


def truncate_at(text: str, until: list[str]) -> str:
    """Truncate a text at the first of the strings that end it."""
    for ending in until:
        text = text.split(ending)[0]
    return text


def score_samples(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, task: str | Task,
    samples: list[dict[str, Any]], *, batch_size: int | None = None, shown: str = "",
) -> list[dict[str, Any]]:  # fmt: skip
    """Answer samples greedily and score the answers.

    Args:
        model: in evaluation mode.
        tokenizer: with a chat template.
        task: has a metric.
        samples: as ``data_gen.dataset`` draws them, with the nominal ``length``.
        batch_size: see ``generate_answers``.
        shown: see ``prompt_ids``.

    Returns:
        For every sample ``length``, ``index``, ``tokens``, ``response`` and ``score`` (in [0, 1]).

    Raises:
        ValueError: a prompt with its answer exceeds the model's window.
    """
    task = resolve_task(task)
    budget, until = task.answer_budget, list(task.stop)
    prompts = [prompt_ids(tokenizer, sample, shown) for sample in samples]
    window = stated_window(model.config)
    if window and (longest := max(map(len, prompts))) + budget > window:
        raise ValueError(f"a prompt of {longest} tokens and {budget} tokens of answer do not fit into {window} tokens")

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    def ends(ids: list[int]) -> bool:
        return bool(until) and truncate_at(text := text_of(ids), until) != text

    answers = generate_answers(
        model, prompts, max_new_tokens=budget, stop=stop_ids(model, tokenizer), ends=ends, batch_size=batch_size,
    )  # fmt: skip
    responses = [truncate_at(text_of(answer), until) for answer in answers]
    return [
        {**{key: sample[key] for key in ("length", "index", "tokens")}, "response": response,
         "score": task.score(response, sample["references"])}
        for sample, response in zip(samples, responses, strict=True)
    ]  # fmt: skip
