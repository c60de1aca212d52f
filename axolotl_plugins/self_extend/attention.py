"""Self-Extend (Jin et al. 2024, arXiv 2401.01325): a longer window without training, in linear memory.

Keys nearer than ``neighbor_window`` tokens are attended to at their true distance, all others at a distance in groups
of ``group_size`` tokens, so that no distance exceeds those of pretraining. Section 6 of the SEAL paper trains through
it, with groups of 6 and a neighbour window of 1,024 tokens.

The model's config enables it: ``rope_parameters: {rope_type: self_extend, rope_theta: ..., group_size: 6,
neighbor_window: 1024}``. With a window of w and groups of G, ``w - w // G`` is added to distances in groups, so that
they continue the near ones; with ``exact_offset: true`` it is ``w - w / G``, as in the prefill of the original program.

Importing this package registers the RoPE type with Transformers; without it, loading such a model fails instead of
running at positions beyond pretraining.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "self_extend"
# These pair rotary channels as (i, i + d / 2); re-rotation is wrong for other pairings.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
# Queries of a chunk, whose scores (B, H, QUERIES, T) are the largest tensor. Takes a third of the time of 512 on a CPU.
QUERIES = 128


def slides(config: PreTrainedConfig) -> bool:
    """Return whether a model uses sliding-window attention."""
    return bool(getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None))


def settings(config: PreTrainedConfig) -> tuple[int, int, float]:
    """Return the group size and the neighbour window of a config, and what it adds to far distances, in tokens.

    Raises:
        ValueError: they are missing or invalid, or the architecture is not supported.
    """
    rope = config.rope_parameters
    group, window = rope.get("group_size"), rope.get("neighbor_window")
    for key, value in (("group_size", group), ("neighbor_window", window)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"rope_parameters.{key}: found {value!r}, expected a whole number of tokens from 1")
    if not isinstance(exact := rope.get("exact_offset", False), bool):
        raise ValueError(f"rope_parameters.exact_offset: found {exact!r}, expected true or false")
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"self_extend: found {config.model_type}, expected one of {', '.join(MODEL_TYPES)}")
    if slides(config):
        raise ValueError("self_extend: the model has sliding-window attention: set `sliding_window: null`")
    return group, window, window - (window / group if exact else window // group)


def inverse_frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """Return RoPE's inverse frequencies, float32 of shape (rotary channels / 2,) (Su et al. 2021, section 3.2.2)."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, rotary, 2, dtype=torch.float) / rotary)


def compute_rope(config: PreTrainedConfig, device: torch.device | None = None, **_: Any) -> tuple[torch.Tensor, float]:
    """Compute the inverse frequencies for Transformers' RoPE registry, and set the attention implementation.

    Raises:
        ValueError: see ``settings``.
    """
    settings(config)
    config._attn_implementation = NAME
    return inverse_frequencies(config).to(device), 1.0


def rotate(x: torch.Tensor, shift: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys by further positions; rotations add up, so this moves them to another position.

    Args:
        x: shape (B, H, T, D), after RoPE.
        shift: shape (B or 1, T), in tokens.
        frequencies: shape (rotary channels / 2,).
    """
    half = len(frequencies)
    angle = shift[:, None, :, None].float() * frequencies.to(x.device)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


Pair = tuple[torch.Tensor, torch.Tensor]


def attend(
    queries: Pair, keys: Pair, value: torch.Tensor, query_position: torch.Tensor, key_position: torch.Tensor,
    window: int, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """Compute attention with one softmax over far keys at grouped distances and near keys at true distances.

    Args:
        queries: at true and at grouped positions, each of shape (B, H, Q, D), the last Q of T tokens.
        keys: at true and at grouped positions, each of shape (B, G, T, D); H is a multiple of G.
        value: shape (B, G, T, D).
        query_position: shape (B, Q); negative for padding.
        key_position: shape (B, T); negative for padding.
        window: keys nearer than this are near.
        scaling: factor of the scores.

    Returns:
        Shape (B, H, Q, D).
    """
    batch, heads, count, width = queries[0].shape
    groups, tokens = value.shape[1:3]
    far = max(0, tokens - window)  # keys from this index on are far from none of these queries
    near = max(0, tokens - count - window + 1)  # keys before this index are near to none of these queries

    def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # Treat query heads that share a key head as further queries of it.
        grouped = query.reshape(batch, groups, -1, width)
        return (grouped @ key.transpose(-1, -2)).view(batch, heads, count, -1).float() * scaling

    distance = query_position[:, None, :, None] - key_position[:, None, None, :]
    is_token = key_position[:, None, None, :] >= 0
    lowest = torch.finfo(torch.float32).min
    is_far = (distance >= window) & is_token
    is_near = (distance < window) & (distance >= 0) & is_token
    parts = [
        scores(queries[1], keys[1][:, :, :far]).masked_fill(~is_far[..., :far], lowest),
        scores(queries[0], keys[0][:, :, near:]).masked_fill(~is_near[..., near:], lowest),
    ]
    weights = torch.cat(parts, dim=-1).softmax(dim=-1).to(value.dtype)
    weights = weights.view(batch, groups, -1, weights.shape[-1])
    output = weights[..., :far] @ value[:, :, :far] + weights[..., far:] @ value[:, :, near:]
    return output.view(batch, heads, count, width)


def self_extend_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute Self-Extend attention, as a Transformers attention function; cached keys are at true positions.

    Args:
        module: the attention layer; its config has group size and window.
        query: shape (B, H, Q, D), the last Q of T tokens, after RoPE at true positions.
        key: shape (B, G, T, D), after RoPE at true positions.
        value: shape (B, G, T, D).
        attention_mask: shape (B, T), False for padding, or None without padding.
        scaling: factor of the scores; None means 1 / sqrt(D).
        dropout: must be 0.

    Returns:
        Shape (B, Q, H, D), and None instead of attention weights.

    Raises:
        ValueError: attention dropout, or a mask other than a padding mask.
    """
    if dropout:
        raise ValueError(f"attention_dropout: found {dropout}, expected 0 with self_extend: set it to 0")
    tokens, queries = key.shape[2], query.shape[2]
    if attention_mask is None:
        position = torch.arange(tokens, device=key.device)[None]
    elif attention_mask.shape == (key.shape[0], tokens):
        # Left padding gets the position -1.
        position = torch.where(attention_mask.bool(), attention_mask.long().cumsum(-1), 0) - 1
    else:
        shape, expected = tuple(attention_mask.shape), (key.shape[0], tokens)
        raise ValueError(f"self_extend: found a mask of shape {shape}, expected a padding mask of shape {expected}")
    group, window, offset = settings(module.config)
    frequencies = inverse_frequencies(module.config)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_position = position[:, tokens - queries :]
    far_query = rotate(query, query_position // group + offset - query_position, frequencies)
    far_key = rotate(key, position // group - position, frequencies)
    chunks = []
    for start in range(0, queries, QUERIES):
        end = min(start + QUERIES, queries)
        last = tokens - queries + end
        inputs = (
            (query[:, :, start:end], far_query[:, :, start:end]), (key[:, :, :last], far_key[:, :, :last]),
            value[:, :, :last], query_position[:, start:end], position[:, :last], window, scaling,
        )  # fmt: skip
        # Recompute in backward: the weights of all chunks would take T x T.
        recompute = torch.is_grad_enabled() and queries > QUERIES
        chunks.append(checkpoint(attend, *inputs, use_reentrant=False) if recompute else attend(*inputs))
    return torch.cat(chunks, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Register the RoPE type and its attention with Transformers."""
    ROPE_INIT_FUNCTIONS[NAME] = compute_rope
    # Validates configs of this type; Transformers warns about a type without it.
    setattr(RotaryEmbeddingConfigMixin, f"_validate_{NAME}_rope_parameters", lambda config, *_, **__: settings(config))
    ALL_ATTENTION_FUNCTIONS.register(NAME, self_extend_attention)
    # Request a padding mask only, as FlashAttention does, and no T x T mask.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
