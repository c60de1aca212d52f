"""What of a step tuning needs: logits of answers alone, and gradients no lower than the lowest scale."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

IGNORED = -100  # label of tokens that are not learned


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """The label of the token after each; that after the last is not learned.

    Args:
        labels: shape (B, T), -100 where a token is not learned.

    Raises:
        ValueError: no token has a label.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if not (shifted != IGNORED).any():
        raise ValueError(
            "a sample has no answer to learn from: its last turn is empty, or `roles_to_train` or `train_on_inputs` "
            "leaves nothing over"
        )
    return shifted


def answers_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """Ask a causal language model for the logits that its loss needs and no others.

    At T tokens and a vocabulary of V all logits take T x V float32 numbers, those of an answer a thousandth of that.

    Args:
        inputs: ``labels`` of shape (B, T), -100 where a token is not learned, or ``shift_labels``, those of the tokens
            after each; and whatever else the model takes.

    Returns:
        The same with ``logits_to_keep`` (positions that predict a token with a label in any row; one where there is
        none, for a model has to compute something) and ``shift_labels`` of these, which Transformers' losses know.

    Raises:
        ValueError: there are ``labels`` alone, and no token has one.
    """
    shifted = inputs["shift_labels"] if "shift_labels" in inputs else next_labels(inputs["labels"])
    keep = (shifted != IGNORED).any(0).nonzero()[:, 0]
    if not len(keep):
        keep = keep.new_zeros(1)
    return {**inputs, "logits_to_keep": keep, "shift_labels": shifted[:, keep]}


def no_embedding_gradients(model: PreTrainedModel) -> None:
    """Let gradients end at the lowest module that is trained; nothing changes where embeddings are.

    Transformers, PEFT and Axolotl each ask for gradients of the embeddings, without which reentrant checkpointing, in
    which a layer has gradients only if its input has, would give none; call this for any other training, and after
    them, for hooks run in the order in which they were added.
    """
    embeddings = model.get_input_embeddings()
    if not any(parameter.requires_grad for parameter in embeddings.parameters()):
        embeddings.register_forward_hook(lambda _, __, output: output.detach())
