"""RULER's variable tracking, common words and frequent words (Hsieh et al. 2024), as the paper uses them (Table 2).

Wording, constants and the way samples are put together are NVIDIA's (NVIDIA/RULER, ``scripts/data/synthetic/``).
Their answer prefix is the start of the assistant's turn; a space that it ends in goes to the answer, so that a prompt's
tokens are the first tokens of the training sample. The generation budget counts into the length, as there.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import string
from typing import TYPE_CHECKING, Any

from data_gen.fit_length import LengthBudget, largest

if TYPE_CHECKING:
    from data_gen.dataset import Request

VT_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {names} variables are assigned the "
    "value {value}, they are: "
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HOPS = 4  # one chain of four hops: five variables
EXAMPLE_TOKENS = 500  # the worked example's length at most

CWE_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
# Repeats of common and of other words, then words and repeats of the worked example; below 4,096 tokens and above.
CWE_SHORT, CWE_LONG = ((6, 1), (20, 3, 1)), ((30, 3), (40, 10, 3))

FWE_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
ALPHA = 2.0
WORD_LETTERS = 6

# Tokens that may be generated.
BUDGET = {"vt": 30, "cwe": 120, "fwe": 50}


def turn(task: str, prompt: str, prefix: str, answer: str, references: list[str]) -> dict[str, Any]:
    """A sample: the assistant's turn begins with the prefix, chat templates putting their own space before it."""
    return {
        "prompt": prompt,
        "prefix": prefix.strip(),
        "answer": f"{prefix.strip()} {answer}",
        "references": references,
        "budget": BUDGET[task],
    }


def length(drawn: dict[str, Any], room: LengthBudget) -> int:
    """Tokens of a sample with its generation budget, or with its answer where that is longer."""
    full = room.count(drawn["prompt"], drawn["answer"])
    return max(full, room.count(drawn["prompt"], drawn["prefix"]) + drawn["budget"])


def draw_names(count: int, letters: int, rng: random.Random) -> list[str]:
    """Distinct names of capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def vt_input(names: list[str], value: str, positions: list[int], noises: int) -> tuple[str, str]:
    """Prompt and answer prefix for one chain, whose assignments stand before the noises at ``positions``, in order."""
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {later} = VAR {earlier} " for earlier, later in itertools.pairwise(names)]
    sentences = [NOISE] * noises
    for moved, (position, assignment) in enumerate(zip(positions, chain, strict=True)):
        sentences.insert(position + moved, assignment)
    context = "\n".join(sentences).replace(". \n", ".\n")
    return VT_PROMPT.format(context=context, value=value), VT_PREFIX.format(names=len(names), value=value)


def vt_example(names: list[str], value: str, positions: list[int], noises: int) -> str:
    """A worked example: prompt, prefix and answer."""
    return "".join(vt_input(names, value, positions, noises)) + " " + " ".join(names) + "\n"


def vt(request: Request, rng: random.Random, index: int, room: LengthBudget) -> dict[str, Any]:
    """Variable tracking: which variables hold a value, after one worked example of up to 500 tokens.

    Raises:
        ValueError: the length is too small for the example and one chain.
    """
    value, example_value = (str(rng.randrange(10_000, 99_999)) for _ in range(2))
    example_names = draw_names(HOPS + 1, 3, rng)
    names = draw_names(HOPS + 1, 5, rng)
    while not room.accept(" ".join(names)):
        names = draw_names(HOPS + 1, 5, rng)
    seed = rng.getrandbits(64)

    def positions(noises: int, of: str) -> list[int]:
        return sorted(random.Random(f"{seed}/{of}").sample(range(noises), HOPS + 1))

    def example(noises: int) -> str:
        return vt_example(example_names, example_value, positions(noises, "example"), noises)

    def whole(noises: int) -> dict[str, Any]:
        text, prefix = vt_input(names, value, positions(noises, "sample"), noises)
        return turn("vt", shown + "\n" + text, prefix, " ".join(names), names)

    def example_length(noises: int) -> int:
        return len(room.encode(example(noises)))

    shown = example(HOPS + 1)
    if example_length(HOPS + 1) <= EXAMPLE_TOKENS:  # with fewer noises there is nothing to hide a chain among
        shown = example(largest(example_length, EXAMPLE_TOKENS, first=HOPS + 1, what="vt"))
    noises = largest(lambda n: length(whole(n), room), room.tokens, first=HOPS + 1, what="vt")
    return {**whole(noises), "value": value, "noises": noises}


@functools.cache
def words() -> list[str]:
    """All nouns, adjectives and verbs of wonderwords, sorted."""
    from wonderwords import RandomWord

    pick = RandomWord()
    return sorted(
        {word.strip() for kind in ("noun", "adjective", "verb") for word in pick.filter(include_categories=[kind])}
    )


def word_list(chosen: list[str], common: int, other: int, rng: random.Random) -> list[str]:
    """Shuffled entries: the first ten of ``chosen`` occur ``common`` times, the rest ``other`` times."""
    entries = chosen[:COMMON] * common + chosen[COMMON:] * other
    rng.shuffle(entries)
    return entries


def numbered(entries: list[str]) -> str:
    """``1. one 2. two``."""
    return " ".join(f"{place}. {word}" for place, word in enumerate(entries, 1))


def cwe_example(entries: list[str], common: list[str]) -> str:
    """A worked example: prompt, prefix and answer."""
    return CWE_PROMPT.format(context=numbered(entries)) + f"{CWE_PREFIX} {numbered(common)}"


def cwe(request: Request, rng: random.Random, index: int, room: LengthBudget) -> dict[str, Any]:
    """Common words: the ten most frequent words of a long list, after one worked example.

    Raises:
        ValueError: the length is too small for the example and ten words, or needs more words than there are.
    """
    (common, other), (example_words, example_common, example_other) = CWE_SHORT if room.tokens < 4096 else CWE_LONG
    pool = words()
    chosen = rng.sample(pool, len(pool))
    while not room.accept(numbered(chosen[:COMMON])):
        chosen = rng.sample(pool, len(pool))
    seed = rng.getrandbits(64)
    example = rng.sample(pool, example_words)
    shown = cwe_example(word_list(example, example_common, example_other, rng), example[:COMMON])

    def whole(count: int) -> dict[str, Any]:
        if count > len(chosen):
            raise ValueError(f"tokens: {room.tokens} needs more than the {len(chosen)} words there are for cwe")
        entries = word_list(chosen[:count], common, other, random.Random(seed))
        prompt = f"{shown}\n{CWE_PROMPT.format(context=numbered(entries))}"
        return turn("cwe", prompt, CWE_PREFIX, numbered(chosen[:COMMON]), chosen[:COMMON])

    count = largest(lambda n: length(whole(n), room), room.tokens, first=COMMON + 1, what="cwe")
    return {**whole(count), "words": count}


def frequencies(total: int, vocabulary: int) -> list[int]:
    """How often each rank occurs among ``total`` words: Zeta-distributed with ``ALPHA``, rounded down."""
    zeta = math.pi**2 / 6  # of ALPHA = 2
    return [int(total * rank**-ALPHA / zeta) for rank in range(1, vocabulary + 1)]


def fwe(request: Request, rng: random.Random, index: int, room: LengthBudget) -> dict[str, Any]:
    """Frequent words: the three most frequent of coded words, ranks 2 to 4; the first rank is a row of dots.

    Raises:
        ValueError: the length is too small for four ranks of different frequency.
    """
    size = max((room.tokens - BUDGET["fwe"]) // 50, 5)

    def draw() -> list[str]:
        coded: dict[str, None] = {}
        while len(coded) < size:
            coded["".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS))] = None
        return ["...", *list(coded)[1:]]

    vocabulary = draw()
    while not room.accept(" ".join(vocabulary[1:4])):
        vocabulary = draw()
    seed = rng.getrandbits(64)
    top = vocabulary[1:4]

    def whole(total: int) -> dict[str, Any]:
        text = [word for word, n in zip(vocabulary, frequencies(total, size), strict=True) for _ in range(n)]
        random.Random(seed).shuffle(text)
        return turn("fwe", FWE_PROMPT.format(context=" ".join(text)), FWE_PREFIX, " ".join(top), top)

    # The fewest words among which ranks 1 to 5 occur equally rarely nowhere.
    first = next(n for n in range(1, 10_000) if len(set(frequencies(n, 5))) == 5)
    total = largest(lambda n: length(whole(n), room), room.tokens, first=first, what="fwe")
    return {**whole(total), "words": total}
