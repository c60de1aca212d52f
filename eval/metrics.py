"""Scores of responses, and how sure one can be of their mean."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any


def last_integer(response: str) -> int | None:
    """The last run of digits in a response, as LongEval parses it (``longeval/utils.py``); None where there is none."""
    found = re.findall(r"\d+", response)
    return int(found[-1]) if found else None


def line(response: str, references: list[str]) -> float:
    """1 if the last integer of the response is the number asked for."""
    return float(last_integer(response) == int(references[0]))


@functools.cache
def rouge() -> Any:
    """ROUGE-1 with stemming, as the original NIAH program makes it."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=True)


def niah(response: str, references: list[str]) -> float:
    """ROUGE-1 recall: share of the reference's words in the response (the paper gives it times 100)."""
    return rouge().score(references[0], response.strip())["rouge1"].recall


def ruler(response: str, references: list[str]) -> float:
    """Share of the references that occur in the response, in any case (RULER's ``string_match_all``)."""
    return sum(reference.lower() in response.lower() for reference in references) / len(references)


METRICS: dict[str, Callable[[str, list[str]], float]] = {
    "line": line, "niah": niah, "vt": ruler, "cwe": ruler, "fwe": ruler,
}  # fmt: skip


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; of a mean of scores in [0, 1] it is wider than needed.

    Args:
        share: found in [0, 1].
        count: samples, at least 1.
        z: normal quantile.

    Returns:
        Lower and upper bound, in [0, 1].
    """
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # The bounds meet the share itself at none and all right, where rounding must not put them on its wrong side.
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))
