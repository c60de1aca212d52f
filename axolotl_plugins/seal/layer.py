"""A projection whose input is scaled: SEAL(x) = W (s * x) + b."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SealConfig


class Scale(torch.autograd.Function):
    """``x * scale``, formed in the dtype of the scale; keeps ``x`` as it is, not a copy in that dtype.

    ``x`` is the attention's output, which its own backward pass keeps anyway, so scaling takes no memory of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Scale x of shape (..., C) by a scale that broadcasts to it."""
        ctx.save_for_backward(x, scale)
        return (x * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of both; that of the scale is summed up in its own dtype."""
        x, scale = ctx.saved_tensors
        of_x = (gradient * scale).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (gradient.to(scale.dtype) * x).sum_to_size(scale.shape)
        return of_x, of_scale


class SealLayer(nn.Module, BaseTunerLayer):
    """Scales the input of an attention output projection (paper section 4.2, Figure 3a).

    C is the number of input channels (heads x head_dim), H the number of query heads. ``seal_scale`` holds, for each
    adapter, a float32 parameter of shape (H,) for SEAL-H or (C,) for SEAL-C.
    """

    adapter_layer_names = ("seal_scale",)

    # What BaseTunerLayer gives, for the type checker: nn.Module claims every name to be a tensor or a module.
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SealConfig, num_heads: int) -> None:
        """Wrap ``base_layer`` and give it its first adapter."""
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = projection_shape(base_layer)
        self.num_heads = num_heads
        self.seal_scale = nn.ParameterDict({})
        self._disable_adapters = False
        # Scales of a probe, on top of all others: shape (C,), or (B, 1, C) for one vector per row of the batch.
        self.probe: torch.Tensor | None = None
        self._unmerged_weight: torch.Tensor | None = None
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SealConfig, **_: Any) -> None:
        """Add an adapter whose scales are all 1."""
        size = self.num_heads if config.granularity == "head" else self.in_features
        self.seal_scale[adapter_name] = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Follow the projection to its device, never to its dtype: bfloat16 has no number between 1 and 1.0078."""
        scale = self.seal_scale[adapter_name]
        if scale.device.type != "meta":
            weight = self.get_base_layer().weight
            self.seal_scale[adapter_name] = nn.Parameter(
                scale.data.to(device=device or weight.device, dtype=torch.float32), requires_grad=scale.requires_grad
            )

    def _apply(self, fn: Any, recurse: bool = True) -> SealLayer:
        """Follow the model to other devices but keep float32 where the model is cast, for the same reason."""
        exact = {name: scale.data for name, scale in self.seal_scale.items()}
        super()._apply(fn, recurse)
        for name, scale in self.seal_scale.items():
            if exact[name].device.type != "meta" and scale.dtype != torch.float32:
                scale.data = exact[name].to(scale.device)
        return self

    def channel_scale(self, adapter_name: str) -> torch.Tensor:
        """The adapter's scales, one for each input channel: float32 of shape (C,)."""
        scale = self.seal_scale[adapter_name]
        return scale if scale.numel() == self.in_features else scale.repeat_interleave(self.in_features // len(scale))

    def active_scale(self) -> torch.Tensor | None:
        """Product of the active adapters' scales, float32 of shape (C,); None where no active adapter scales here."""
        product = None
        for name in self.active_adapters:
            if name in self.seal_scale:
                scale = self.channel_scale(name)
                product = scale if product is None else product * scale
        return product

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Project the scaled input.

        Args:
            x: concatenated head outputs, shape (..., C), any float dtype; the product is formed in float32.
            args: passed on to the projection.
            kwargs: passed on to the projection.

        Returns:
            Shape (..., out_features), in the dtype of the projection.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        scale = None if self.disable_adapters or self.merged else self.active_scale()
        if self.probe is not None:
            scale = self.probe if scale is None else scale * self.probe
        if scale is not None:
            x = Scale.apply(x, scale)
        return self.base_layer(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold scales into the columns of the projection's weight that read their channels (paper section 4.3).

        The weight from before is kept and put back by ``unmerge``, so that unmerging is exact.

        Args:
            safe_merge: check that the new weight is finite.
            adapter_names: which adapters; None means the active ones.

        Raises:
            ValueError: the weight is quantised, or ``safe_merge`` found a value that is not finite.
        """
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.seal_scale:
                continue
            if not base.weight.is_floating_point():
                raise ValueError("cannot merge into a quantised projection: merge into the full-precision base model")
            scale = self.channel_scale(name).detach().to(base.weight.device)
            merged = scale_columns(base, scale)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {name!r} gives weights that are not finite: its scales are broken")
            if self._unmerged_weight is None:
                self._unmerged_weight = base.weight.data
            base.weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the weight from before the merge back."""
        if self._unmerged_weight is not None:
            self.get_base_layer().weight.data = self._unmerged_weight
        self._unmerged_weight = None
        self.merged_adapters.clear()


def projection_shape(module: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of a Linear (also quantised) or Conv1D.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    raise TypeError(f"SEAL scales the input of a Linear or Conv1D projection, found {type(module).__name__}")


def scale_columns(module: nn.Linear | Conv1D, scale: torch.Tensor) -> torch.Tensor:
    """The weight of ``module`` with input channel c multiplied by float32 ``scale[c]``, in its own dtype.

    Products are formed in float32, or in the weight's dtype where that is wider.
    """
    column = scale[:, None] if isinstance(module, Conv1D) else scale
    return (module.weight.data * column).to(module.weight.dtype)
