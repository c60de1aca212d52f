"""Stand-in until the real module lands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from eval.generation import generate_answers, stop_ids
from eval.score import SCORERS


def prompt_ids(tokenizer: Any, sample: dict[str, Any], shown: str = "") -> list[int]:
    """Return ids of a prompt."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": shown + sample["messages"][0]["content"]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    return tokenizer(text + sample.get("prefix", ""), add_special_tokens=False)["input_ids"]


def score_samples(
    model: Any, tokenizer: Any, task: str, samples: list[dict[str, Any]], batch_size: int | None = None, shown: str = ""
) -> list[dict[str, Any]]:
    """Score samples."""
    settings = yaml.safe_load((Path(__file__).parent / "tasks" / f"seal_{task}.yaml").read_text())["generation_kwargs"]
    prompts = [prompt_ids(tokenizer, sample, shown) for sample in samples]

    def ends(ids: list[int]) -> bool:
        return any(until in tokenizer.decode(ids) for until in settings["until"])

    answers = generate_answers(
        model,
        prompts,
        max_new_tokens=settings["max_gen_toks"],
        stop=stop_ids(model, tokenizer),
        ends=ends,
        batch_size=batch_size,
    )
    rows = []
    for sample, ids in zip(samples, answers, strict=True):
        response = tokenizer.decode(ids, skip_special_tokens=True)
        for until in settings["until"]:
            response = response.split(until)[0]
        rows.append(
            {
                "length": sample["length"],
                "index": sample["index"],
                "tokens": sample["tokens"],
                "response": response,
                "score": SCORERS[task](response, sample["references"]),
            }
        )
    return rows
