"""Merge scales into the scales of quantised blocks, which is exact where no block has weights of two heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .model_files import Change, Place, read_header, read_tensor, times, weight_files

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import PreTrainedModel

FULL = "merge into the full-precision model that it was quantised from"
SPANS = "a block of quantised weights has several scales"
LAYOUTS = {"bitsandbytes": ("4-bit",), "gptq": ("", "gptq", "gptq_v2"), "awq": ("", "gemm")}
ABSMAX = ".absmax"
MAX_RELATIVE_ERROR = 1e-6  # of 4-bit weights; float32 rounds each product by 6e-8


def quantisation(base: str, config: dict[str, Any] | None) -> str | None:
    """Return how a model is quantised: ``bitsandbytes`` (4-bit), ``gptq``, ``awq``, or None if it is not.

    Args:
        base: its name, for errors.
        config: ``quantization_config`` of its config.json.

    Raises:
        ValueError: in a way whose scales cannot take those of heads.
    """
    if not config:
        return None
    if not isinstance(config, dict):
        raise ValueError(f"{base}: quantization_config of its config.json: found {config!r}, expected settings")
    method = str(config.get("quant_method"))
    layout = next((str(config[key]) for key in ("checkpoint_format", "version", "format") if config.get(key)), "")
    if method == "bitsandbytes":
        layout = "4-bit" if config.get("load_in_4bit") else "8-bit"
    if layout.lower() in LAYOUTS.get(method, ()):
        return method
    kind = f"{method} {layout}".strip()
    raise ValueError(f"{base}: is quantised ({kind}), and its scales cannot take those of heads: {FULL}")


def stored_tensors(folder: Path) -> dict[str, Place]:
    """Return every tensor in the files of a model folder by its name."""
    return {name: Place(file.name, name) for file in weight_files(folder) for name in read_header(file)[0]}


def block_changes(
    folder: Path, method: str, factors: dict[str, torch.Tensor]
) -> tuple[dict[str, Place], dict[Place, Change | None]]:
    """Find the scales of quantised weights in the files, and what a merge makes of them.

    Args:
        folder: of the quantised model.
        method: see ``quantisation``.
        factors: see ``merge.scale_factors``.

    Returns:
        Parameter name -> its scales (of a bias, itself), and the changes of the files, see ``model_files.copy_model``.

    Raises:
        ValueError: weights of one block have different factors, or the files lack a tensor.
    """
    stored = stored_tensors(folder)
    places: dict[str, Place] = {}
    changes: dict[Place, Change | None] = {}
    for name, factor in factors.items():
        prefix = name.removesuffix("weight")
        scales = name + ABSMAX if method == "bitsandbytes" else f"{prefix}scales"
        plain = name in stored and read_tensor(folder, stored[name]).is_floating_point()  # a bias, or not quantised
        needed = [name] if plain else [scales, f"{prefix}g_idx"] if method == "gptq" else [scales]
        if missing := [each for each in needed if each not in stored]:
            raise ValueError(f"{folder}: its files lack {missing[0]}, as weights of {method} have it: {FULL}")
        places[name] = place = stored[needed[0]]
        if plain:
            changes[place] = times(factor)
        elif method == "bitsandbytes":
            changes |= absmax_changes(folder, stored, place, factor)
        else:
            index = group_index(folder, stored, prefix, method)
            if len(factor.T) not in (1, len(index)):
                raise ValueError(f"{folder}: {place.name} is of {len(index)} columns, expected {len(factor.T)}: {FULL}")
            changes[place] = times(by_block(factor, index, place.name).T)
    return places, changes


def group_index(folder: Path, stored: dict[str, Place], prefix: str, method: str) -> torch.Tensor:
    """Return the group of each column of a GPTQ or AWQ weight, whose scales have the shape (groups, outputs).

    Raises:
        ValueError: the weight is missing, or its shape, its scales' and its index's do not match.
    """
    try:
        weight, scales = (read_tensor(folder, stored[prefix + part]).shape for part in ("qweight", "scales"))
    except KeyError as error:
        raise ValueError(f"{folder}: its files lack {error}, as weights of {method} have it: {FULL}") from None
    groups, outputs = scales
    if method == "gptq":  # (columns * bits / 32, outputs)
        index, matches = read_tensor(folder, stored[f"{prefix}g_idx"]).long(), weight[1] == outputs
    else:  # (columns, outputs * 4 / 32)
        index, matches = torch.arange(weight[0]) * groups // weight[0], weight[1] * 8 == outputs
        matches &= weight[0] % groups == 0
    if not matches or index.ndim != 1 or index.min() < 0 or index.max() >= groups:
        raise ValueError(f"{folder}: {prefix}scales, of shape {(groups, outputs)}, do not match the weight: {FULL}")
    return index


def by_block(factor: torch.Tensor, index: torch.Tensor, name: str) -> torch.Tensor:
    """Reduce a factor of columns, shape (1, C), to one of their blocks, (1, B); return a factor of rows, (R, 1), as is.

    Args:
        factor: float32.
        index: block of each column, int64 of shape (C,).
        name: of the scales, for errors.

    Raises:
        ValueError: columns of one block have different factors.
    """
    if factor.shape[1] == 1:
        return factor
    blocks = torch.ones(1, int(index.max()) + 1)
    blocks[0, index] = factor[0]
    if not torch.equal(blocks[:, index], factor):
        raise ValueError(f"{name}: {SPANS}: {FULL}")
    return blocks


def read_state(folder: Path, stored: dict[str, Place], place: Place) -> tuple[dict[str, Place], QuantState]:
    """Return the tensors in the files beside the 4-bit weight whose absmax is at ``place``, and the state they hold."""
    from bitsandbytes.functional import QuantState

    prefix = place.name.removesuffix("absmax")
    parts = {key.removeprefix(prefix): at for key, at in stored.items() if key.startswith(prefix)}
    return parts, QuantState.from_dict({key: read_tensor(folder, at) for key, at in parts.items()}, torch.device("cpu"))


def absmax_changes(
    folder: Path, stored: dict[str, Place], place: Place, factor: torch.Tensor
) -> dict[Place, Change | None]:
    """Return the changes of the tensors beside a 4-bit weight: of absmax, which become float32 if they are quantised.

    Raises:
        ValueError: weights of one block have different factors, or absmax does not match the weight.
    """
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    parts, state = read_state(folder, stored, place)
    rows, columns = state.shape
    if columns % state.blocksize:
        raise ValueError(f"{place.name}: {SPANS}: {FULL}")
    if state.absmax.numel() * state.blocksize != rows * columns:
        raise ValueError(f"{folder}: {place.name} does not match the weight: {FULL}")
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    absmax = absmax.view(rows, -1) * by_block(factor, torch.arange(columns) // state.blocksize, place.name)
    plain = QuantState(absmax.flatten(), state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
    tensors = plain.as_dict(packed=True)
    changed = parts.keys() - {"quant_map"} if state.nested else {"absmax"}
    return {parts[key]: replacement(tensors[key]) if key in tensors else None for key in changed}


def replacement(tensor: torch.Tensor) -> Change:
    """Return the change of any tensor to this one."""
    return lambda _: tensor


def dequantise(model: PreTrainedModel) -> None:
    """Dequantise 4-bit projections in float32 in place: kernels would round, on some CPUs the scales to bfloat16."""
    for parameter in model.parameters():
        if hasattr(parameter, "quant_state"):
            parameter.quant_state.dtype = torch.float32
    model.dequantize(model.dtype)


def read_weight(folder: Path, stored: dict[str, Place], place: Place) -> torch.Tensor:
    """Return a tensor of the files in float32; for the absmax of a 4-bit weight that weight, dequantised."""
    if not place.name.endswith(ABSMAX):
        return read_tensor(folder, place).float()
    from bitsandbytes.functional import dequantize_4bit

    state = read_state(folder, stored, place)[1]
    state.dtype = torch.float32
    return dequantize_4bit(read_tensor(folder, stored[place.name.removesuffix(ABSMAX)]), state)
