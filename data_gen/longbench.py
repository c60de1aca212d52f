"""LongBench's TriviaQA with passages: the 50 longest samples of ``triviaqa_e``, to train on (paper Table 6).

Prompt and truncation in the middle are LongBench's (THUDM/LongBench, ``pred.py`` and ``config/dataset2prompt.json``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.console import first_line
from data_gen.fit_length import LengthBudget
from data_gen.io import read_rows

if TYPE_CHECKING:
    from data_gen.dataset import Request

PROMPT = (
    "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
    "following are some examples.\n\n{context}\n\n{input}"
)
DATASET = ("Xnhyacinth/LongBench", "triviaqa_e")  # the original's files, without its loading script


@functools.cache
def longest(data: str | None) -> list[dict[str, Any]]:
    """All rows, longest first; rows of equal length stay in their order.

    Args:
        data: a JSON lines file, or None for the hub.

    Raises:
        ValueError: a row lacks a field or is not JSON, or the hub cannot be reached.
    """
    if data is None:
        from datasets import load_dataset

        try:
            rows = list(load_dataset(*DATASET, split="test"))
        except Exception as error:  # the libraries below raise a dozen kinds for one cause
            raise ValueError(f"data: cannot fetch {DATASET[0]} ({first_line(error)}): name a local file") from error
    else:
        rows = [row for _, row in read_rows(Path(data))]
    for number, row in enumerate(rows, 1):
        # Some copies on the hub call the original's `input` a question.
        row.setdefault("input", row.get("question"))
        if not (isinstance(row["input"], str) and row.get("context") and row.get("answers") and "length" in row):
            raise ValueError(f"{data or DATASET[0]}, row {number}: expected context, input, answers and length")
    return sorted(rows, key=lambda row: -row["length"])


def sample(request: Request, rng: random.Random, index: int, room: LengthBudget) -> dict[str, Any]:
    """The sample of rank ``index`` by length, cut in the middle where it does not fit, which it says.

    Raises:
        ValueError: fewer rows than asked for, or a length in which not even the question fits.
    """
    rows = longest(request.data)
    if index >= len(rows):
        raise ValueError(f"samples: {request.data or DATASET[0]} has {len(rows)} rows, sample {index + 1} is asked for")
    row = rows[index]
    prompt, answer = PROMPT.format(**row), row["answers"][0]
    full = room.count(prompt, answer)
    ids = room.encode(prompt)
    keep = min(len(ids), room.tokens - room.count("", answer))
    while room.count(prompt, answer) > room.tokens:
        half = keep // 2
        if half < 1:
            raise ValueError(f"tokens: {room.tokens} is too short for LongBench")
        prompt = room.decode(ids[:half]) + room.decode(ids[-half:])
        keep -= 2
    return {
        "prompt": prompt,
        "answer": answer,
        "references": list(row["answers"]),
        "truncated": full > room.tokens,
        "full_tokens": full,
    }


def sources(request: Request) -> dict[str, str]:
    """Hash of the rows that samples are made of, for the manifest."""
    rows = json.dumps(longest(request.data), sort_keys=True)
    return {"data_sha256": hashlib.sha256(rows.encode()).hexdigest()}
