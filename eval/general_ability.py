"""General ability before and after tuning: perplexity, and how far the next-token distributions moved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from axolotl_plugins.seal.tune import Messages, encode

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

TEXTS = Path(__file__).parent / "general.jsonl"  # short passages and chats on everyday matters
BATCH = 16


def batches(
    encoded: list[tuple[torch.Tensor, int]], padding: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield ids and attention mask of shape (B, T), right-padded, and whether each token but the first is scored.

    Args:
        encoded: token ids of shape (1, T) and the position of the first token that is scored, at least 1.
        padding: id of padding.
        device: of the result.
    """
    encoded = sorted(encoded, key=lambda pair: pair[0].shape[1])
    for start in range(0, len(encoded), BATCH):
        part = encoded[start : start + BATCH]
        longest = part[-1][0].shape[1]
        ids = torch.cat([F.pad(row, (0, longest - row.shape[1]), value=padding) for row, _ in part])
        position = torch.arange(longest)
        ends = torch.tensor([row.shape[1] for row, _ in part])[:, None]
        first = torch.tensor([first for _, first in part])[:, None]
        mask, scored = position < ends, (position >= first) & (position < ends)
        yield ids.to(device), mask.long().to(device), scored[:, 1:].to(device)


@torch.inference_mode()
def general_ability(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], chats: list[Messages]
) -> dict[str, float]:
    """Compare a tuned model with its base on texts, and on the last turns of chats.

    Args:
        model: with an adapter, which is disabled for the base.
        tokenizer: with the model's chat template.
        texts: of at least two tokens each.
        chats: of at least two turns each.

    Returns:
        ``tokens`` scored; ``perplexity_base`` and ``perplexity`` over them and their ``ratio`` (tuned over base); and
        ``kl``, the mean of KL(base || tuned) per token in nats.

    Raises:
        ValueError: there is no text or chat.
    """
    if not texts and not chats:
        raise ValueError("texts, chats: found none, expected at least one")
    encoded = [(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"], 1) for text in texts]
    encoded += [encode(chat, tokenizer) for chat in chats]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    totals = torch.zeros(3, dtype=torch.float64)
    tokens = 0
    for ids, mask, scored in batches(encoded, padding, model.device):
        tuned = (
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][scored].float().log_softmax(-1)
        )
        with model.disable_adapter():
            base = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][scored]
        base = base.float().log_softmax(-1)
        target = ids[:, 1:][scored]
        kl = F.kl_div(tuned, base, log_target=True, reduction="sum")
        totals += torch.stack(
            [F.nll_loss(base, target, reduction="sum"), F.nll_loss(tuned, target, reduction="sum"), kl]
        ).cpu()
        tokens += len(target)
    before, after, divergence = (totals / tokens).tolist()
    return {
        "tokens": tokens,
        "perplexity_base": math.exp(before),
        "perplexity": math.exp(after),
        "ratio": math.exp(after - before),
        "kl": divergence,
    }
