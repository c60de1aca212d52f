"""More training needles from a language model, asked for in the paper's words (appendix B.2, Figure 3a)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from data_gen.io import write_text
from data_gen.niah import TEST_NEEDLE, TEST_REFERENCE, plain
from data_gen.openai_client import ask, text_of

PROMPT = (
    "I am trying to test the retrieval performance of the model. I need needle sentences to find in a long context, "
    "with the corresponding retrieval question. Here is one example case: "
    '"needle": "The first thing you notice upon entering the room is the bright green chair sitting in the center '
    'facing the window.", "question": "What is the first thing you notice upon entering the room?". '
    "I want to make 10 sets of needles and corresponding retrieval questions in jsonl format, like "
    '"needle": "...", "question": "...". '
    "Here are some restrictions about needles and questions. "
    "1. Since the purpose is to test only retrieval performance, the less it is related to general knowledge, the "
    "better. "
    "2. It is better to place the content corresponding to the question at the beginning of the needle sentence, like "
    "the given example. "
    "3. Keep the length of the needle similar to or longer than the length of the example needle provided. "
    '4. Please give variations to the format, "first thing". Can you make 10 sets of examples for me?'
)
# Half the example's length: what is shorter is not a sentence of the kind that was asked for.
SHORTEST = 55
PAIR = re.compile(r'"needle"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"question"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)


def parse(text: str) -> list[dict[str, str]]:
    """The needle and question pairs of an answer, with or without braces around them; what is unfit is left out.

    A pair is fit if the needle is one sentence of the length asked for and not the test needle, and the question ends
    in a question mark.
    """
    pairs = []
    for found in PAIR.finditer(text):
        try:
            needle, question = (" ".join(json.loads(part).split()) for part in found.groups())
        except json.JSONDecodeError:
            continue
        secret = plain(TEST_NEEDLE["needle"]) in plain(needle) or plain(TEST_REFERENCE) in plain(needle)
        if len(needle) >= SHORTEST and needle[-1] in ".!" and question.endswith("?") and not secret:
            pairs.append({"needle": needle, "question": question})
    return pairs


def collect(
    count: int, url: str, model: str, key: str | None, *, timeout: float = 120, tries: int = 5, pause: float = 1.0,
    progress: Callable[[int], object] = lambda n: n,
) -> list[dict[str, str]]:  # fmt: skip
    """Ask until there are ``count`` different needles.

    Raises:
        ValueError: the endpoint fails, or several answers in a row bring nothing new.
    """
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
    pairs: dict[str, dict[str, str]] = {}
    fruitless = 0
    while len(pairs) < count:
        before = len(pairs)
        text = ask(
            url, "chat/completions", body, lambda found: text_of(found["choices"][0]["message"]["content"]), key=key,
            timeout=timeout, tries=tries, pause=pause,
        )  # fmt: skip
        for pair in parse(text):
            pairs.setdefault(plain(pair["needle"]), pair)
        fruitless = 0 if len(pairs) > before else fruitless + 1
        if fruitless == tries:
            raise ValueError(f"{url}: {tries} answers in a row held no new needle; {len(pairs)} of {count} found")
        progress(min(len(pairs), count))
    return list(pairs.values())[:count]


def write(pairs: list[dict[str, str]], out: Path) -> None:
    """Write needles as JSON lines, for ``--needles``."""
    write_text(out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
