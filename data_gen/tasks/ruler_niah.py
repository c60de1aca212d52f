"""RULER's eight needle tasks: numbers or UUIDs of keys, hidden among noise, essays or other needles (its Table 2).

Two deviations: sentences end at punctuation (RULER asks NLTK), and no distractor has a key that is asked for.
"""

from __future__ import annotations

import functools
import random
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_gen.described_task import words
from data_gen.fit_length import LengthBudget
from data_gen.metrics import string_match_all
from data_gen.tasks import niah
from data_gen.tasks.ruler import SOURCE, make_sample
from data_gen.tasks.task import Request, Task, register
from data_gen.tasks.vt import NOISE

PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # per cent of an essay's sentences
MAX_NEW_TOKENS = 128  # RULER's tokens_to_generate


RANDOM: dict[str, Callable[[random.Random], str]] = {
    "words": lambda rng: "-".join(rng.choice(words(kind)) for kind in ("adjective", "noun")),
    "numbers": lambda rng: str(rng.randint(10**6, 10**7 - 1)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


@dataclass(frozen=True)
class Variant:
    """What a task hides and asks for.

    Attributes:
        haystack: ``noise``, ``essay``, or ``needle`` for other needles.
        keys: kind of the keys, a key of ``RANDOM``.
        kind: of the values.
        num_keys: needles with different keys.
        values: needles of each key.
        queries: keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    kind: str = "numbers"
    num_keys: int = 1
    values: int = 1
    queries: int = 1


VARIANTS = {
    "niah_single_1": Variant("noise"),
    "niah_single_2": Variant("essay"),
    "niah_single_3": Variant("essay", kind="uuids"),
    "niah_multikey_1": Variant("essay", num_keys=4),
    "niah_multikey_2": Variant("needle"),
    "niah_multikey_3": Variant("needle", keys="uuids", kind="uuids"),
    "niah_multivalue": Variant("essay", values=4),
    "niah_multiquery": Variant("essay", num_keys=4, queries=4),
}


def hide_in_lines(lines: list[str], needles: list[str], positions: list[int]) -> str:
    """Insert needles into lines; the first needle goes to the last of the ascending positions, as in RULER."""
    lines = list(lines)
    for position, needle in zip(reversed(positions), needles, strict=True):
        lines.insert(position, needle)
    return "\n".join(lines)


def hide_in_text(text: str, needles: list[str], depths: list[int]) -> str:
    """Insert needles between sentences, in order, at depths in per cent."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
    parts = []
    for needle, start, end in zip([*needles, None], cuts, cuts[1:], strict=False):
        parts += [" ".join(sentences[start:end]), *([needle] if needle else [])]
    return " ".join(parts)


def render(variant: Variant, context: str, queries: list[str]) -> tuple[str, str]:
    """Return prompt and answer prefix; both are singular if one value is asked for."""
    prompt, prefix, kind = PROMPT, PREFIX, variant.kind
    if variant.queries * variant.values == 1:
        kind = kind.removesuffix("s")
        prompt, prefix = (
            text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in (prompt, prefix)
        )
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    return prompt.format(kind=kind, context=context, query=query), prefix.format(kind=kind, query=query)


def sample(variant: Variant, request: Request, rng: random.Random, index: int, budget: LengthBudget) -> dict[str, Any]:
    """Draw a sample with as much haystack as fits.

    Raises:
        ValueError: the length is too small for the needles.
    """
    keys = [RANDOM[variant.keys](rng) for _ in range(variant.num_keys)]
    queries = rng.sample(keys, variant.queries)
    values: dict[str, list[str]] = {}
    while not values or not budget.accept(" ".join(answer for key in queries for answer in values[key])):
        values = {key: [RANDOM[variant.kind](rng) for _ in range(variant.values)] for key in keys}
    references = [value for key in queries for value in values[key]]
    pairs = [(key, value) for key in keys for value in values[key]]
    rng.shuffle(pairs)
    needles = [NEEDLE.format(kind=variant.kind, key=key, value=value) for key, value in pairs]
    seed = rng.getrandbits(64)
    source = request.haystack or "prose"
    hay = (
        niah.haystack_text(source, f"{request.seed}/test", 0.0)
        if request.split == "test"
        else niah.haystack_text(source, f"train/{rng.getrandbits(64)}", rng.random())
    )
    words = hay.text.split() if variant.haystack == "essay" else []

    def context(size: int) -> str:
        generator = random.Random(f"{seed}/{size}")
        if variant.haystack == "essay":
            repeated = words * -(-size // len(words))
            return hide_in_text(" ".join(repeated[:size]), needles, generator.sample(DEPTHS, len(needles)))
        lines = [NOISE] * size if variant.haystack == "noise" else distractors(variant, size, seed, queries)
        return hide_in_lines(lines, needles, sorted(generator.sample(range(size), len(needles))))

    def of_size(size: int) -> dict[str, Any]:
        prompt, prefix = render(variant, context(size), queries)
        return make_sample(prompt, prefix, ", ".join(references), references, MAX_NEW_TOKENS, keys=queries, size=size)

    first = 10 if variant.haystack == "essay" else len(needles)
    return budget.fill(of_size, "the needles", first)


def distractors(variant: Variant, size: int, seed: int, excluded: list[str]) -> list[str]:
    """Return other needles, none with an excluded key; those of a smaller size come first in those of a larger."""
    generator = random.Random(f"{seed}/distractors")
    lines: list[str] = []
    while len(lines) < size:
        key, value = RANDOM[variant.keys](generator), RANDOM[variant.kind](generator)
        if key not in excluded:
            lines.append(NEEDLE.format(kind=variant.kind, key=key, value=value))
    return lines


for name, variant in VARIANTS.items():
    uses_haystack = variant.haystack == "essay"
    register(Task(
        name=name, title=name, description=f"RULER's {name}", source=SOURCE,
        sample=functools.partial(sample, variant), shortest=600, metric=string_match_all,
        max_new_tokens=MAX_NEW_TOKENS, group="ruler_niah", options=("haystack",) if uses_haystack else (),
        sources=(lambda request: {"haystack_sha256": niah.haystack_hash(request.haystack)}) if uses_haystack
        else lambda request: {},
    ))  # fmt: skip
