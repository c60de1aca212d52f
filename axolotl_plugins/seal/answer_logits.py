"""Logits for answer tokens only; backprop stops at the lowest scaled layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

IGNORED = -100  # label of tokens without a loss


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """Shift labels to the left by one token; the last position is ignored.

    Args:
        labels: shape (B, T), -100 where a token has no loss.

    Returns:
        Shape (B, T): at each position the label of the next token.

    Raises:
        ValueError: no token has a label.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if not (shifted != IGNORED).any():
        raise ValueError(
            "a sample has no token to train on: its last turn is empty, or `roles_to_train` or `train_on_inputs` "
            "masks every token"
        )
    return shifted


def answers_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """Restrict a causal language model's logits to the positions that its loss needs.

    All logits of T tokens and a vocabulary of V take T x V float32 values, those of an answer about a thousandth of it.

    Args:
        inputs: keyword arguments of the model, with ``labels`` of shape (B, T), -100 where a token has no loss, or
            ``shift_labels``, see ``next_labels``.

    Returns:
        The inputs with ``logits_to_keep`` (positions that predict a labelled token in any row; one position if there is
        none, because models need at least one) and their ``shift_labels``, an argument of Transformers' losses.

    Raises:
        ValueError: there are only ``labels``, and no token has a label.
    """
    shifted = inputs["shift_labels"] if "shift_labels" in inputs else next_labels(inputs["labels"])
    keep = (shifted != IGNORED).any(0).nonzero()[:, 0]
    if not len(keep):
        keep = keep.new_zeros(1)
    return {**inputs, "logits_to_keep": keep, "shift_labels": shifted[:, keep]}


def no_embedding_gradients(model: PreTrainedModel) -> None:
    """Stop backprop at the lowest trainable module by detaching the embeddings' output, unless they are trained.

    Transformers, PEFT and Axolotl each make that output require gradients, which only reentrant checkpointing needs: it
    gives a layer gradients only if its input requires them. Call this for any other training, after those libraries,
    because hooks run in the order of registration.
    """
    embeddings = model.get_input_embeddings()
    if not any(parameter.requires_grad for parameter in embeddings.parameters()):
        embeddings.register_forward_hook(lambda _, __, output: output.detach())
