"""Controls of a gain from tuning: scales in other places, and answers that are wrong."""

from __future__ import annotations

import random
from typing import Any, get_args

import torch
from torch import nn

from axolotl_plugins.common.tokenizer import Messages
from axolotl_plugins.seal import Placement
from axolotl_plugins.seal.layer import SealLayer


def seal_layers(model: nn.Module) -> list[SealLayer]:
    """Return the wrapped modules, from the lowest layer."""
    return [module for module in model.modules() if isinstance(module, SealLayer)]


@torch.no_grad()
def shuffle_heads(model: nn.Module, rng: random.Random) -> None:
    """Permute whole heads' scales over all layers, within each placement: the same values in other places."""
    for placement in get_args(Placement):
        parts = [(layer, heads) for layer in seal_layers(model) if (heads := layer.site.heads_of(placement))]
        scales = [layer.seal_scale["default"].view(layer.num_heads, -1)[heads] for layer, heads in parts]
        if scales:
            rows = torch.cat(scales).cpu()
            order = rng.sample(range(len(rows)), len(rows))
            for scale, picked in zip(scales, torch.tensor(order).split(len(scales[0])), strict=True):
                scale.copy_(rows[picked])


@torch.no_grad()
def weight_scales(model: nn.Module, weight: float) -> None:
    """Set every scale to ``1 + weight * (scale - 1)``, as ``seal combine`` does with a folder."""
    for layer in seal_layers(model):
        scale = layer.seal_scale["default"]
        scale.copy_(1 + weight * (scale - 1))


def of_others(items: list[Any], rng: random.Random) -> list[Any]:
    """Rotate items by a random amount, so that each stands in another's place.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(items) < 2:
        raise ValueError("samples: found 1, expected at least 2, so that each can have another's answer")
    turn = rng.randrange(1, len(items))
    return items[turn:] + items[:turn]


def wrong_facts(chats: list[Messages], facts: list[str], rng: random.Random) -> list[Messages]:
    """Replace the key fact in every chat's answer by that of another sample.

    Raises:
        ValueError: an answer does not contain its fact; or see ``of_others``.
    """
    for chat, fact in zip(chats, facts, strict=True):
        if fact not in chat[-1]["content"]:
            raise ValueError(f"controls: the answer {chat[-1]['content'][:60]!r} does not contain its first reference, "
                             f"{fact!r}, which wrong facts replace: put one first that it contains")  # fmt: skip
    return [
        [*chat[:-1], {**chat[-1], "content": chat[-1]["content"].replace(mine, other)}]
        for chat, mine, other in zip(chats, facts, of_others(facts, rng), strict=True)
    ]


def wrong_answers(chats: list[Messages], rng: random.Random) -> list[Messages]:
    """Replace every chat's answer by the whole answer of another sample."""
    answers = of_others([chat[-1] for chat in chats], rng)
    return [[*chat[:-1], answer] for chat, answer in zip(chats, answers, strict=True)]
