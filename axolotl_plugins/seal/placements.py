"""Find what SEAL can scale beside an attention output: queries, values, and the input of the MLP's output projection.

The paper scales attention outputs only. The other placements fold into weights as exactly: a scale of a projection's
output into its rows and bias, or into the gain of the norm after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import Placement

# Projections of one part alone. DeepSeek computes queries by two, and scaling the second's output scales the queries.
PROJECTIONS = {"query": ("q_proj", "q_b_proj"), "value": ("v_proj",)}
# Attention modules with one projection of queries, keys and values, and whether its rows are those of head after head.
FUSED = {"Phi3": ("qkv_proj", False), "GPTNeoX": ("query_key_value", True), "GPT2": ("c_attn", False)}
MLP_OUTPUTS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3 and most others
    "mlp.c_proj",  # GPT-2, StarCoder2
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, Bloom
    "mlp.fc2",  # Phi
    "mlp.fc_out",  # GPT-J
    "feed_forward.w2",  # LFM2
    "ffn.down_proj",  # MPT
    "fc2",  # OPT
)


@dataclass(frozen=True)
class Site:
    """Channels of a module's input or output that scales multiply.

    Attributes:
        placement: what the channels are of; of a fused projection that is scaled in two places, the first.
        heads: number of heads, with equally many channels each.
        channels: number of channels, C.
        of_output: whether the channels are of the module's output, or of its input.
        rows: indices of the channels in the output; None if they are all of it.
        gain: shape of the gain of a norm whose output is scaled; None if the module is a projection.
    """

    placement: Placement
    heads: int
    channels: int
    of_output: bool = False
    rows: tuple[int, ...] | None = None
    gain: tuple[int, ...] | None = None

    def joined(self, other: Site) -> Site:
        """Return the site of both sites' channels, of one fused projection."""
        assert self.rows is not None and other.rows is not None
        return Site(self.placement, self.heads + other.heads, self.channels + other.channels, True,
                    self.rows + other.rows)  # fmt: skip


def features(module: Any) -> tuple[int, int]:
    """Return ``(in_features, out_features)`` of a Linear (also quantised), Conv1D, or wrapper of one."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def fused_rows(
    attention: nn.Module, part: Literal["query", "value"], channels: int, heads: int
) -> tuple[str, torch.Tensor]:
    """Return the fused projection of an attention module, and its output rows that compute one part.

    Args:
        attention: of a class in ``FUSED``, with ``heads`` query heads of ``channels`` channels in all.
        part: which rows.
        channels: see ``attention``.
        heads: see ``attention``.

    Returns:
        Name of the projection, and indices of rows, int64, in the order of heads.
    """
    name, head_by_head = FUSED[type(attention).__name__.removesuffix("Attention")]
    rows = features(getattr(attention, name))[1]
    if head_by_head:  # the query, key and value of one head, then of the next
        return name, torch.arange(rows).view(heads, 3, -1)[:, 0 if part == "query" else 2].flatten()
    return name, torch.arange(channels) if part == "query" else torch.arange((rows + channels) // 2, rows)


def attention_site(
    attention: nn.Module, name: str, placement: Literal["query", "value"], channels: int, heads: int
) -> tuple[str, Site]:
    """Find where an attention module's queries or values can be scaled.

    Args:
        attention: the module.
        name: of the module, for the result and errors.
        placement: what to scale.
        channels: of its attention output, all heads concatenated.
        heads: number of query heads.

    Returns:
        Name of the projection, or of the norm after it, and the site.

    Raises:
        ValueError: the module has none, or its norm would undo the scales and cannot take them in its gain.
    """
    size = channels // heads  # of a head
    child = next((child for child in PROJECTIONS[placement] if getattr(attention, child, None) is not None), None)
    kind = type(attention)
    is_fused = kind.__name__.removesuffix("Attention") in FUSED and kind.__module__.startswith("transformers.models.")
    if child is None and is_fused:
        child, rows = fused_rows(attention, placement, channels, heads)
        return f"{name}.{child}", Site(placement, len(rows) // size, len(rows), True, tuple(rows.tolist()))
    projection = getattr(attention, child or "", None)
    if not hasattr(projection, "weight"):
        raise ValueError(f"placements: cannot find the {placement} projection of {name} ({kind.__name__}), such as "
                         f"{PROJECTIONS[placement][0]}: leave out `{placement}`")  # fmt: skip
    count = features(projection)[1]
    if placement == "query":
        size = getattr(attention, "qk_head_dim", size)
    if count % size or (placement == "query" and count != heads * size):
        expected = f"{heads} heads of {size}" if placement == "query" else f"heads of {size} channels"
        raise ValueError(f"placements: {name}.{child} has {count} rows, expected {expected}: it computes more than "
                         f"one {placement} per head: leave out `{placement}`")  # fmt: skip
    return norm_site(attention, name, Site(placement, count // size, count, True), str(child))


def norm_site(attention: nn.Module, name: str, site: Site, projection: str) -> tuple[str, Site]:
    """Move the site of a projection's output behind the norm that follows it, if one does, as QK-norm follows queries.

    Raises:
        ValueError: the norm has no gain of its own for every channel.
    """
    first = site.placement[0]
    norm = next(
        (child for child, module in attention.named_children()
         if child.startswith(first) and "norm" in child and child != "q_a_norm" and child != "q_a_layernorm"
         and not isinstance(module, nn.Identity)), None,
    )  # fmt: skip
    if norm is None:
        return f"{name}.{projection}", site
    gain = getattr(getattr(attention, norm), "weight", None)
    shape = tuple(getattr(gain, "ds_shape", () if gain is None else gain.shape))  # DeepSpeed empties sharded weights
    if gain is None or math.prod(shape) != site.channels:
        what = "no gain" if gain is None else f"a gain of {math.prod(shape)} channels that heads share"
        raise ValueError(
            f"placements: {name}.{norm} undoes scales of {projection}'s output, and has {what} instead of one for "
            f"each of {site.channels} channels, so that they cannot be merged: leave out `{site.placement}`"
        )
    return f"{name}.{norm}", replace(site, gain=shape)


def mlp_site(model: nn.Module, attention: str) -> tuple[str, Site]:
    """Find the output projection of the MLP, whose input can be scaled, in the decoder layer of a module by its name.

    Raises:
        ValueError: the layer has no MLP, or several, as in mixtures of experts.
    """
    match = re.match(r".*?\.\d+(?=\.)", attention)  # up to the first number
    layer = match[0] if match else attention
    for suffix in MLP_OUTPUTS:
        try:
            channels = features(model.get_submodule(f"{layer}.{suffix}"))[0]
        except AttributeError:
            continue
        return f"{layer}.{suffix}", Site("mlp", 1, channels)
    raise ValueError(f"placements: {layer} has no MLP with one output projection, such as {MLP_OUTPUTS[0]} (mixtures "
                     "of experts have one for each): leave out `mlp`")  # fmt: skip


def find_sites(model: nn.Module, outputs: dict[str, Site], placements: Sequence[Placement]) -> dict[str, Site]:
    """Find what to scale beside attention outputs.

    Args:
        model: the model.
        outputs: name of each attention output projection -> its own site.
        placements: what to scale.

    Returns:
        Name of each module to wrap -> its site.

    Raises:
        ValueError: a placement does not exist or cannot be merged; see ``attention_site`` and ``mlp_site``.
    """
    sites: dict[str, Site] = {}
    for name, output in outputs.items():
        parent = name.rpartition(".")[0]
        for placement in placements:
            if placement == "attention_output":
                sites[name] = output
            elif placement == "mlp":
                at, site = mlp_site(model, parent)
                sites[at] = site
            else:
                at, site = attention_site(model.get_submodule(parent), parent, placement, output.channels, output.heads)
                sites[at] = sites[at].joined(site) if at in sites else site
    return sites
