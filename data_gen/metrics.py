"""Scores of a response in [0, 1], from the response and its references; ``METRICS`` has their names."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from data_gen.import_object import import_object

Metric = Callable[[str, list[str]], float]


def last_integer(text: str) -> int | None:
    """Return the last integer of a text, as LongEval parses it (``longeval/utils.py``); None without digits."""
    integers = re.findall(r"\d+", text)
    return int(integers[-1]) if integers else None


def equal_integers(response: str, references: list[str]) -> float:
    """Return 1 if the last integer of a response is the last one of a reference, else 0."""
    number = last_integer(response)
    return float(number is not None and number in map(last_integer, references))


def string_match_all(response: str, references: list[str]) -> float:
    """Compute the share of references that occur in a response, ignoring case (RULER's ``string_match_all``)."""
    return sum(reference.lower() in response.lower() for reference in references) / len(references)


def exact(response: str, references: list[str]) -> float:
    """Return 1 if a response equals a reference, but for white space, else 0."""
    return float(response.split() in [reference.split() for reference in references])


@functools.cache
def rouge() -> Any:
    """Return the scorer of ROUGE-1 with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=True)


def rouge_recall(response: str, references: list[str]) -> float:
    """Compute the ROUGE-1 recall of a response, in [0, 1]; of several references, the best."""
    return max(rouge().score(reference, response.strip())["rouge1"].recall for reference in references)


def f1(response: str, references: list[str]) -> float:
    """Compute the F1 of the words of a response, ignoring case and punctuation; of several references, the best."""

    def of(reference: str) -> float:
        words, expected = (Counter(re.findall(r"\w+", text.lower())) for text in (response, reference))
        shared = (words & expected).total()
        return 2 * shared / (words.total() + expected.total()) if shared else 0.0

    return max(map(of, references))


METRICS: dict[str, Metric] = {
    "contains": string_match_all,
    "last_integer": equal_integers,
    "exact": exact,
    "rouge1": rouge_recall,
    "f1": f1,
}


def resolve_metric(spec: str) -> Metric:
    """Return the metric of a name in ``METRICS``, or a function of the user's as ``module:function``.

    Raises:
        ValueError: there is no such metric.
    """
    if spec in METRICS:
        return METRICS[spec]
    if ":" not in spec:
        raise ValueError(f"metric: found {spec!r}, expected one of {', '.join(METRICS)}, or module:function")
    metric = import_object(spec, "metric")
    if not callable(metric):
        raise ValueError(f"metric: {spec} is a {type(metric).__name__}, expected a function of response and references")
    return metric
