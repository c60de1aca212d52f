"""Generate more training needles with a language model and the paper's prompt (appendix B.2, Figure 3a)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from data_gen.openai_client import ask, text_of
from data_gen.tasks.niah import TEST_NEEDLE, TEST_REFERENCE, plain

PROMPT = " ".join((Path(__file__).parent / "tasks" / "needles_prompt.md").read_text(encoding="utf-8").split())
# Characters; half the length of the prompt's example, which asks for needles of similar length.
SHORTEST = 55
PAIR = re.compile(r'"needle"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"question"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)


def parse(text: str) -> list[dict[str, str]]:
    """Extract pairs of needle and question from a response, with or without braces; drop invalid ones.

    A pair is valid if the needle is a sentence of at least ``SHORTEST`` characters and not the test needle, and the
    question ends in a question mark.
    """
    pairs = []
    for match in PAIR.finditer(text):
        try:
            needle, question = (" ".join(json.loads(part).split()) for part in match.groups())
        except json.JSONDecodeError:
            continue
        is_test = plain(TEST_NEEDLE["needle"]) in plain(needle) or plain(TEST_REFERENCE) in plain(needle)
        if len(needle) >= SHORTEST and needle[-1] in ".!" and question.endswith("?") and not is_test:
            pairs.append({"needle": needle, "question": question})
    return pairs


def collect(
    count: int, url: str, model: str, key: str | None, *, timeout: float = 120, tries: int = 5, pause: float = 1.0,
    progress: Callable[[int], object] = lambda n: n,
) -> list[dict[str, str]]:  # fmt: skip
    """Query an endpoint until there are ``count`` different needles.

    Args:
        count: number of needles.
        url: of an OpenAI-compatible endpoint.
        model: its name there.
        key: see ``data_gen.openai_client.ask``, also for ``timeout`` and ``pause``.
        timeout: in seconds.
        tries: attempts per request, and responses in a row that may hold nothing new.
        pause: in seconds.
        progress: called with the number of needles collected.

    Raises:
        ValueError: the endpoint fails, or ``tries`` responses in a row hold no new needle.
    """
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
    pairs: dict[str, dict[str, str]] = {}
    unproductive = 0
    while len(pairs) < count:
        before = len(pairs)
        text = ask(
            url, "chat/completions", body, lambda response: text_of(response["choices"][0]["message"]["content"]),
            key=key, timeout=timeout, tries=tries, pause=pause,
        )  # fmt: skip
        for pair in parse(text):
            pairs.setdefault(plain(pair["needle"]), pair)
        unproductive = 0 if len(pairs) > before else unproductive + 1
        if unproductive == tries:
            raise ValueError(f"{url}: {tries} answers in a row held no new needle; {len(pairs)} of {count} found")
        progress(min(len(pairs), count))
    return list(pairs.values())[:count]
