"""Self-Extend (Jin et al. 2024, arXiv 2401.01325): a longer window without training, in linear memory.

Keys nearer than ``neighbor_window`` tokens are attended at their true distance, all others at a distance counted in
groups of ``group_size`` tokens, so that no distance is longer than those the model was trained at. Section 6 of the
SEAL paper tunes through it, with groups of 6 and a neighbour window of 1,024 tokens.

What makes a model use it is its config: ``rope_parameters: {rope_type: self_extend, rope_theta: ..., group_size: 6,
neighbor_window: 1024}``. Importing this package makes that type known to transformers; without it, loading such a
model fails instead of running at positions that the model never saw.
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
# Rotary channels are paired as (i, i + d / 2) in these; where they are paired otherwise, re-rotating them is wrong.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
# Of a chunk: its scores, (B, H, QUERIES, T), are the largest tensor there is. A third of the time of 512 on a CPU.
QUERIES = 128


def slides(config: PreTrainedConfig) -> bool:
    """Whether a model's attention sees a sliding window alone."""
    return bool(getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None))


def settings(config: PreTrainedConfig) -> tuple[int, int]:
    """Group size and neighbour window of a config, in tokens.

    Raises:
        ValueError: they are missing or have no meaning, or the architecture does not allow it.
    """
    rope = config.rope_parameters
    group, window = rope.get("group_size"), rope.get("neighbor_window")
    for key, value, least in (("group_size", group, 1), ("neighbor_window", window, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"rope_parameters.{key}: found {value!r}, expected a whole number of tokens from {least}")
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"self_extend: found {config.model_type}, expected one of {', '.join(MODEL_TYPES)}")
    if slides(config):
        raise ValueError("self_extend: the model's attention slides already: set `sliding_window: null` in its config")
    return group, window


def inverse_frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """RoPE's angles per token, shape (rotary channels / 2,), float32 (Su et al. 2021, section 3.2.2)."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, rotary, 2, dtype=torch.float) / rotary)


def compute_rope(config: PreTrainedConfig, device: torch.device | None = None, **_: Any) -> tuple[torch.Tensor, float]:
    """What transformers asks of a RoPE type; it also turns the attention on, so that no flag is needed.

    Raises:
        ValueError: see ``settings``.
    """
    settings(config)
    config._attn_implementation = NAME
    return inverse_frequencies(config).to(device), 1.0


def rotate(x: torch.Tensor, turn: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Rotate by ``turn`` positions more; rotations add up, so this moves a token to another position.

    Args:
        x: shape (B, H, T, D), queries or keys that are rotated already.
        turn: shape (B or 1, T), in tokens.
        frequencies: shape (rotary channels / 2,).
    """
    half = len(frequencies)
    angle = turn[:, None, :, None].float() * frequencies.to(x.device)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def attend(
    near_query: torch.Tensor,
    far_query: torch.Tensor,
    near_key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    query_place: torch.Tensor,
    key_place: torch.Tensor,
    window: int,
    scaling: float,
    far: int,
    near: int,
) -> torch.Tensor:
    """One softmax over keys below ``far`` at grouped distances and keys from ``near`` on at true ones.

    Args:
        near_query: shape (B, H, Q, D), at true positions.
        far_query: the same at grouped positions.
        near_key: shape (B, G, T, D), at true positions; H is a multiple of G.
        far_key: the same at grouped positions.
        value: shape (B, G, T, D).
        query_place: shape (B, Q), positions; padding has negative ones.
        key_place: shape (B, T), likewise.
        window: keys nearer than this are near.
        scaling: of the scores.
        far: no key from this index on is far from any of these queries.
        near: no key before this index is near to any of them.

    Returns:
        Shape (B, H, Q, D).
    """
    batch, heads, queries, width = near_query.shape
    groups = near_key.shape[1]

    def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # Query heads that share a key head are more queries of it.
        together = query.reshape(batch, groups, -1, width)
        return (together @ key.transpose(-1, -2)).view(batch, heads, queries, -1).float() * scaling

    distance = query_place[:, None, :, None] - key_place[:, None, None, :]
    seen = key_place[:, None, None, :] >= 0
    lowest = torch.finfo(torch.float32).min
    is_far = (distance >= window) & seen
    is_near = (distance < window) & (distance >= 0) & seen
    parts = [
        scores(far_query, far_key[:, :, :far]).masked_fill(~is_far[..., :far], lowest),
        scores(near_query, near_key[:, :, near:]).masked_fill(~is_near[..., near:], lowest),
    ]
    weights = torch.cat(parts, dim=-1).softmax(dim=-1).to(value.dtype)
    weights = weights.view(batch, groups, -1, weights.shape[-1])
    mixed = weights[..., :far] @ value[:, :, :far] + weights[..., far:] @ value[:, :, near:]
    return mixed.view(batch, heads, queries, width)


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
    """An attention function of transformers: keys of the cache are at true positions and are grouped here.

    Args:
        module: the attention layer; its config says group and window.
        query: shape (B, H, Q, D), the last Q of T tokens, rotated to their true positions.
        key: shape (B, G, T, D), rotated likewise.
        value: shape (B, G, T, D).
        attention_mask: shape (B, T), False for padding, or None where there is none.
        scaling: of the scores; None means 1 / sqrt(D).
        dropout: must be 0.

    Returns:
        Shape (B, Q, H, D); and None for the weights.

    Raises:
        ValueError: attention dropout, or a mask that is not one of padding.
    """
    if dropout:
        raise ValueError(f"attention_dropout: found {dropout}, but self_extend has none: set it to 0")
    tokens, queries = key.shape[2], query.shape[2]
    if attention_mask is None:
        place = torch.arange(tokens, device=key.device)[None]
    elif attention_mask.shape == (key.shape[0], tokens):
        # Before the first token places are negative, which is what marks padding.
        place = torch.where(attention_mask.bool(), attention_mask.long().cumsum(-1), 0) - 1
    else:
        found, expected = tuple(attention_mask.shape), (key.shape[0], tokens)
        raise ValueError(f"self_extend: found a mask of shape {found}, expected one of padding, {expected}")
    group, window = settings(module.config)
    frequencies = inverse_frequencies(module.config)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_place = place[:, tokens - queries :]
    far_query = rotate(query, query_place // group + window - window // group - query_place, frequencies)
    far_key = rotate(key, place // group - place, frequencies)
    chunks = []
    for start in range(0, queries, QUERIES):
        end = min(start + QUERIES, queries)
        first, last = tokens - queries + start, tokens - queries + end
        far, near = max(0, last - window), max(0, first - window + 1)
        inputs = (
            query[:, :, start:end], far_query[:, :, start:end], key[:, :, :last], far_key[:, :, :last],
            value[:, :, :last], query_place[:, start:end], place[:, :last], window, scaling, far, near,
        )  # fmt: skip
        # Recomputed in the backward pass: keeping the weights of all chunks would be T x T.
        again = torch.is_grad_enabled() and queries > QUERIES
        chunks.append(checkpoint(attend, *inputs, use_reentrant=False) if again else attend(*inputs))
    return torch.cat(chunks, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the RoPE type and its attention known to transformers."""
    ROPE_INIT_FUNCTIONS[NAME] = compute_rope
    # Where configs of that type are checked; without it there is a warning for each.
    setattr(RotaryEmbeddingConfigMixin, f"_validate_{NAME}_rope_parameters", lambda config, *_, **__: settings(config))
    ALL_ATTENTION_FUNCTIONS.register(NAME, self_extend_attention)
    # Padding alone is asked for, as FlashAttention does: a mask of T x T is what this is to avoid.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
