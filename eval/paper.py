"""The paper's numbers (``paper.yml``), to compare results with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from eval.results import EvalResult

# Table 1's columns, in thousands of tokens, by the number of lines of LongEval's files (LongChat's logs).
LONGEVAL_COLUMNS = {200: 5, 300: 7, 400: 9, 500: 12, 600: 14, 680: 16, 800: 19, 1000: 23, 1200: 28, 1350: 31}
LONGCHAT = "lmsys/longchat-7b-v1.5-32k"  # the one base model of Table 6 and of the paper's MMLU


@functools.cache
def read_paper() -> dict[str, Any]:
    """Return the contents of ``paper.yml``."""
    return yaml.safe_load((Path(__file__).parent / "paper.yml").read_text())


@functools.cache
def paper_scores() -> list[dict[str, Any]]:
    """Return the paper's scores by table, method and length, all in [0, 1] (RULER's are printed in per cent)."""
    rows = []
    for row in read_paper()["scores"]:
        unit = 1 if row["task"] == "line" else 100
        rows.append({**row, "by_length": {length: score / unit for length, score in row["by_length"].items()}})
    return rows


def paper_value(result: EvalResult, length: int | None) -> tuple[float, int] | None:
    """Return the paper's score and table number for a result's base model, task and method at a length.

    Lengths match to the thousand; those of LongEval's own cases are numbers of lines. None where the paper prints no
    such score.
    """
    if (result.asked or {}).get("cases"):
        length = 1000 * LONGEVAL_COLUMNS.get(length or 0, 0)
    method = "one-shot" if result.shots else result.method
    for row in paper_scores():
        if (row["model"], row["task"], row["method"]) == (result.base, result.task, method):
            for thousands, score in row["by_length"].items():
                if length in (thousands * 1000, thousands * 1024):
                    return score, row["table"]
    return None
