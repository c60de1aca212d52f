"""Training samples for LongBench: the 50 longest of TriviaQA with passages, ``triviaqa_e`` (paper Table 6).

Prompt and truncation in the middle follow LongBench (THUDM/LongBench, ``pred.py`` and ``config/dataset2prompt.json``).
The hub's copy without a loading script is a formatted one, whose fields hold the instructions already.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import read_rows
from data_gen.fit_length import LengthBudget
from data_gen.tasks.task import Request, Task, register

PROMPT = (
    "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
    "following are some examples.\n\n{context}\n\n{input}"
)
DATASET = ("Xnhyacinth/LongBench", "triviaqa_e")


def formatted_prompt(row: dict[str, Any]) -> str | None:
    """Return the prompt of a row of the formatted copy, None for one of the original's files.

    The copy puts the instructions into ``context``, the question with its label into ``question``, and the prompt's
    last words into ``answer_prefix``.
    """
    if row.get("answer_prefix") is None:
        return None
    return row["context"] + row["question"] + row["answer_prefix"]


@functools.cache
def longest(data: str | None) -> list[dict[str, Any]]:
    """Return all rows of a JSON lines file, or None for the hub's, longest first; the sort is stable.

    Raises:
        ValueError: a row lacks a field or is not JSON, or the hub cannot be reached.
    """
    if data is None:
        from datasets import load_dataset

        try:
            rows = list(load_dataset(*DATASET, split="test"))
        except Exception as error:  # datasets raises many types for a failed download
            raise ValueError(f"data: cannot fetch {DATASET[0]} ({first_line(error)}): name a local file") from error
    else:
        rows = [row for _, row in read_rows(Path(data))]
    for number, row in enumerate(rows, 1):
        # Copies on the hub rename the original's `input` to `question`.
        row.setdefault("input", row.get("question"))
        if not (isinstance(row["input"], str) and row.get("context") and row.get("answers") and "length" in row):
            raise ValueError(f"{data or DATASET[0]}, row {number}: expected context, input, answers and length")
    return sorted(rows, key=lambda row: -row["length"])


def sample(request: Request, rng: random.Random, index: int, budget: LengthBudget) -> dict[str, Any]:
    """Return the sample of rank ``index`` by length, truncated in the middle to fit, which ``truncated`` states.

    Raises:
        ValueError: there are fewer rows than samples, or not even the question fits.
    """
    rows = longest(request.data)
    if index >= len(rows):
        raise ValueError(f"samples: {request.data or DATASET[0]} has {len(rows)} rows, sample {index + 1} is requested")
    row = rows[index]
    prompt, answer = formatted_prompt(row) or PROMPT.format(**row), row["answers"][0]
    full = budget.count(prompt, answer)
    ids = budget.encode(prompt)
    remaining = min(len(ids), budget.tokens - budget.count("", answer))
    while budget.count(prompt, answer) > budget.tokens:
        half = remaining // 2
        if half < 1:
            raise ValueError(f"tokens: {budget.tokens} is too short for LongBench")
        prompt = budget.decode(ids[:half]) + budget.decode(ids[-half:])
        remaining -= 2
    return {
        "prompt": prompt,
        "answer": answer,
        "references": list(row["answers"]),
        "truncated": full > budget.tokens,
        "full_tokens": full,
    }


def sources(request: Request) -> dict[str, str]:
    """Return the hash of the rows that samples are built from, for the manifest."""
    rows = json.dumps(longest(request.data), sort_keys=True)
    return {"data_sha256": hashlib.sha256(rows.encode()).hexdigest()}


register(Task(
    name="longbench", title="LongBench document QA", description="LongBench document QA, tuned on TriviaQA",
    source="LongBench (Bai et al. 2024), THUDM/LongBench", sample=sample, shortest=300, options=("data",),
    splits=("train",), sources=sources,
))  # fmt: skip
