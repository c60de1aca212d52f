"""Projection with a scaled input: SEAL(x) = W (s * x) + b (paper section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SealConfig


class Scale(torch.autograd.Function):
    """Compute ``x * scale`` in the dtype of the scale and save ``x`` for backward without upcasting it.

    ``x`` is the attention output, which attention's backward pass saves anyway, so scaling adds no activation memory.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Multiply x of shape (..., C) by a scale that broadcasts to it; the result has the dtype of x."""
        ctx.save_for_backward(x, scale)
        return (x * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of x and of the scale; the latter is accumulated in the dtype of the scale."""
        x, scale = ctx.saved_tensors
        grad_x = (gradient * scale).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (gradient.to(scale.dtype) * x).sum_to_size(scale.shape)
        return grad_x, grad_scale


class SealLayer(nn.Module, BaseTunerLayer):
    """Scale the input of an attention output projection (paper section 4.2, Figure 3a).

    C is the number of input channels (heads x head_dim), H the number of query heads. ``seal_scale`` maps adapter
    names to float32 parameters of shape (H,) for SEAL-H or (C,) for SEAL-C.
    """

    adapter_layer_names = ("seal_scale",)

    # Inherited from BaseTunerLayer; declared because nn.Module types every attribute as a tensor or a module.
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SealConfig, num_heads: int) -> None:
        """Wrap ``base_layer`` and add its first adapter."""
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = projection_shape(base_layer)
        self.num_heads = num_heads
        self.seal_scale = nn.ParameterDict({})
        self.row_adapters: Sequence[str] | None = None  # see SealModel._enable_peft_forward_hooks
        self._disable_adapters = False
        self._unmerged_weight: torch.Tensor | None = None
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SealConfig, **_: Any) -> None:
        """Add an adapter with all scales initialised to 1."""
        size = self.num_heads if config.granularity == "head" else self.in_features
        self.seal_scale[adapter_name] = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the scales to the projection's device and keep float32: bfloat16 has no value between 1 and 1.0078."""
        scale = self.seal_scale[adapter_name]
        if scale.device.type != "meta":
            weight = self.get_base_layer().weight
            self.seal_scale[adapter_name] = nn.Parameter(
                scale.data.to(device=device or weight.device, dtype=torch.float32), requires_grad=scale.requires_grad
            )

    def _apply(self, fn: Any, recurse: bool = True) -> SealLayer:
        """Apply device moves to the scales but not dtype casts, so that they stay float32."""
        original = {name: scale.data for name, scale in self.seal_scale.items()}
        super()._apply(fn, recurse)
        for name, scale in self.seal_scale.items():
            if original[name].device.type != "meta" and scale.dtype != torch.float32:
                scale.data = original[name].to(scale.device)
        return self

    def channel_scale(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's scale of each input channel, float32 of shape (C,)."""
        scale = self.seal_scale[adapter_name]
        return scale if scale.numel() == self.in_features else scale.repeat_interleave(self.in_features // len(scale))

    def active_scale(self) -> torch.Tensor | None:
        """Return the product of the active adapters' scales, float32 of shape (C,), or None without active scales."""
        product = None
        for name in self.active_adapters:
            if name in self.seal_scale:
                scale = self.channel_scale(name)
                product = scale if product is None else product * scale
        return product

    def row_scale(self, rows: int) -> torch.Tensor:
        """Return the scale of each row of a batch by its adapter in ``row_adapters``, float32 of shape (rows, C).

        Raises:
            ValueError: the batch has another number of rows, or adapters are merged.
        """
        names = self.row_adapters or ()
        if self.merged:
            raise ValueError("adapter_names: adapters are merged into the weights of all rows: unmerge them first")
        if len(names) != rows:
            raise ValueError(f"adapter_names: found {len(names)} names for {rows} rows, expected one for each row")
        identity = torch.ones(self.in_features, device=self.get_base_layer().weight.device)
        return torch.stack([self.channel_scale(name) if name in self.seal_scale else identity for name in names])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Project the scaled input.

        Args:
            x: concatenated head outputs, shape (..., C), any float dtype; the product is computed in float32.
            args: passed to the projection.
            kwargs: passed to the projection.

        Returns:
            Shape (..., out_features), in the dtype of the projection.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        scale = None
        if self.row_adapters is not None and not self.disable_adapters:
            scale = self.row_scale(x.shape[0]).view(x.shape[0], *[1] * (x.dim() - 2), -1)
        elif not (self.disable_adapters or self.merged):
            scale = self.active_scale()
        if scale is not None:
            x = Scale.apply(x, scale)
        return self.base_layer(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply the columns of the projection's weight by the scales of their channels (paper section 4.3).

        The original weight is stored and restored by ``unmerge``, so that unmerging is exact.

        Args:
            safe_merge: check that the new weight is finite.
            adapter_names: adapters to merge; None means the active ones.

        Raises:
            ValueError: the weight is quantised, or ``safe_merge`` and the new weight is not finite.
        """
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.seal_scale:
                continue
            if not base.weight.is_floating_point():
                raise ValueError("cannot merge into a quantised projection: merge into the full-precision base model")
            scale = self.channel_scale(name).detach().to(base.weight.device)
            columns = scale[:, None] if isinstance(base, Conv1D) else scale
            merged = (base.weight.data * columns).to(base.weight.dtype)  # in float32, or wider where the weight is
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"merging adapter {name!r} gives non-finite weights: train it again at a lower learning rate"
                )
            if self._unmerged_weight is None:
                self._unmerged_weight = base.weight.data
            base.weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the original weight."""
        if self._unmerged_weight is not None:
            self.get_base_layer().weight.data = self._unmerged_weight
        self._unmerged_weight = None
        self.merged_adapters.clear()


def projection_shape(module: nn.Module) -> tuple[int, int]:
    """Return ``(in_features, out_features)`` of a Linear (also quantised) or Conv1D.

    Raises:
        TypeError: ``module`` is neither.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    raise TypeError(f"SEAL scales the input of a Linear or Conv1D projection, found {type(module).__name__}")
