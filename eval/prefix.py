"""Greedy answers to prompts that begin alike: what they share is computed once.

The prompts of a needle grid have one haystack, and several questions may be asked about one context. In sorted order
every prompt shares its longest prefix with its neighbour, so that one key-value cache, cropped and extended, visits
each edge of the prompts' prefix tree exactly once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

# From this saving on: prompts are answered one at a time here, so that batches asked for must be outdone as well.
WORTHWHILE = 1.2
WORTHWHILE_INSTEAD_OF_BATCHES = 2.0


def common(one: list[int], two: list[int]) -> int:
    """Length of the common prefix."""
    for place, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return place
    return min(len(one), len(two))


def new_tokens(prompts: list[list[int]]) -> int:
    """How many tokens of all prompts have to be computed when shared prefixes are computed once."""
    total = 0
    before: list[int] = []
    for prompt in sorted(prompts):
        total += len(prompt) - min(common(before, prompt), len(prompt) - 1)
        before = prompt
    return total


def saving(prompts: list[list[int]]) -> float:
    """All tokens over those that have to be computed."""
    return sum(map(len, prompts)) / max(1, new_tokens(prompts))


def can_crop(model: PreTrainedModel) -> bool:
    """Whether every layer keeps all keys, so that a cache can be cut back; sliding windows forget."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(config, "sliding_window", None)


@torch.inference_mode()
def answer(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, stop: set[int],
    done: Callable[[int, list[int]], object] = lambda index, ids: None,
    ended: Callable[[list[int]], bool] = lambda ids: False,
) -> list[list[int]]:  # fmt: skip
    """Greedy continuations.

    Args:
        model: a causal language model that keeps all keys, see ``can_crop``.
        prompts: token ids.
        max_new_tokens: most tokens of an answer.
        stop: ids that end an answer; they are not part of it.
        done: called with a prompt's place and its answer.
        ended: whether an answer ends here; what ends it is part of it.

    Returns:
        Token ids of the answers, in the order of the prompts.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    cache = DynamicCache(config=model.config)
    held: list[int] = []
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):
        prompt = prompts[index]
        # The last token is computed again where all are shared: its logits are needed.
        shared = min(common(held, prompt), len(prompt) - 1)
        cache.crop(shared - cache.get_seq_length())
        step = prompt[shared:]
        while True:
            ids = torch.tensor([step], device=model.device)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            if token in stop:
                break
            answers[index].append(token)
            if len(answers[index]) == max_new_tokens or ended(answers[index]):
                break
            step = [token]
        cache.crop(len(prompt) - cache.get_seq_length())
        held = prompt
        done(index, answers[index])
    return answers
