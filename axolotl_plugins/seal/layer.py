"""Module with a scaled input or output.

SEAL scales the input of attention output projections, SEAL(x) = W (s * x) + b (paper section 4.2). Placements beyond
the paper scale the input of another projection, or an output: s * (W x + b).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SealConfig
from .placements import Site, features


class Scale(torch.autograd.Function):
    """Compute ``x * scale`` in the dtype of the scale and save ``x`` for backward without upcasting it.

    An attention output is saved by attention's backward pass anyway, so scaling it adds no activation memory; scaled
    queries, values and inputs of the MLP's output projection add their own.
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
    """Scale the input or output of a module (paper section 4.2, Figure 3a).

    C is the number of scaled channels, for an attention output heads x head_dim, and H the number of heads.
    ``seal_scale`` maps adapter names to float32 parameters of shape (H,) for SEAL-H or (C,) for SEAL-C.
    """

    adapter_layer_names = ("seal_scale",)

    # Inherited from BaseTunerLayer; declared because nn.Module types every attribute as a tensor or a module.
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SealConfig, site: Site) -> None:
        """Wrap ``base_layer`` and add its first adapter."""
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.num_heads = site.heads
        self.in_features, self.out_features = (site.channels,) * 2 if site.gain else features(base_layer)
        self._rows: torch.Tensor | None = None  # site.rows on the device of the scales
        self.seal_scale = nn.ParameterDict({})
        self.row_adapters: Sequence[str] | None = None  # see SealModel._enable_peft_forward_hooks
        self._disable_adapters = False
        self._unmerged: dict[str, torch.Tensor] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SealConfig, **_: Any) -> None:
        """Add an adapter with all scales initialised to 1."""
        size = self.num_heads if config.granularity == "head" else self.site.channels
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
        """Return the adapter's scale of each channel, float32 of shape (C,)."""
        scale = self.seal_scale[adapter_name]
        return scale if len(scale) == self.site.channels else scale.repeat_interleave(self.site.channels // len(scale))

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
        identity = torch.ones(self.site.channels, device=self.get_base_layer().weight.device)
        return torch.stack([self.channel_scale(name) if name in self.seal_scale else identity for name in names])

    def of_features(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the factor of each feature of the input or output, which is 1 where a feature has no scale.

        Args:
            scale: of the channels, shape (..., C).

        Returns:
            Shape (..., *F): F is (in_features,), (out_features,), or, after a norm, the shape of its gain.
        """
        leading = scale.shape[:-1]
        if self.site.rows is not None:
            if self._rows is None or self._rows.device != scale.device:
                self._rows = torch.tensor(self.site.rows, device=scale.device)
            return scale.new_ones(*leading, self.out_features).index_copy(-1, self._rows, scale)
        return scale.view(*leading, *self.site.gain) if self.site.gain else scale

    def multiply(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Scale an input or output; ``scale`` has the shape (C,), or (B, C) for one vector per row of the batch."""
        factor = self.of_features(scale)
        if scale.dim() > 1:
            shape = factor.shape[1:]
            factor = factor.view(len(factor), *[1] * (x.dim() - 1 - len(shape)), *shape)
        return Scale.apply(x, factor)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the module on the scaled input, or scale its output.

        Args:
            x: shape (..., in_features), such as concatenated head outputs, any float dtype; the product with the scale
                is computed in float32.
            args: passed to the module.
            kwargs: passed to the module.

        Returns:
            The module's output, in its dtype.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        scale = None
        if self.row_adapters is not None and not self.disable_adapters:
            scale = self.row_scale(x.shape[0])
        elif not (self.disable_adapters or self.merged):
            scale = self.active_scale()
        if scale is None:
            return self.base_layer(x, *args, **kwargs)
        if self.site.of_output:
            return self.multiply(self.base_layer(x, *args, **kwargs), scale)
        return self.base_layer(self.multiply(x, scale), *args, **kwargs)

    def parameter_factors(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what a merge multiplies the module's parameters by; ``scale`` is of the channels, shape (C,)."""
        return parameter_factors(self.get_base_layer(), self.of_features(scale), self.site.of_output)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply the module's weight by the scales (paper section 4.3).

        The original parameters are stored and restored by ``unmerge``, so that unmerging is exact.

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
            merged = {}
            for key, factor in self.parameter_factors(self.channel_scale(name).detach()).items():
                value = getattr(base, key).data
                merged[key] = (value * factor.to(value.device)).to(value.dtype)  # in float32, or wider where it is
            if safe_merge and not all(value.isfinite().all() for value in merged.values()):
                raise ValueError(
                    f"merging adapter {name!r} gives non-finite weights: train it again at a lower learning rate"
                )
            for key, value in merged.items():
                self._unmerged.setdefault(key, getattr(base, key).data)
                getattr(base, key).data = value
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the original parameters."""
        for key, value in self._unmerged.items():
            getattr(self.get_base_layer(), key).data = value
        self._unmerged.clear()
        self.merged_adapters.clear()


def parameter_factors(module: nn.Module, factor: torch.Tensor, of_output: bool) -> dict[str, torch.Tensor]:
    """Return what a module's parameters are multiplied by to scale its input or output (paper section 4.3).

    Args:
        module: a Linear, Conv1D or norm.
        factor: of each feature, see ``SealLayer.of_features``.
        of_output: whether of the output, or of the input.

    Returns:
        ``weight``, and ``bias`` where the output has one -> factor that broadcasts to the parameter.
    """
    weight = factor
    if isinstance(module, nn.Linear | Conv1D):  # the latter stores the transpose
        weight = factor[None] if of_output == isinstance(module, Conv1D) else factor[:, None]
    has_bias = of_output and getattr(module, "bias", None) is not None
    return {"weight": weight, "bias": factor} if has_bias else {"weight": weight}
