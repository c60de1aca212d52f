"""Context parallelism: each sample is sharded across processes, which all-gather keys and values.

The answer is at the end of a sample, so that most processes have no labels: their loss is 0, and they compute keys and
values for the answer. Tokens are split into twice as many chunks as there are processes; each process takes one chunk
from the front and one from the back, which balances the work of causal attention (section 3.3.2 of the Llama 3 report,
arXiv 2407.21783).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from axolotl_plugins.self_extend.attention import slides

from .answer_logits import IGNORED

NAME = "context_parallel"
# Architectures with plain causal attention.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # those that do not change attention


class Gather(torch.autograd.Function):
    """All-gather of keys or values, in token order; reduce-scatter in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Gather the two chunks of each of n processes, shape (B, G, 2 c, D), into shape (B, G, 2 n c, D)."""
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        first, last = zip(*(part.chunk(2, dim=2) for part in parts), strict=True)
        return torch.cat((*first, *reversed(last)), dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Sum the gradients of this process's chunks over all processes."""
        processes = ctx.group.size()
        chunks = gradient.chunk(2 * processes, dim=2)
        parts = [torch.cat((chunks[rank], chunks[-1 - rank]), dim=2) for rank in range(processes)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


class ContextParallel:
    """Group of ``size`` processes with consecutive ranks that share samples.

    Raises:
        ValueError: see ``check_processes``.
    """

    def __init__(self, size: int) -> None:
        check_processes(dist.get_world_size() if dist.is_initialized() else 1, size)
        self.size = size
        self.group, _ = dist.new_subgroups(size)
        self.rank = self.group.rank()
        self.last = 0  # position of the current sample's last token

    def prepare(self, model: PreTrainedModel) -> None:
        """Replace a model's attention by ``attend``.

        Raises:
            ValueError: the model's attention is not supported, see ``check_model``.
        """
        check_model(model)
        ALL_ATTENTION_FUNCTIONS.register(NAME, self.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_, **__: None)  # plain causal attention needs no mask
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if hasattr(module, "rope_type"):
                module.register_forward_pre_hook(self.add_last, with_kwargs=True)
                module.register_forward_hook(self.drop_last)

    def add_last(self, _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Append the sample's last position to RoPE's: the frequencies of some types depend on the length."""
        x, positions = (*args, *kwargs.values())
        return (x, torch.cat((positions, positions.new_full((1, 1), self.last)), dim=1)), {}

    def drop_last(self, _: torch.nn.Module, __: tuple, angles: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Remove the angles of the position that ``add_last`` appended."""
        return tuple(angle[:, :-1] for angle in angles)

    def share(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return this process's shard of a sample.

        Args:
            inputs: ``input_ids`` and ``shift_labels`` (see ``answer_logits.next_labels``), shape (1, T), and
                optionally ``attention_mask`` without padding; equal in all processes of the group.

        Returns:
            ``input_ids``, ``labels``, ``shift_labels`` and ``position_ids``, shape (1, 2 c): two of 2 n chunks of c
            tokens, right-padded to a multiple of 2 n, so that no token attends to padding; and
            ``num_items_in_batch``, the number of labels of the whole sample, by which the loss is divided.

        Raises:
            ValueError: several samples, padding, or other inputs.
        """
        ids, labels = inputs["input_ids"], inputs["shift_labels"]
        if others := inputs.keys() - {"input_ids", "labels", "shift_labels", "attention_mask"}:
            raise ValueError(
                f"seal.context_parallel: cannot shard the inputs {', '.join(sorted(others))}: remove context_parallel, "
                "or the setting that adds them"
            )
        mask = inputs.get("attention_mask")
        if len(ids) > 1 or (mask is not None and not mask.all()):
            raise ValueError(
                "seal.context_parallel: found several samples at once, or padding: set `micro_batch_size: 1` and "
                "`pad_to_multiple_of: 1`"
            )
        self.last = ids.shape[1] - 1
        padding = -ids.shape[1] % (2 * self.size)
        ids, labels = F.pad(ids, (0, padding)), F.pad(labels, (0, padding), value=IGNORED)
        chunks = torch.arange(ids.shape[1], device=ids.device).view(2 * self.size, -1)
        positions = torch.cat((chunks[self.rank], chunks[-1 - self.rank]))
        shard_labels = labels[:, positions]
        return {
            "input_ids": ids[:, positions], "position_ids": positions[None].clamp(max=self.last),
            "labels": shard_labels, "shift_labels": shard_labels, "num_items_in_batch": (labels != IGNORED).sum(),
        }  # fmt: skip

    def attend(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
               **_: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Compute causal attention of this process's two chunks to all tokens, as a Transformers attention function.

        Args:
            module: the attention layer.
            query: shape (1, H, 2 c, D), after RoPE.
            key: shape (1, G, 2 c, D), after RoPE; H is a multiple of G.
            value: shape (1, G, 2 c, D).
            attention_mask: None.
            scaling: factor of the scores; None means 1 / sqrt(D).
            dropout: must be 0.

        Returns:
            Shape (1, 2 c, H, D), and None instead of attention weights.

        Raises:
            ValueError: attention dropout, whose random values would differ between processes.
        """
        if dropout:
            raise ValueError(f"attention_dropout: found {dropout}, expected 0 with seal.context_parallel: set it to 0")
        # Kernels in 16 bits support grouped-query attention; in float32 keys and values are repeated for each head.
        copies = query.shape[1] // key.shape[1] if key.dtype == torch.float32 else 1
        key, value = (Gather.apply(x, self.group).repeat_interleave(copies, 1) for x in (key, value))
        outputs = []
        for part, chunk in zip(query.chunk(2, dim=2), (self.rank, 2 * self.size - 1 - self.rank), strict=True):
            length = part.shape[2]
            end = (chunk + 1) * length  # the chunk's last query attends to all keys before this index
            mask = causal_lower_right(length, end)
            keys, values = key[:, :, :end], value[:, :, :end]
            grouped = keys.shape[1] != part.shape[1]
            outputs.append(F.scaled_dot_product_attention(part, keys, values, mask, scale=scaling, enable_gqa=grouped))
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def check_processes(processes: int, size: int) -> None:
    """Raise ValueError if processes cannot be divided into groups of ``size``."""
    if processes % size:
        raise ValueError(
            f"seal.context_parallel: {size} processes share a sample, found {processes}: start a multiple of {size} "
            "(`accelerate launch --num_processes`; without GPUs `torchrun --nproc_per_node`), or remove it"
        )


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError if a model's attention cannot be sharded: its architecture, sliding windows or RoPE type."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"seal.context_parallel: found {config.model_type}, expected one of {', '.join(MODEL_TYPES)}: remove "
            "context_parallel"
        )
    if slides(config):
        raise ValueError(
            "seal.context_parallel: the model has sliding-window attention: set `sliding_window: null` in "
            "`model_config`, or remove context_parallel"
        )
    if (kind := (config.rope_parameters or {}).get("rope_type", "default")) not in ROPE_TYPES:
        raise ValueError(
            f"seal.context_parallel: found rope_type {kind!r}, expected one of {', '.join(ROPE_TYPES)}: remove "
            "context_parallel"
        )
