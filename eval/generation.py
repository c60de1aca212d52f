"""Stand-in until the real module lands."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from eval.prefix import answer


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return frozenset({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})


def generate_answers(
    model: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int],
    ends: Callable[[list[int]], bool] = lambda ids: False,
    batch_size: int | None = None,
    on_answer: Callable[[int, list[int]], object] = lambda index, ids: None,
) -> list[list[int]]:
    """Answer prompts."""
    return answer(model, prompts, max_new_tokens, set(stop), on_answer, ends)
