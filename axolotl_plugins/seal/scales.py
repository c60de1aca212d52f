"""Reading learned scales: as a matrix of layers and heads, and in a few numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layer import SealLayer
from .model import layer_index


@torch.no_grad()
def scale_matrix(model: nn.Module) -> dict[int, torch.Tensor]:
    """The active scales of a wrapped model.

    Returns:
        Layer index -> float32 of shape (heads, head_dim), on the CPU; heads of a SEAL-H adapter have equal rows.
    """
    scales: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, SealLayer) and (scale := module.active_scale()) is not None:
            index = layer_index(name)
            scales[len(scales) if index is None else index] = scale.detach().float().cpu().view(module.num_heads, -1)
    return scales


def summary(scales: dict[int, torch.Tensor]) -> dict[str, float]:
    """Mean, least and greatest scale, and the heads most raised and lowered.

    Args:
        scales: as ``scale_matrix`` gives them.

    Returns:
        Plain numbers under names fit for a logger; ``raised`` and ``lowered`` are means over a head's channels.
    """
    if not scales:
        return {}
    everything = torch.cat([scale.flatten() for scale in scales.values()])
    heads = {(layer, head): mean for layer, rows in scales.items() for head, mean in enumerate(rows.mean(1).tolist())}
    result: dict[str, Any] = {
        "mean": everything.mean().item(),
        "min": everything.min().item(),
        "max": everything.max().item(),
    }
    for name, pick in (("raised", max), ("lowered", min)):
        layer, head = pick(heads, key=heads.__getitem__)
        result |= {name: heads[layer, head], f"{name}_layer": float(layer), f"{name}_head": float(head)}
    return result
