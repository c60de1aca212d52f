"""Where a model's heads are: its decoder layers, their attention and the projections whose input SEAL scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.layer import Scale, SealLayer
from axolotl_plugins.seal.model import layer_index


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        layer: the whole of it.
        attention: the module in it that holds the projection.
        projection: the attention output, wrapped.
    """

    layer: nn.Module
    attention: nn.Module
    projection: SealLayer

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.projection.num_heads

    @property
    def channels(self) -> int:
        """Channels of all heads."""
        return self.projection.in_features

    def without_head(self, head: int) -> torch.Tensor:
        """Scales that remove one head: float32 of shape (C,)."""
        scale = torch.ones(self.heads, self.channels // self.heads)
        scale[head] = 0
        return scale.flatten()


def wrapped(model: Any) -> Any:
    """The model with its attention outputs wrapped, which changes nothing of what it computes.

    Raises:
        ValueError: it carries an adapter of another kind than SEAL.
    """
    if any(isinstance(module, SealLayer) for module in model.modules()):
        return model.eval()
    if isinstance(model, PeftModel):
        raise ValueError("probes read base models and SEAL adapters: merge this adapter into its base model first")
    return get_peft_model(model, SealConfig(granularity="head")).eval()


def blocks(model: nn.Module) -> list[Block]:
    """The decoder layers of a wrapped model, from the lowest.

    Raises:
        ValueError: a layer has no wrapped attention output, or more than one.
    """
    found: dict[str, list[Block]] = {}
    stack = ""
    for name, module in model.named_modules():
        if isinstance(module, SealLayer):
            index = layer_index(name)
            stack, _, _ = name.partition(f".{index}.")
            layer = model.get_submodule(f"{stack}.{index}")
            attention = model.get_submodule(name.rpartition(".")[0])
            found.setdefault(f"{stack}.{index}", []).append(Block(layer, attention, module))
    count = len(model.get_submodule(stack)) if stack else 0  # type: ignore[arg-type]
    names = [f"{stack}.{index}" for index in range(count)]
    if not count or any(len(found.get(name, ())) != 1 for name in names):
        raise ValueError(
            "probes need one wrapped attention output in every decoder layer, found them in "
            f"{sorted(found) or 'none'}: use an adapter that wraps all layers, or the base model"
        )
    return [found[name][0] for name in names]


def first(output: Any) -> torch.Tensor:
    """What a layer or an attention module computes, which some return together with other things."""
    return output[0] if isinstance(output, tuple) else output


def like(output: Any, tensor: torch.Tensor) -> Any:
    """``tensor`` in the place of what ``first`` takes from ``output``."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states in a decoder layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


@contextlib.contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks on the way out."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def forwards(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute something else for a while."""
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module in replacements:
            module.__dict__.pop("forward", None)


def probing(projection: SealLayer, scale: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Scale the input of a projection within a ``with`` block, in addition to its adapters.

    Args:
        projection: a wrapped attention output.
        scale: float32 of shape (C,), or (B, 1, C) for one vector per row of the batch.
    """
    return hooks([projection.register_forward_pre_hook(lambda _, args: (Scale.apply(args[0], scale), *args[1:]))])
