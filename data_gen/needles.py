"""More training needles from a language model, asked for in the paper's words (appendix B.2, Figure 3a)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from data_gen.console import first_line
from data_gen.files import write_text
from data_gen.niah import TEST_NEEDLE, TEST_REFERENCE, plain

KEY = "OPENAI_API_KEY"
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
LARGEST_ANSWER = 200_000
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


def ask(url: str, model: str, key: str | None, *, timeout: float, tries: int, pause: float) -> str:
    """One answer of an OpenAI-compatible endpoint; what may pass (time-outs, 429, 5xx) is tried again.

    Raises:
        ValueError: no answer after ``tries``, or the endpoint refuses; the message never holds the key.
    """
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    problem = ""
    for trial in range(tries):
        if trial:
            time.sleep(pause * 2 ** (trial - 1))
        try:
            answer = httpx.post(f"{url.rstrip('/')}/chat/completions", json=body, headers=headers, timeout=timeout)
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            continue
        except httpx.InvalidURL as error:
            raise ValueError(f"base-url: found {url!r}, which is no address ({first_line(error)})") from None
        if answer.status_code == 429 or answer.status_code >= 500:
            problem = f"status {answer.status_code}"
            continue
        if answer.status_code != 200:
            hint = f": is {KEY} right?" if answer.status_code in (401, 403) else ""
            raise ValueError(f"{url} refuses with status {answer.status_code}{hint}")
        try:
            if len(answer.content) > LARGEST_ANSWER:
                raise ValueError("longer than a list of needles can be")
            content = answer.json()["choices"][0]["message"]["content"]
            if not isinstance(content, str):
                raise TypeError("its content is not text")
            return content
        except (ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"not a chat completion ({type(error).__name__})"
    raise ValueError(f"{url} gave no usable answer in {tries} tries; the last: {problem}")


def collect(
    count: int, url: str, model: str, key: str | None, *, timeout: float = 120, tries: int = 5, pause: float = 1.0,
    progress: Callable[[int], object] = lambda n: n,
) -> list[dict[str, str]]:  # fmt: skip
    """Ask until there are ``count`` different needles.

    Raises:
        ValueError: the endpoint fails, or several answers in a row bring nothing new.
    """
    pairs: dict[str, dict[str, str]] = {}
    fruitless = 0
    while len(pairs) < count:
        before = len(pairs)
        for pair in parse(ask(url, model, key, timeout=timeout, tries=tries, pause=pause)):
            pairs.setdefault(plain(pair["needle"]), pair)
        fruitless = 0 if len(pairs) > before else fruitless + 1
        if fruitless == tries:
            raise ValueError(f"{url}: {tries} answers in a row held no new needle; {len(pairs)} of {count} found")
        progress(min(len(pairs), count))
    return list(pairs.values())[:count]


def write(pairs: list[dict[str, str]], out: Path) -> None:
    """Write needles as JSON lines, for ``--needles``."""
    write_text(out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
