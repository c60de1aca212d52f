"""Read trained scales as a matrix of layers and heads, and summarise them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from axolotl_plugins.common.console import first_line

from . import Placement
from .config import SealConfig
from .layer import SealLayer
from .model import is_selected, layer_index
from .model_loading import check_adapter


@torch.no_grad()
def scale_matrix(model: nn.Module, placement: Placement = "attention_output") -> dict[int, torch.Tensor]:
    """Return the active scales of a wrapped model in one placement.

    Returns:
        Layer index -> float32 of shape (heads, head_dim), on the CPU; heads of a SEAL-H adapter have equal rows. Heads
        of several attention modules in a layer follow each other.
    """
    scales: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, SealLayer) or (heads := module.site.heads_of(placement)) is None:
            continue
        if (scale := module.active_scale()) is not None:
            scale = scale.full_tensor() if isinstance(scale, DTensor) else scale  # FSDP2 shards it
            index = layer_index(name)
            index = len(scales) if index is None else index
            rows = scale.detach().float().cpu().view(module.num_heads, -1)[heads]
            scales[index] = torch.cat([scales[index], rows]) if index in scales else rows
    return scales


def saved_tensors(adapter: Path) -> dict[str, np.ndarray]:
    """Return the scales in an adapter folder: name -> float32 of shape (heads,) or (channels,), in order of layers.

    Raises:
        ValueError: the folder is not a SEAL adapter.
    """
    check_adapter(adapter)
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{adapter}: not an adapter folder ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{adapter}: its adapter_config.json is no mapping")
    if config.get("peft_type") != "SEAL":
        raise ValueError(f"{adapter}: found a {config.get('peft_type')} adapter, expected a SEAL adapter")
    names = sorted(tensors, key=lambda name: layer_index(name) or 0)
    return {name: tensors[name].float().numpy() for name in names}


def saved_placements(adapter: Path) -> list[Placement]:
    """Return what the scales in a SEAL adapter's folder are of."""
    config: Any = SealConfig.from_pretrained(str(adapter))
    return config.placements


def by_query_head(placements: list[Placement]) -> bool:
    """Return whether ``saved_scales`` reads the scales of these placements, as a map of query heads."""
    return "attention_output" in placements or placements == ["query"]


def saved_scales(adapter: Path) -> np.ndarray:
    """Return an adapter folder's scales of attention outputs, or of queries alone, as float32.

    The shape is (layers, heads, head_dim), for SEAL-H (layers, heads, 1). Where heads are of different sizes in
    different layers, it is (layers, heads, 1), with a head's mean.

    Raises:
        ValueError: the folder is not a SEAL adapter, has no such scales, or its layers have different numbers of heads.
    """
    tensors = saved_tensors(adapter)
    config: Any = SealConfig.from_pretrained(str(adapter))
    if not by_query_head(config.placements):
        raise ValueError(f"{adapter}: scales {', '.join(config.placements)}, expected scales of attention outputs, or "
                         "of queries alone")  # fmt: skip
    if len(config.placements) > 1:
        modules = {name: name.removeprefix("base_model.model.").removesuffix(".seal_scale") for name in tensors}
        tensors = {name: tensor for name, tensor in tensors.items() if is_selected(config, modules[name])}
    heads = config.num_heads
    if not heads or any(tensor.size % heads for tensor in tensors.values()):
        raise ValueError(f"{adapter}: its layers have different numbers of heads, which is not supported")
    rows = [tensor.reshape(heads, -1) for tensor in tensors.values()]
    return np.stack(rows if len({row.shape for row in rows}) == 1 else [row.mean(1, keepdims=True) for row in rows])


def summary(scales: dict[int, torch.Tensor]) -> dict[str, float]:
    """Return mean, minimum and maximum of a ``scale_matrix``, and the heads with the highest and lowest mean.

    Returns:
        Values for a logger; ``raised`` and ``lowered`` are means over a head's channels.
    """
    if not scales:
        return {}
    flat = torch.cat([scale.flatten() for scale in scales.values()])
    heads = {(layer, head): mean for layer, rows in scales.items() for head, mean in enumerate(rows.mean(1).tolist())}
    result: dict[str, Any] = {"mean": flat.mean().item(), "min": flat.min().item(), "max": flat.max().item()}
    for name, pick in (("raised", max), ("lowered", min)):
        layer, head = pick(heads, key=heads.__getitem__)
        result |= {name: heads[layer, head], f"{name}_layer": float(layer), f"{name}_head": float(head)}
    return result
