"""What lm-eval asks of our tasks: their documents, prompts and scores."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from data_gen.dataset import Request, count_tokens, draw, load_tokenizer
from data_gen.io import read_rows
from eval.metrics import METRICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def documents(
    *, tokenizer: str, requests: list[dict[str, Any]], examples: dict[str, Any] | None = None,
    cases: dict[str, Any] | None = None, chat_template: str | None = None, **_: Any,
) -> dict[str, Dataset]:  # fmt: skip
    """Samples of every length, from the same generator as the training samples, or LongEval's own cases.

    Examples with their answers, if asked for, come before every prompt in the same turn (paper section 8).
    """
    loaded = load_tokenizer(tokenizer, chat_template)
    shown = "".join(
        "\n".join(message["content"] for message in row["messages"]) + "\n\n"
        for row in (draw(Request(**examples), loaded) if examples else ())
    )
    rows = list(read_cases(**cases, tokenizer=loaded)) if cases else []
    rows += [
        {"length": int(request["tokens"]), **row} for request in requests for row in draw(Request(**request), loaded)
    ]
    return {"test": Dataset.from_list([{"prefix": "", "shown": shown, **row} for row in rows])}


def read_cases(folder: str, samples: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """LongEval's published line cases as they are (``*_lines.jsonl``), the length being the number of lines.

    Raises:
        ValueError: no such files, or a row is not one of LongEval's.
    """
    files = sorted(Path(folder).glob("*_lines.jsonl"), key=lambda file: int("0" + file.name.split("_")[0]))
    if not files:
        raise ValueError(f"cases: no *_lines.jsonl in {folder!r}: name the folder with LongEval's line cases")
    for file in files:
        for index, (place, case) in enumerate(islice(read_rows(file), samples)):
            try:
                number, lines = int(case["expected_number"]), int(case["num_lines"])
                messages = [{"role": "user", "content": str(case["prompt"])}]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {place}: not a case of LongEval's ({error!r})") from None
            yield {
                "task": "line",
                "length": lines,
                "index": index,
                "tokens": count_tokens(tokenizer, messages),
                "messages": messages,
                "answer": str(number),
                "references": [str(number)],
            }


def prompt(document: dict[str, Any]) -> str:
    """The user's turn; lm-eval puts the model's chat template around it."""
    return document["shown"] + document["messages"][0]["content"]


def target(document: dict[str, Any]) -> str:
    """The assistant's turn as it is trained on."""
    return document["answer"]


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The task's own score of a response, in [0, 1]."""
    return {"score": METRICS[document["task"]](results[0], document["references"])}
