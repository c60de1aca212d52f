"""Line retrieval: LongEval's record of lines, one of which is asked for (paper section 4.1a and B.1).

The wording is LongEval's (DachengLi1/LongChat, ``longeval/utils.py``, option ``LRT-NL``), the answer is the
paper's (appendix B.1). Keys are ``adjective-noun`` pairs of the wonderwords lists, values lie in 1..50000.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_gen.sizing import largest

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


@dataclass(frozen=True)
class Record:
    """An endless record: the first ``n`` of its lines make a sample of ``n`` lines.

    Attributes:
        lines: ``(key, number)`` pairs, keys distinct.
        position: where in the record the question points, as a fraction in [0, 1).
    """

    lines: tuple[tuple[str, int], ...]
    position: float


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


def draw_keys(count: int, rng: random.Random) -> list[str]:
    """``count`` distinct keys; no adjective and no noun repeats before its whole list is used, as in LongEval."""
    adjectives, nouns = (list(column) for column in words())
    keys: dict[str, None] = {}
    while len(keys) < count:
        rng.shuffle(adjectives)
        rng.shuffle(nouns)
        keys.update(dict.fromkeys(f"{a}-{n}" for a, n in zip(adjectives, nouns, strict=False)))
    return list(keys)[:count]


def draw_record(count: int, rng: random.Random, accept: Callable[[str], bool] = lambda answer: True) -> Record:
    """A record of ``count`` lines, each of which may be asked for: numbers are redrawn until ``accept`` takes them."""
    position = rng.random()
    lines = []
    for key in draw_keys(count, rng):
        while not accept(ANSWER.format(key=key, number=(number := rng.randint(1, MAX_NUMBER)))):
            pass
        lines.append((key, number))
    return Record(tuple(lines), position)


def render(record: Record, count: int) -> dict[str, Any]:
    """The sample that the first ``count`` lines of ``record`` make.

    Returns:
        ``prompt``, ``answer``, ``key``, ``number``, ``line`` (0-based position of the asked line) and ``lines``.
    """
    body = record.lines[:count]
    line = int(record.position * count)
    key, number = body[line]
    return {
        "prompt": HEADER + "".join(LINE.format(key=k, number=n) for k, n in body) + CLOSING + QUESTION.format(key=key),
        "answer": ANSWER.format(key=key, number=number),
        "key": key,
        "number": number,
        "line": line,
        "lines": count,
    }


def sample(
    *, rng: random.Random, tokens: int | None, lines: int | None,
    count: Callable[[str, str], int], accept: Callable[[str], bool],
) -> dict[str, Any]:  # fmt: skip
    """One sample of ``lines`` lines, or of as many as fit into ``tokens``.

    Args:
        rng: source of all that is random.
        tokens: longest chat, in tokens; one line more would exceed it.
        lines: number of lines, where ``tokens`` is None.
        count: length of a chat in tokens, from prompt and answer.
        accept: which answers may be asked for.

    Returns:
        See ``render``.

    Raises:
        ValueError: not even one line fits.
    """
    if tokens is None:
        assert lines is not None
        return render(draw_record(lines, rng, accept), lines)
    # No tokenizer spends fewer than six tokens on a line, so this record is always long enough.
    record = draw_record(tokens // 6 + 18, rng, accept)

    def length(n: int) -> int:
        drawn = render(record, n)
        return count(drawn["prompt"], drawn["answer"])

    one, more = length(1), length(17)
    if one > tokens:
        raise ValueError(f"tokens: {tokens} is too short for line retrieval: one line makes {one} with this tokenizer")
    guess = 1 + (tokens - one) * 16 // (more - one)
    return render(record, largest(lambda n: length(n) <= tokens, guess))
