"""Variable tracking: which variables have a value, after one worked example of up to 500 tokens (RULER)."""

from __future__ import annotations

import itertools
import random
from typing import Any

from data_gen.fit_length import LengthBudget, largest
from data_gen.metrics import string_match_all
from data_gen.tasks.ruler import SOURCE, draw_names, make_sample
from data_gen.tasks.task import Request, Task, register

PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {names} variables are assigned the "
    "value {value}, they are: "
)
PREFIX_2024 = PREFIX.replace("assigned", "assgined")  # sic
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HOPS = 4  # one chain of four hops: five variables
EXAMPLE_TOKENS = 500  # at most, of the worked example
STEP_2024, EXAMPLE_STEP_2024 = 10, 5  # noise sentences
MAX_NEW_TOKENS = 30  # RULER's tokens_to_generate


def render(
    names: list[str], value: str, positions: list[int], noises: int, version: int | None = None
) -> tuple[str, str]:
    """Return prompt and answer prefix of one chain.

    Args:
        names: variables in the order of their assignments.
        value: of all variables.
        positions: ascending; assignment ``i`` precedes the noise sentence ``positions[i]``.
        noises: number of noise sentences.
        version: of RULER. In 2024 lines end behind noise only, so that assignments stand before the noise of a line.
    """
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {later} = VAR {earlier} " for earlier, later in itertools.pairwise(names)]
    sentences = [NOISE + "\n" * (version == 2024)] * noises
    for inserted, (position, assignment) in enumerate(zip(positions, chain, strict=True)):
        sentences.insert(position + inserted, assignment)
    context = (" " if version == 2024 else "\n").join(sentences).replace(". \n", ".\n")
    prefix = PREFIX_2024 if version == 2024 else PREFIX
    return PROMPT.format(context=context, value=value), prefix.format(names=len(names), value=value)


def render_example(names: list[str], value: str, positions: list[int], noises: int, version: int | None = None) -> str:
    """Return a worked example (prompt, prefix and answer) with the blank line behind it.

    Under a chat template RULER's program of 2024 joined the words of the example's instructions by single spaces.
    """
    prompt, prefix = render(names, value, positions, noises, version)
    if version == 2024:
        head, tail = PROMPT.split("{context}")
        context = prompt.removeprefix(head).removesuffix(tail.format(value=value))
        prompt = " ".join(PROMPT.split()).format(context=context, value=value)
    return f"{prompt}{prefix} {' '.join(names)}" + "\n" * (4 if version == 2024 else 2)


def sample(request: Request, rng: random.Random, index: int, budget: LengthBudget) -> dict[str, Any]:
    """Draw a sample with as many noise sentences as fit, in RULER's steps of that year.

    Raises:
        ValueError: the length is too small for the example and one chain.
    """
    value, example_value = (str(rng.randrange(10_000, 99_999)) for _ in range(2))
    example_names = draw_names(HOPS + 1, 3, rng)
    names = draw_names(HOPS + 1, 5, rng)
    while not budget.accept(" ".join(names)):
        names = draw_names(HOPS + 1, 5, rng)
    seed = rng.getrandbits(64)

    def positions(noises: int, part: str) -> list[int]:
        return sorted(random.Random(f"{seed}/{part}").sample(range(noises), HOPS + 1))

    def example_of_size(noises: int) -> str:
        return render_example(example_names, example_value, positions(noises, "example"), noises, request.ruler_version)

    def example_length(noises: int) -> int:
        return len(budget.encode(example_of_size(noises).rstrip("\n") + "\n"))

    def of_size(noises: int) -> dict[str, Any]:
        text, prefix = render(names, value, positions(noises, "sample"), noises, request.ruler_version)
        answer, facts = " ".join(names), {"value": value, "noises": noises}
        return make_sample(example + text, prefix, answer, names, MAX_NEW_TOKENS, **facts)

    # Fewer noise sentences than assignments hide no chain.
    first, step, example_step, example_tokens = HOPS + 1, 1, 1, EXAMPLE_TOKENS
    if request.ruler_version == 2024:  # it counts an answer in the example's length
        first, step, example_step = STEP_2024, STEP_2024, EXAMPLE_STEP_2024
        example_tokens -= MAX_NEW_TOKENS
    example = example_of_size(first)
    if example_length(first) <= example_tokens:
        example = example_of_size(largest(example_length, example_tokens, first=first, step=example_step, what="vt"))
    return budget.fill(of_size, "vt", first, step)


register(Task(
    name="vt", title="Variable tracking", description="RULER's variable tracking", source=SOURCE, sample=sample,
    shortest=1500, metric=string_match_all, max_new_tokens=MAX_NEW_TOKENS, group="ruler",
    options=("ruler_version",),
))  # fmt: skip
