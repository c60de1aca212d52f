"""Decoder layers, their attention and the projections whose input SEAL scales, and hooks on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.layer import SealLayer
from axolotl_plugins.seal.model import layer_index


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        layer: the decoder layer.
        attention: its module that contains the projection.
        projection: the wrapped attention output projection.
    """

    layer: nn.Module
    attention: nn.Module
    projection: SealLayer

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.projection.num_heads

    @property
    def channels(self) -> int:
        """Number of channels of all heads."""
        return self.projection.in_features

    def without_head(self, head: int) -> torch.Tensor:
        """Return scales that ablate one head: float32 of shape (C,)."""
        scale = torch.ones(self.heads, self.channels // self.heads)
        scale[head] = 0
        return scale.flatten()


def wrap(model: Any) -> Any:
    """Wrap a model's attention output projections with scales of 1, if they are not wrapped; set evaluation mode.

    Raises:
        ValueError: the model carries an adapter other than SEAL.
    """
    if any(isinstance(module, SealLayer) for module in model.modules()):
        return model.eval()
    if isinstance(model, PeftModel):
        raise ValueError("probes read base models and SEAL adapters: merge this adapter into its base model first")
    return get_peft_model(model, SealConfig(granularity="head")).eval()


def decoder_blocks(model: nn.Module) -> list[Block]:
    """Return the decoder layers of a wrapped model, lowest first.

    Raises:
        ValueError: a layer has no wrapped attention output projection, or more than one.
    """
    by_layer: dict[str, list[Block]] = {}
    stack = ""
    for name, module in model.named_modules():
        if isinstance(module, SealLayer) and module.site.heads_of("attention_output"):
            index = layer_index(name)
            stack, _, _ = name.partition(f".{index}.")
            layer = model.get_submodule(f"{stack}.{index}")
            attention = model.get_submodule(name.rpartition(".")[0])
            by_layer.setdefault(f"{stack}.{index}", []).append(Block(layer, attention, module))
    count = len(model.get_submodule(stack)) if stack else 0  # type: ignore[arg-type]
    names = [f"{stack}.{index}" for index in range(count)]
    if not count or any(len(by_layer.get(name, ())) != 1 for name in names):
        raise ValueError(
            "probes need one wrapped attention output in every decoder layer, found them in "
            f"{sorted(by_layer) or 'none'}: use an adapter that scales those of all layers, or the base model"
        )
    return [by_layer[name][0] for name in names]


def hidden_states(output: Any) -> torch.Tensor:
    """Return the hidden states in the output of a layer or attention module, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden_states(output: Any, tensor: torch.Tensor) -> Any:
    """Return ``output`` with its hidden states replaced."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def on_input(layer: nn.Module, read: Callable[[torch.Tensor], None]) -> Any:
    """Register a hook that reads the hidden states before a decoder layer; return its handle."""
    return layer.register_forward_pre_hook(
        lambda _, args, kwargs: read(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )


@contextlib.contextmanager
def removing(handles: Sequence[Any]) -> Iterator[None]:
    """Remove registered hooks on exit."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced_forwards(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward methods of modules until exit."""
    own = {module: module.__dict__.get("forward") for module in replacements}  # accelerate sets it, to move inputs
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module, replaced in own.items():
            del module.forward
            if replaced is not None:
                module.forward = replaced


@contextlib.contextmanager
def scaled_input(projection: nn.Module, scale: torch.Tensor) -> Iterator[None]:
    """Scale the input of a projection until exit, on top of its adapters.

    Args:
        projection: a wrapped attention output projection.
        scale: shape (C,), or (B, 1, C) for one vector per row of the batch; the product is computed in its dtype.
    """

    def multiply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((args[0] * scale.to(args[0].device)).to(args[0].dtype), *args[1:])

    with removing([projection.register_forward_pre_hook(multiply)]):
        yield
