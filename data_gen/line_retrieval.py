"""Line retrieval: LongEval's record of lines, one of which is asked for (paper section 4.1a and B.1).

The wording is LongEval's (DachengLi1/LongChat, ``longeval/utils.py``, option ``LRT-NL``), the answer is the
paper's (appendix B.1). Keys are ``adjective-noun`` pairs of the wonderwords lists, values lie in 1..50000.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from data_gen.fit_length import LengthBudget, largest

if TYPE_CHECKING:
    from data_gen.dataset import Request

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
    """An endless record: the first ``n`` of its lines make a sample of ``n`` lines.

    Attributes:
        lines: ``(key, number)`` pairs drawn so far, keys distinct.
        position: where in the record the question points, as a fraction in [0, 1).
    """

    def __init__(self, rng: random.Random, accept: Callable[[str], bool] = lambda answer: True) -> None:
        """Draw nothing yet; numbers are drawn until ``accept`` takes their line's answer."""
        self.position = rng.random()
        self.lines: list[tuple[str, int]] = []
        # Two sources, so that how many lines are drawn at once changes none of them.
        self._keys = draw_keys(random.Random(rng.getrandbits(64)))
        self._numbers = random.Random(rng.getrandbits(64))
        self._accept = accept

    def first(self, count: int) -> list[tuple[str, int]]:
        """The first ``count`` lines."""
        while len(self.lines) < count:
            key = next(self._keys)
            while not self._accept(ANSWER.format(key=key, number=(number := self._numbers.randint(1, MAX_NUMBER)))):
                pass
            self.lines.append((key, number))
        return self.lines[:count]


@functools.cache
def words() -> tuple[list[str], list[str]]:
    """The adjectives and nouns of wonderwords, sorted so that the same seed gives the same keys everywhere."""
    from wonderwords import RandomWord

    pick = RandomWord()
    adjectives, nouns = (
        sorted({word.strip() for word in pick.filter(include_categories=[category])})
        for category in ("adjective", "noun")
    )
    return adjectives, nouns


def draw_keys(rng: random.Random) -> Iterator[str]:
    """Distinct keys without end; no adjective and no noun repeats before its list is used, as in LongEval."""
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


def render(lines: list[tuple[str, int]], asked: int) -> dict[str, Any]:
    """The sample whose record is ``lines``, with a question for the line at position ``asked``.

    Returns:
        ``prompt``, ``answer``, ``references`` (the number), and ``key``, ``number``, ``line`` (0-based position of the
        asked line), ``lines``.
    """
    key, number = lines[asked]
    return {
        "prompt": HEADER + "".join(LINE.format(key=k, number=n) for k, n in lines) + CLOSING + QUESTION.format(key=key),
        "answer": ANSWER.format(key=key, number=number),
        "references": [str(number)],
        "key": key,
        "number": number,
        "line": asked,
        "lines": len(lines),
    }


def sample(request: Request, rng: random.Random, index: int, room: LengthBudget) -> dict[str, Any]:
    """One sample of ``request.lines`` lines, or of as many as fit into the room.

    Returns:
        See ``render``.

    Raises:
        ValueError: not even one line fits.
    """
    record = Record(rng, room.accept)

    def of_size(count: int) -> dict[str, Any]:
        return render(record.first(count), int(record.position * count))

    if request.lines is not None:
        return of_size(request.lines)

    def length(count: int) -> int:
        drawn = of_size(count)
        return room.count(drawn["prompt"], drawn["answer"])

    return of_size(largest(length, room.tokens, what="line retrieval"))
