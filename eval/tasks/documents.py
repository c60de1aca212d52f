"""What lm-eval asks of our tasks: their documents, prompts and scores."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from data_gen.generate import Request, generate, load_tokenizer
from eval.score import last_integer


def documents(
    *, task: str, tokenizer: str, lengths: list[int], samples: int, seed: int, **_: Any
) -> dict[str, Dataset]:
    """Test samples of every length, from the same generator as the training samples."""
    loaded = load_tokenizer(tokenizer)
    rows = [
        {"length": length, **row}
        for length in lengths
        for row in generate(Request(task, str(length), samples=samples, seed=seed, split="test"), loaded)
    ]
    return {"test": Dataset.from_list(rows)}


def prompt(document: dict[str, Any]) -> str:
    """The user's turn; lm-eval puts the model's chat template around it."""
    return document["messages"][0]["content"]


def line_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the last integer of the response is the line's number."""
    return {"accuracy": float(last_integer(results[0]) == document["number"])}
