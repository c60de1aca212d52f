"""One sample spread over several processes: each computes a part of the tokens, and gathers all keys and values.

Answers lie at a sample's end, so that most processes have none: their loss is 0, and they hold what the answer attends
to. Tokens are cut into twice as many chunks as there are processes, of which each takes one from the front and one from
the back, so that causal attention is as much work for all of them (as in section 3.3.2 of the Llama 3 report, arXiv
2407.21783).
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
# Architectures whose attention is causal and nothing else.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # those that leave attention as it is


class Gather(torch.autograd.Function):
    """Keys or values of all processes, in the order of the tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """From this process's two chunks, shape (B, G, 2 c, D), to all, (B, G, 2 n c, D)."""
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        first, last = zip(*(part.chunk(2, dim=2) for part in parts), strict=True)
        return torch.cat((*first, *reversed(last)), dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """What all processes' queries say about this process's chunks."""
        processes = ctx.group.size()
        chunks = gradient.chunk(2 * processes, dim=2)
        parts = [torch.cat((chunks[rank], chunks[-1 - rank]), dim=2) for rank in range(processes)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


class ContextParallel:
    """The processes that share this one's samples: ``size`` of them, whose ranks follow each other.

    Raises:
        ValueError: see ``check_processes``.
    """

    def __init__(self, size: int) -> None:
        check_processes(dist.get_world_size() if dist.is_initialized() else 1, size)
        self.size = size
        self.group, _ = dist.new_subgroups(size)
        self.rank = self.group.rank()
        self.last = 0  # position of the present sample's last token

    def prepare(self, model: PreTrainedModel) -> None:
        """Give a model the attention that gathers.

        Raises:
            ValueError: its attention is of a kind that cannot be shared.
        """
        check_model(model)
        ALL_ATTENTION_FUNCTIONS.register(NAME, self.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_, **__: None)  # causal alone, which needs none
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if hasattr(module, "rope_type"):
                module.register_forward_pre_hook(self.add_last, with_kwargs=True)
                module.register_forward_hook(self.drop_last)

    def add_last(self, _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Show RoPE the sample's last position, wherever it is: the angles of some kinds depend on the length."""
        x, positions = (*args, *kwargs.values())
        return (x, torch.cat((positions, positions.new_full((1, 1), self.last)), dim=1)), {}

    def drop_last(self, _: torch.nn.Module, __: tuple, angles: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What RoPE says about this process's own positions."""
        return tuple(angle[:, :-1] for angle in angles)

    def share(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """This process's part of a sample.

        Args:
            inputs: ``input_ids`` and ``shift_labels`` (the label of the token after each), shape (1, T), and
                ``attention_mask``, if any, without padding. The same in all processes that share the sample.

        Returns:
            ``input_ids``, ``labels``, ``shift_labels`` and ``position_ids``, shape (1, 2 c): two of 2 n chunks of c
            tokens; what is missing to a multiple of 2 n comes last, so that no token attends to it. And
            ``num_items_in_batch``, the number of labels of the whole sample, by which a loss divides its sum.

        Raises:
            ValueError: more than one sample, padding, or inputs of another kind.
        """
        ids, labels = inputs["input_ids"], inputs["shift_labels"]
        if others := inputs.keys() - {"input_ids", "labels", "shift_labels", "attention_mask"}:
            raise ValueError(
                f"seal.context_parallel: samples have {', '.join(sorted(others))}, which cannot be shared: leave out "
                "context_parallel, or what makes them"
            )
        mask = inputs.get("attention_mask")
        if len(ids) > 1 or (mask is not None and not mask.all()):
            raise ValueError(
                "seal.context_parallel: found several samples at once, or padding: set `micro_batch_size: 1` and "
                "`pad_to_multiple_of: 1`"
            )
        self.last = ids.shape[1] - 1
        missing = -ids.shape[1] % (2 * self.size)
        ids, labels = F.pad(ids, (0, missing)), F.pad(labels, (0, missing), value=IGNORED)
        chunks = torch.arange(ids.shape[1], device=ids.device).view(2 * self.size, -1)
        places = torch.cat((chunks[self.rank], chunks[-1 - self.rank]))
        here = labels[:, places]
        return {
            "input_ids": ids[:, places], "position_ids": places[None].clamp(max=self.last), "labels": here,
            "shift_labels": here, "num_items_in_batch": (labels != IGNORED).sum(),
        }  # fmt: skip

    def attend(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
               **_: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
        """An attention function of transformers, for the two chunks of tokens that ``share`` gave.

        Args:
            module: the attention layer.
            query: shape (1, H, 2 c, D), rotated.
            key: shape (1, G, 2 c, D), likewise; H is a multiple of G.
            value: shape (1, G, 2 c, D).
            attention_mask: None.
            scaling: of the scores; None means 1 / sqrt(D).
            dropout: must be 0.

        Returns:
            Shape (1, 2 c, H, D); and None for the weights.

        Raises:
            ValueError: attention dropout, whose numbers would differ between processes.
        """
        if dropout:
            raise ValueError(f"attention_dropout: found {dropout}, but seal.context_parallel has none: set it to 0")
        # In 16 bits kernels know groups of heads that share a key; where they do not, each head has a copy.
        copies = query.shape[1] // key.shape[1] if key.dtype == torch.float32 else 1
        key, value = (Gather.apply(x, self.group).repeat_interleave(copies, 1) for x in (key, value))
        mixed = []
        for part, chunk in zip(query.chunk(2, dim=2), (self.rank, 2 * self.size - 1 - self.rank), strict=True):
            length = part.shape[2]
            end = (chunk + 1) * length  # the last of its queries sees all keys before here
            mask = causal_lower_right(length, end)
            keys, values = key[:, :, :end], value[:, :, :end]
            grouped = keys.shape[1] != part.shape[1]
            mixed.append(F.scaled_dot_product_attention(part, keys, values, mask, scale=scaling, enable_gqa=grouped))
        return torch.cat(mixed, dim=2).transpose(1, 2).contiguous(), None


def check_processes(found: int, size: int) -> None:
    """See that processes can be divided into groups that share samples.

    Raises:
        ValueError: their number is no multiple of ``size``.
    """
    if found % size:
        raise ValueError(
            f"seal.context_parallel: {size} processes share a sample, found {found}: start a multiple of {size} "
            "(`accelerate launch --num_processes`; without GPUs `torchrun --nproc_per_node`), or leave it out"
        )


def check_model(model: PreTrainedModel) -> None:
    """See that a model's attention can be computed in parts.

    Raises:
        ValueError: it cannot.
    """
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"seal.context_parallel: found {config.model_type}, expected one of {', '.join(MODEL_TYPES)}: leave out "
            "context_parallel"
        )
    if slides(config):
        raise ValueError(
            "seal.context_parallel: the model's attention slides over its window: set `sliding_window: null` in "
            "`model_config`, or leave out context_parallel"
        )
    if (kind := (config.rope_parameters or {}).get("rope_type", "default")) not in ROPE_TYPES:
        raise ValueError(
            f"seal.context_parallel: found rope_type {kind!r}, expected one of {', '.join(ROPE_TYPES)}: leave out "
            "context_parallel"
        )
