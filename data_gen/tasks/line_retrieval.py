"""Line retrieval: LongEval's record of lines, with a question for one of them (paper section 4.1a and B.1).

The wording is LongEval's (DachengLi1/LongChat, ``longeval/utils.py``, option ``LRT-NL``), the answer is the
paper's (appendix B.1). Keys are ``adjective-noun`` pairs of the wonderwords lists, values lie in 1..50000.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

from data_gen.fit_length import LengthBudget, largest
from data_gen.metrics import equal_integers
from data_gen.tasks.task import Request, Task, register

HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
LINE = "line {key}: REGISTER_CONTENT is <{number}>\n"
CLOSING = "\nNow the record is over. "
QUESTION = "Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."
ANSWER = "The <REGISTER_CONTENT> in line {key} is {number}."
MAX_NUMBER = 50_000


class Record:
    """An endless record: its first ``n`` lines are the sample of ``n`` lines.

    Attributes:
        lines: ``(key, number)`` pairs drawn so far, keys distinct.
        position: of the requested line in the record, as a fraction in [0, 1).
    """

    def __init__(self, rng: random.Random, accept: Callable[[str], bool] = lambda answer: True) -> None:
        """Seed the record; later, numbers are redrawn until ``accept`` is true of the line's answer."""
        self.position = rng.random()
        self.lines: list[tuple[str, int]] = []
        # Two generators, so that lines do not depend on how many are drawn at once.
        self._keys = draw_keys(random.Random(rng.getrandbits(64)))
        self._numbers = random.Random(rng.getrandbits(64))
        self._accept = accept

    def first(self, count: int) -> list[tuple[str, int]]:
        """Return the first ``count`` lines."""
        while len(self.lines) < count:
            key = next(self._keys)
            while not self._accept(ANSWER.format(key=key, number=(number := self._numbers.randint(1, MAX_NUMBER)))):
                pass
            self.lines.append((key, number))
        return self.lines[:count]


@functools.cache
def words() -> tuple[list[str], list[str]]:
    """Return the adjectives and nouns of wonderwords, sorted so that equal seeds give equal keys everywhere."""
    from wonderwords import RandomWord

    generator = RandomWord()
    adjectives, nouns = (
        sorted({word.strip() for word in generator.filter(include_categories=[category])})
        for category in ("adjective", "noun")
    )
    return adjectives, nouns


def draw_keys(rng: random.Random) -> Iterator[str]:
    """Yield distinct keys; no adjective and no noun repeats before its list is used up, as in LongEval."""
    adjectives, nouns = (list(column) for column in words())
    seen = set()
    while True:
        rng.shuffle(adjectives)
        rng.shuffle(nouns)
        for adjective, noun in zip(adjectives, nouns, strict=False):
            key = f"{adjective}-{noun}"
            if key not in seen:
                seen.add(key)
                yield key


def render(lines: list[tuple[str, int]], position: int) -> dict[str, Any]:
    """Return the sample whose record is ``lines``, with a question for the line at ``position``, from 0.

    Returns:
        ``prompt``, ``answer``, ``references`` (the number), and ``key``, ``number``, ``line`` (position),
        ``lines`` (their number).
    """
    key, number = lines[position]
    return {
        "prompt": HEADER + "".join(LINE.format(key=k, number=n) for k, n in lines) + CLOSING + QUESTION.format(key=key),
        "answer": ANSWER.format(key=key, number=number),
        "references": [str(number)],
        "key": key,
        "number": number,
        "line": position,
        "lines": len(lines),
    }


def sample(request: Request, rng: random.Random, index: int, budget: LengthBudget) -> dict[str, Any]:
    """Draw a sample of ``request.lines`` lines, or of as many as fit into the budget.

    Returns:
        See ``render``.

    Raises:
        ValueError: not even one line fits.
    """
    record = Record(rng, budget.accept)

    def of_size(count: int) -> dict[str, Any]:
        return render(record.first(count), int(record.position * count))

    if request.lines is not None:
        return of_size(request.lines)

    def length(count: int) -> int:
        candidate = of_size(count)
        return budget.count(candidate["prompt"], candidate["answer"])

    return of_size(largest(length, budget.tokens, what="line retrieval"))


register(Task(
    name="line", title="Line retrieval", description="line retrieval", source="LongEval (Li et al. 2023)",
    sample=sample, shortest=300, metric=equal_integers, max_new_tokens=100,  # longeval/utils.py: max_new_tokens=100
    options=("lines",),
))  # fmt: skip
