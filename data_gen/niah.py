"""Needle in a haystack: a sentence hidden in a long text is asked for (paper sections 4.1b, 5.3 and B.2).

Prompt, test needle and the way it is put in are those of the original (nightdessert/Retrieval_Head,
``needle_in_haystack_with_mask.py``); lengths are counted in the model's own chat, and the text is cut between words.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.console import first_line
from data_gen.fit_length import LengthBudget, largest
from data_gen.io import read_rows

if TYPE_CHECKING:
    from data_gen.dataset import Request

PROMPT = "<book>{context}</book>\nBased on the content of the book, Question: {question}\nAnswer:"
TEST_NEEDLE = {
    "needle": "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    "question": "What is the best thing to do in San Francisco?",
}
TEST_REFERENCE = "eat a sandwich and sit in Dolores Park on a sunny day"
DEPTHS = 10  # of a test grid: 0 to 100 per cent, as in Figure 5
NEEDLES = Path(__file__).parent / "needles.jsonl"  # the paper's ten (appendix B.2)
ESSAYS = "baber/paul_graham_essays"

# What the built-in haystack says: any of each row, in this order.
PROSE = (
    ("The", "Every", "Another", "That", "This", "One"),
    ("quiet", "small", "old", "young", "clever", "honest", "slow", "busy", "curious", "patient", "early", "famous"),
    ("writer", "founder", "painter", "student", "teacher", "reader", "company", "city", "garden", "river", "idea",
     "letter", "market", "problem", "question", "story"),
    ("of the", "near the", "behind the", "without a", "before the", "beside a"),
    ("house", "road", "school", "bridge", "library", "station", "harbour", "mountain", "office", "village", "window",
     "winter"),
    ("finds", "keeps", "changes", "explains", "follows", "forgets", "makes", "remembers", "sees", "wants", "leaves",
     "needs"),
    ("a better", "a new", "a plain", "the same", "the whole", "its own", "no other", "some other"),
    ("answer", "book", "chance", "friend", "letter", "mistake", "morning", "name", "plan", "reason", "thing", "way"),
    ("for a while", "in the end", "by accident", "every year", "at first", "after all", "on purpose", "without help"),
)  # fmt: skip


@dataclass(frozen=True)
class Haystack:
    """A text and where its words end.

    Attributes:
        text: without leading blanks.
        ends: for every word, the position in ``text`` behind it.
    """

    text: str
    ends: tuple[int, ...]

    def first(self, words: int) -> tuple[str, int]:
        """The first words, and how often the text begins again for want of more."""
        again, rest = divmod(words, len(self.ends))
        repeated = (self.text.rstrip() + "\n") * again
        return repeated + self.text[: self.ends[rest - 1] if rest else 0], max(0, again - (not rest))


def haystack(text: str) -> Haystack:
    """A haystack of a text."""
    text = text.lstrip()
    return Haystack(text, tuple(found.end() for found in re.finditer(r"\S+", text)))


def prose(rng: random.Random, sentences: int = 6000) -> str:
    """Plain English sentences without meaning, in paragraphs: a haystack where no text is at hand."""
    parts = []
    for number in range(1, sentences + 1):
        parts.append(" ".join(rng.choice(row) for row in PROSE) + "." + ("\n" if number % 8 == 0 else " "))
    return "".join(parts)


@functools.cache
def read(source: str) -> str:
    """The text of a haystack: a folder's ``*.txt`` in the order of their names, or ``essays`` from the hub.

    Raises:
        ValueError: no such folder, no text in it, not UTF-8, or the hub cannot be reached.
    """
    if source == "essays":
        from datasets import load_dataset

        try:
            return "\n".join(load_dataset(ESSAYS, split="train")["text"])
        except Exception as error:  # the libraries below raise a dozen kinds for one cause
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
    """The haystack of one sample: from its beginning, or turned so that it begins at a later paragraph."""
    if source == "prose":
        return haystack(prose(random.Random(seed)))
    text = read(source)
    cut = text.find("\n", int(len(text) * start)) + 1 if start else 0
    return haystack(text[cut:] + text[:cut])


@functools.cache
def needles(path: Path) -> list[dict[str, str]]:
    """Training needles with their questions.

    Raises:
        ValueError: the file is not JSON lines of ``needle`` and ``question``, is empty, or holds the test needle.
    """
    found = []
    for number, row in read_rows(path):
        try:
            pair = {key: row[key].strip() for key in ("needle", "question")}
            assert all(pair.values())
        except (KeyError, AttributeError, AssertionError):
            raise ValueError(f'{path}, line {number}: expected {{"needle": "...", "question": "..."}}') from None
        if plain(TEST_NEEDLE["needle"]) in plain(pair["needle"]) or TEST_REFERENCE in plain(pair["needle"]):
            raise ValueError(f"{path}, line {number}: this is the test needle, which must not be trained on")
        found.append(pair)
    if not found:
        raise ValueError(f"{path}: holds no needles")
    return found


def plain(text: str) -> str:
    """Lower case, single blanks."""
    return " ".join(text.lower().split())


def insert(context: str, needle: str, depth: float) -> str:
    """Put a needle at the last sentence end at or before ``depth`` per cent of a context; 100 is its very end."""
    if depth == 100:
        return f"{context}\n{needle}\n"
    ends = [found.end() for found in re.finditer(r"\.(?=\s)", context[: int(len(context) * depth / 100) + 1])]
    place = ends[-1] if ends and depth else 0
    return f"{context[:place]}\n{needle}\n{context[place:]}"


def sample(request: Request, rng: random.Random, index: int, room: LengthBudget) -> dict[str, Any]:
    """One needle in as much haystack as fits.

    Test samples walk through the depths of the grid with the paper's needle: one haystack serves all lengths and
    depths. Training samples draw needle, depth and the haystack's beginning.

    Raises:
        ValueError: not even one sentence of haystack fits.
    """
    source = request.haystack or "prose"
    if request.split == "test":
        pair, reference = TEST_NEEDLE, TEST_REFERENCE
        depths = request.depths or DEPTHS
        turn, step = divmod(index, depths)
        depth = round(100 * step / (depths - 1))
        hay = haystack_text(source, f"{request.seed}/test/{turn}", (turn * 0.381966) % 1)
    else:
        pair = rng.choice(needles(Path(request.needles) if request.needles else NEEDLES))
        reference, depth = pair["needle"], rng.randint(0, 100)
        hay = haystack_text(source, f"train/{rng.getrandbits(64)}", rng.random())

    def prompt(words: int) -> str:
        context = insert(hay.first(words)[0], pair["needle"], depth)
        return PROMPT.format(context=context, question=pair["question"])

    words = largest(lambda n: room.count(prompt(n), pair["needle"]), room.tokens, first=12, what="a needle's haystack")
    return {
        "prompt": prompt(words),
        "answer": pair["needle"],
        "references": [reference],
        "depth": depth,
        "words": words,
        "haystack_repeats": hay.first(words)[1],
    }


def sources(request: Request) -> dict[str, str]:
    """Hashes of the files that samples are made of, for the manifest."""
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()  # noqa: E731
    source = request.haystack or "prose"
    return {
        "haystack_sha256": digest(repr(PROSE) if source == "prose" else read(source)),
        "needles_sha256": digest(json.dumps(needles(Path(request.needles) if request.needles else NEEDLES))),
    }
