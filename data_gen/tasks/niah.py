"""Needle in a haystack: a question for a sentence hidden in a long text (paper sections 4.1b, 5.3 and B.2).

Prompt, test needle and its insertion are those of the original (nightdessert/Retrieval_Head,
``needle_in_haystack_with_mask.py``); lengths are counted in the model's own chat, and the haystack ends between words.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import read_rows
from data_gen.fit_length import LengthBudget
from data_gen.metrics import rouge_recall
from data_gen.tasks.task import Request, Task, register

PROMPT = "<book>{context}</book>\nBased on the content of the book, Question: {question}\nAnswer:"
TEST_NEEDLE = {
    "needle": "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    "question": "What is the best thing to do in San Francisco?",
}
TEST_REFERENCE = "eat a sandwich and sit in Dolores Park on a sunny day"
DEPTHS = 10  # of test samples, 0 to 100 per cent (Figure 5)
NEEDLES = Path(__file__).parent / "needles.jsonl"  # the paper's ten (appendix B.2)
ESSAYS = "baber/paul_graham_essays"

# A sentence of the built-in haystack is one entry of each row.
PROSE = tuple(map(tuple, yaml.safe_load((Path(__file__).parent / "prose.yml").read_text())))


@dataclass(frozen=True)
class Haystack:
    """A text without leading whitespace."""

    text: str

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """End offset of each word in the text."""
        return tuple(word.end() for word in re.finditer(r"\S+", self.text))

    def first(self, words: int) -> tuple[str, int]:
        """Return the first ``words`` words, the text repeated as needed, and how often it is repeated."""
        full, rest = divmod(words, len(self.ends))
        repeated = (self.text.rstrip() + "\n") * full
        return repeated + self.text[: self.ends[rest - 1] if rest else 0], max(0, full - (not rest))


def prose(rng: random.Random, sentences: int = 6000) -> str:
    """Draw meaningless English sentences in paragraphs: the built-in haystack."""
    parts = []
    for number in range(1, sentences + 1):
        parts.append(" ".join(rng.choice(row) for row in PROSE) + "." + ("\n" if number % 8 == 0 else " "))
    return "".join(parts)


@functools.cache
def read(source: str) -> str:
    """Read the text of a haystack: a folder's ``*.txt``, sorted by name, or ``essays`` from the hub.

    Raises:
        ValueError: no such folder, no text in it, not UTF-8, or the hub cannot be reached.
    """
    if source == "essays":
        from datasets import load_dataset

        try:
            return "\n".join(load_dataset(ESSAYS, split="train")["text"])
        except Exception as error:  # datasets raises many types for a failed download
            raise ValueError(
                f"haystack: cannot fetch {ESSAYS} ({first_line(error)}): name a folder of text files instead"
            ) from error
    files = sorted(Path(source).glob("*.txt"))
    if not files:
        raise ValueError(f"haystack: no *.txt in {source!r}: name a folder of text files, or essays, or prose")
    parts = []
    for file in files:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError) as error:
            raise ValueError(f"haystack: cannot read {file} as UTF-8 text ({first_line(error)})") from error
    text = "".join(parts)
    if not text.strip():
        raise ValueError(f"haystack: the *.txt files in {source!r} are empty")
    return text


@functools.lru_cache(maxsize=4)
def haystack_text(source: str, seed: str, start: float) -> Haystack:
    """Return the haystack of a sample, rotated to begin at the first paragraph after the fraction ``start`` of it."""
    if source == "prose":
        return Haystack(prose(random.Random(seed)))
    text = read(source)
    cut = text.find("\n", int(len(text) * start)) + 1 if start else 0
    return Haystack((text[cut:] + text[:cut]).lstrip())


@functools.cache
def needles(path: Path) -> list[dict[str, str]]:
    """Read training needles with their questions.

    Raises:
        ValueError: the file is not JSON lines of ``needle`` and ``question``, is empty, or holds the test needle.
    """
    pairs = []
    for number, row in read_rows(path):
        try:
            pair = {key: row[key].strip() for key in ("needle", "question")}
            assert all(pair.values())
        except (KeyError, AttributeError, AssertionError):
            raise ValueError(f'{path}, line {number}: expected {{"needle": "...", "question": "..."}}') from None
        if plain(TEST_NEEDLE["needle"]) in plain(pair["needle"]) or TEST_REFERENCE in plain(pair["needle"]):
            raise ValueError(f"{path}, line {number}: this is the test needle, which must not be trained on")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: holds no needles")
    return pairs


def plain(text: str) -> str:
    """Return a text in lower case, runs of whitespace as single spaces."""
    return " ".join(text.lower().split())


def insert(context: str, needle: str, depth: float) -> str:
    """Insert a needle at the last sentence end within the first ``depth`` per cent of a context; 100 appends it."""
    if depth == 100:
        return f"{context}\n{needle}\n"
    ends = [match.end() for match in re.finditer(r"\.(?=\s)", context[: int(len(context) * depth / 100) + 1])]
    offset = ends[-1] if ends and depth else 0
    return f"{context[:offset]}\n{needle}\n{context[offset:]}"


def sample(request: Request, rng: random.Random, index: int, budget: LengthBudget) -> dict[str, Any]:
    """Draw a sample with as much haystack as fits.

    Test samples step through the depths with the paper's needle and share one haystack over all lengths and depths.
    Training samples draw needle, depth and the start of the haystack.

    Raises:
        ValueError: not even one sentence of haystack fits.
    """
    source = request.haystack or "prose"
    if request.split == "test":
        pair, reference = TEST_NEEDLE, TEST_REFERENCE
        depths = request.depths or DEPTHS
        cycle, step = divmod(index, depths)
        depth = round(100 * step / (depths - 1))
        hay = haystack_text(source, f"{request.seed}/test/{cycle}", (cycle * 0.381966) % 1)
    else:
        pair = rng.choice(needles(Path(request.needles) if request.needles else NEEDLES))
        reference, depth = pair["needle"], rng.randint(0, 100)
        hay = haystack_text(source, f"train/{rng.getrandbits(64)}", rng.random())

    def of_size(words: int) -> dict[str, Any]:
        text, repeats = hay.first(words)
        prompt = PROMPT.format(context=insert(text, pair["needle"], depth), question=pair["question"])
        return {"prompt": prompt, "answer": pair["needle"], "references": [reference], "depth": depth, "words": words,
                "haystack_repeats": repeats}  # fmt: skip

    return budget.fill(of_size, "a needle's haystack", first=12)


def haystack_hash(source: str | None) -> str:
    """Return the SHA-256 of a haystack's text."""
    text = repr(PROSE) if source in (None, "prose") else read(source)
    return hashlib.sha256(text.encode()).hexdigest()


def sources(request: Request) -> dict[str, str]:
    """Return the hashes of the files that samples are built from, for the manifest."""
    pairs = json.dumps(needles(Path(request.needles) if request.needles else NEEDLES))
    return {
        "haystack_sha256": haystack_hash(request.haystack),
        "needles_sha256": hashlib.sha256(pairs.encode()).hexdigest(),
    }


register(Task(
    name="niah", title="Needle in a haystack", description="needle in a haystack",
    source="nightdessert/Retrieval_Head, needle_in_haystack_with_mask.py", sample=sample, shortest=500,
    metric=rouge_recall, max_new_tokens=50, stop=("\n",),  # as there: decode_len 50, and an answer is one line
    options=("haystack", "needles", "depths"), sources=sources,
))  # fmt: skip
