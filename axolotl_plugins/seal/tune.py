"""Training without Axolotl: the paper's recipe as one function."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm

from axolotl_plugins.common.tokenizer import Messages, check_template, encode_chat
from axolotl_plugins.common.window import condensed, stated_window

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

MAX_GRADIENT_NORM = 1.0  # to which gradients are clipped


def encode(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, int]:
    """Tokenize a chat; return its ids, int64 of shape (1, T), and the index of the first token of its last turn.

    Blanks that a template writes after the token that ends the turn (ChatML's line break) are dropped: Axolotl does not
    train on them either, and no answer has them.

    Raises:
        ValueError: the chat has fewer than two turns or an empty one, or see ``encode_chat``.
    """
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError(f"a chat: found {str(messages)[:60]!r}, expected a list of turns that ends with an answer")
    if not all(str(turn.get("content") or "").strip() for turn in messages):
        raise ValueError(f"a chat: a turn of {str(messages)[:60]!r} is empty")
    ids, start = encode_chat(tokenizer, messages)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    end = next((i + 1 for i in reversed(range(start, len(ids))) if ids[i] in special), len(ids))
    return torch.tensor([ids if tokenizer.decode(ids[end:]).strip() else ids[:end]]), start


def check_window(model: PeftModel, tokens: int) -> None:
    """Raise ValueError unless a sample fits into the window of a model whose RoPE is what its config says."""
    if condensed(model.config):
        raise ValueError(
            "rope_condense_ratio: Transformers ignores it: load the model with `config=read_config(NAME)` of "
            "axolotl_plugins.common.window"
        )
    if (window := stated_window(model.config)) and tokens > window:
        raise ValueError(f"a chat of {tokens} tokens does not fit into the model's window of {window}: shorten it")


def answer_loss(model: torch.nn.Module, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Compute the mean cross-entropy of the tokens from ``start`` on, with logits for these tokens only.

    Args:
        model: a causal language model.
        ids: shape (1, T).
        start: index of the first token in the loss, at least 1.
    """
    count = ids.shape[1] - start
    logits = model(input_ids=ids, logits_to_keep=count + 1, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), ids[0, start:])


def tune(
    model: PeftModel, chats: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, *, lr: float, epochs: int = 1,
    seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train on answers: AdamW, constant learning rate, batch size 1, no weight decay (paper sections 4.1, 5 and A).

    Args:
        model: wrapped by any PEFT method; only its trainable parameters change.
        chats: chats that end with the answer.
        tokenizer: with the model's chat template, whose variables ``axolotl_plugins.common.tokenizer.with_arguments``
            sets.
        lr: learning rate, in the paper 1e-2 or 2e-2 for line retrieval.
        epochs: passes over the samples, in the paper 1.
        seed: seed of the samples' order.

    Returns:
        The loss of every step.

    Raises:
        ValueError: no trainable parameters, no chats, an invalid learning rate, or a chat that cannot be tokenized or
            exceeds the model's window.
        FloatingPointError: a loss is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameters: wrap it with get_peft_model first")
    if not chats or epochs < 1:
        raise ValueError(f"found {len(chats)} chats and {epochs} epochs, expected at least 1 of each")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: found {lr}, expected a number above 0; the paper's lie between 5e-3 and 5e-2")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    check_template(tokenizer, tokenizer.name_or_path)
    samples = [encode(chat, tokenizer) for chat in chats]
    check_window(model, max(ids.shape[1] for ids, _ in samples))
    order = random.Random(seed)
    losses: list[float] = []
    was_training = model.training
    model.train()
    for _ in range(epochs):
        for ids, start in tqdm(order.sample(samples, len(samples)), desc="tuning", leave=False, disable=None):
            loss = answer_loss(model, ids.to(parameters[0].device), start)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {len(losses) + 1}: lower lr ({lr:g})")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            losses.append(loss.item())
    model.train(was_training)
    return losses
