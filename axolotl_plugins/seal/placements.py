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
# Attention modules with one projection of queries, keys and values.
FUSED = {"Phi3": "qkv_proj", "GPTNeoX": "query_key_value", "GPT2": "c_attn"}
LATENT_NORMS = ("q_a_norm", "q_a_layernorm")  # between DeepSeek's two projections of queries
# Norms that multiply by a gain of all channels; others multiply by 1 + gain, or are shared by heads.
NORMS = (
    "Olmo2RMSNorm", "Olmo3RMSNorm", "OlmoeRMSNorm", "FlexOlmoRMSNorm", "MiniMaxM2RMSNorm", "CohereLayerNorm",
    "LigerRMSNormForOlmo2",
)  # fmt: skip
MLP_OUTPUTS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3 and most others
    "mlp.c_proj",  # GPT-2, StarCoder2
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, Bloom
    "mlp.fc2",  # Phi
    "mlp.fc_out",  # GPT-J
    "feed_forward.down_proj",  # Jamba, Llama 4
    "feed_forward.w2",  # LFM2
    "ffn.down_proj",  # MPT
    "fc2",  # OPT
)


@dataclass(frozen=True)
class Site:
    """Channels of a module's input or output that scales multiply.

    Attributes:
        parts: what the channels are of, with its number of heads: one placement, or queries and values of one fused
            projection.
        channels: number of channels, C; every head has equally many.
        of_output: whether the channels are of the module's output, or of its input.
        rows: indices of the channels in the output; None if they are all of it.
        gain: shape of the gain of a norm whose output is scaled; None if the module is a projection.
    """

    parts: tuple[tuple[Placement, int], ...]
    channels: int
    of_output: bool = False
    rows: tuple[int, ...] | None = None
    gain: tuple[int, ...] | None = None

    @property
    def heads(self) -> int:
        """Number of heads."""
        return sum(heads for _, heads in self.parts)

    def heads_of(self, placement: Placement) -> slice | None:
        """Return which of the heads are of a placement, None if none is."""
        first = 0
        for part, heads in self.parts:
            if part == placement:
                return slice(first, first + heads)
            first += heads
        return None


def features(module: Any) -> tuple[int, int]:
    """Return ``(in_features, out_features)`` of a Linear (also quantised), Conv1D, or wrapper of one."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def fused_rows(attention: Any, part: Literal["query", "value"], channels: int) -> tuple[str, torch.Tensor]:
    """Return the fused projection of an attention module, and its output rows that compute one part.

    Args:
        attention: of a class in ``FUSED``.
        part: which rows.
        channels: of all query heads.

    Returns:
        Name of the projection, and indices of rows, int64, in the order of heads.
    """
    name = FUSED[type(attention).__name__.removesuffix("Attention")]
    rows = torch.arange(features(getattr(attention, name))[1], device="cpu")
    if name == "query_key_value":  # the query, key and value of one head, then of the next
        return name, rows.view(-1, 3, attention.head_size)[:, 0 if part == "query" else 2].flatten()
    return name, rows[:channels] if part == "query" else rows[(len(rows) + channels) // 2 :]


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
        child, rows = fused_rows(attention, placement, channels)
        return f"{name}.{child}", Site(((placement, len(rows) // size),), len(rows), True, tuple(rows.tolist()))
    projection = getattr(attention, child or "", None)
    if not hasattr(projection, "weight"):
        raise ValueError(f"placements: cannot find the {placement} projection of {name} ({kind.__name__}), such as "
                         f"{PROJECTIONS[placement][0]}: remove `{placement}` from placements")  # fmt: skip
    count = features(projection)[1]
    if placement == "query":
        size = getattr(attention, "qk_head_dim", size)
    if count % size or (placement == "query" and count != heads * size):
        expected = f"{heads} heads of {size}" if placement == "query" else f"heads of {size} channels"
        raise ValueError(f"placements: {name}.{child} has {count} rows, expected {expected}: it computes more than "
                         f"one {placement} per head: remove `{placement}` from placements")  # fmt: skip
    return norm_site(attention, name, placement, str(child), Site(((placement, count // size),), count, True))


def norm_site(attention: nn.Module, name: str, placement: Placement, projection: str, site: Site) -> tuple[str, Site]:
    """Move the site of a projection's output behind the norm that follows it, if one does, as QK-norm follows queries.

    Raises:
        ValueError: the norm has no gain of its own for every channel.
    """
    norm = next(
        (child for child, module in attention.named_children()
         if child.startswith(placement[0]) and "norm" in child and child not in LATENT_NORMS
         and not isinstance(module, nn.Identity)), None,
    )  # fmt: skip
    if norm is None:
        return f"{name}.{projection}", site
    module = getattr(attention, norm)
    module = module.base_layer if hasattr(module, "base_layer") else module
    gain = getattr(module, "weight", None)
    shape = tuple(getattr(gain, "ds_shape", () if gain is None else gain.shape))  # DeepSpeed empties sharded weights
    if type(module).__name__ not in NORMS or math.prod(shape) != site.channels:
        raise ValueError(
            f"placements: {name}.{norm} ({type(module).__name__}) may undo scales of {projection}'s output, and is not "
            f"known to multiply by a gain for each of {site.channels} channels, which could take them: remove "
            f"`{placement}` from placements"
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
        return f"{layer}.{suffix}", Site((("mlp", 1),), channels)
    raise ValueError(f"placements: {layer} has no MLP with one output projection, such as {MLP_OUTPUTS[0]} (mixtures "
                     "of experts have one for each): remove `mlp` from placements, or choose layers by "
                     "layers_to_transform")  # fmt: skip


def find_sites(model: nn.Module, outputs: dict[str, Site], placements: Sequence[Placement]) -> dict[str, Site]:
    """Find what to scale beside attention outputs.

    Args:
        model: the model.
        outputs: name of each attention output projection -> its own site.
        placements: what to scale.

    Returns:
        Name of each module to wrap -> its site.

    Raises:
        ValueError: ``outputs`` are not of one attention module each; or a placement does not exist or cannot be merged,
            see ``attention_site`` and ``mlp_site``.
    """
    sites: dict[str, Site] = {}
    for name, output in outputs.items():
        parent = name.rpartition(".")[0]
        for placement in placements:
            if placement == "attention_output":
                sites[name] = output
                continue
            if placement == "mlp":
                at, site = mlp_site(model, parent)
            else:
                at, site = attention_site(model.get_submodule(parent), parent, placement, output.channels, output.heads)
            if (other := sites.get(at)) and other.rows and site.rows and other.parts[0][0] != placement:
                sites[at] = Site(other.parts + site.parts, other.channels + site.channels, True, other.rows + site.rows)
            elif other or at in outputs:
                raise ValueError(f"target_modules: {name} and {at} are found for one attention module: name attention "
                                 "output projections only; placements beside them are found")  # fmt: skip
            else:
                sites[at] = site
    return sites
