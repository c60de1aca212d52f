"""Answers of a model with heads or channels ablated, for many ablations at little cost.

Ablating a head of layer l changes nothing below l, nor the keys, values and attention weights of l itself. So the whole
model prefills a prompt once; an ablation then starts from the hidden states that entered layer l and from the output of
its attention, and ablations of one layer share a batch from there on. In the last layer, only the answer's positions
are computed. The reference answer is prefilled with the prompt: where the model would have generated it anyway nothing
is left to decode, and its log-probability is a by-product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from eval.generation import can_join_caches
from eval.probe.hooks import (
    Block,
    decoder_blocks,
    hidden_states,
    on_input,
    removing,
    replaced_forwards,
    scaled_input,
    with_hidden_states,
)


@dataclass(frozen=True)
class Answer:
    """Answer of one ablated model.

    Attributes:
        ids: greedy answer without the token that ends it.
        logprob: mean log-probability of the reference answer's tokens; nan where there is no reference.
    """

    ids: list[int]
    logprob: float


@dataclass
class Trace:
    """Activations of one prefill of a prompt with its reference answer, T tokens together.

    Attributes:
        ids: shape (1, T).
        prompt: tokens of the prompt.
        entered: hidden states before each layer, shape (1, T, d).
        attended: input of each layer's projection, shape (1, T, C).
        outputs: output of each layer with the hidden states emptied: only its structure is needed.
        attentions: the same of each layer's attention; None where it computes more than the projection.
        cache: keys and values of all layers.
        answer: of the unchanged model.
    """

    ids: torch.Tensor
    prompt: int
    entered: list[torch.Tensor]
    attended: list[torch.Tensor]
    outputs: list[Any]
    attentions: list[Any]
    cache: DynamicCache
    answer: Answer

    @property
    def reference(self) -> torch.Tensor:
        """Ids of the reference answer, shape (tokens,)."""
        return self.ids[0, self.prompt :]


class HeadAblator:
    """Prefills prompts, and answers them with ablated models.

    Args:
        model: see ``hooks.wrap``.
        stop: ids that end an answer.
        max_new_tokens: most tokens of an answer; with 0 nothing is decoded, and answers have a log-probability only.
        batch: ablations per batch.

    Raises:
        ValueError: nothing is decoded, and the model's cache holds a sliding window, so that references are decoded.
    """

    def __init__(self, model: Any, stop: Collection[int], max_new_tokens: int, batch: int = 8) -> None:
        """Find the model's decoder layers."""
        self.model, self.stop, self.max_new_tokens, self.batch = model, stop, max_new_tokens, batch
        self.blocks: list[Block] = decoder_blocks(model)
        config = model.config
        # A sliding-window cache cannot be cropped to before the reference.
        self.drafts = can_join_caches(model)
        if not (self.drafts or max_new_tokens):
            raise ValueError("score: a model with a sliding window decodes its answers: leave out --no-score")
        self.new_cache: Callable[[], DynamicCache] = lambda: DynamicCache(config=config)

    @torch.inference_mode()
    def prefill(self, prompt: list[int], reference: list[int]) -> Trace:
        """Run a prompt and its reference answer, whose last token should end it, through the model."""
        reference = reference if self.drafts else []
        ids = torch.tensor([prompt + reference], device=self.model.device)
        missing: list[Any] = [None] * len(self.blocks)
        trace = Trace(ids, len(prompt), [*missing], [*missing], [*missing], [*missing], self.new_cache(), Answer([], 0))
        handles = [handle for i, block in enumerate(self.blocks) for handle in record(block, i, trace)]
        with removing(handles):
            logits = self.forward(ids, trace.cache, len(reference) + 1)
        trace.answer = self.complete(trace, copy.copy(trace.cache), logits)[0]
        return trace

    def forward(self, ids: torch.Tensor, cache: DynamicCache, count: int) -> torch.Tensor:
        """Return the logits of the last ``count`` positions, shape (B, count, V)."""
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=count).logits[:, -count:]

    @torch.inference_mode()
    def ablate(self, trace: Trace, layer: int, scales: torch.Tensor) -> list[Answer]:
        """Answer a prompt with a layer's attention output scaled in N ways.

        Args:
            trace: of the prompt.
            layer: its index.
            scales: shape (N, C), on top of the model's own scales.
        """
        answers: list[Answer] = []
        for part in scales.to(self.model.device).split(self.batch):
            answers += self.ablate_batch(trace, layer, part[:, None])
        return answers

    def ablate_batch(self, trace: Trace, layer: int, scales: torch.Tensor) -> list[Answer]:
        """Answer a prompt with ablations in one batch; scales of shape (B, 1, C)."""
        size, block = len(scales), self.blocks[layer]
        count = len(trace.reference) + 1
        attention = trace.attentions[layer]
        # Without attention above it, the last layer is needed at the answer's positions only.
        start = -count if layer == len(self.blocks) - 1 and attention is not None else 0
        expand = lambda tensor: tensor[:, start:].expand(size, -1, -1)  # noqa: E731
        replacements: dict[nn.Module, Callable[..., Any]] = {
            below.layer: lambda *args, i=i, **kwargs: with_hidden_states(trace.outputs[i], expand(trace.entered[layer]))
            for i, below in enumerate(self.blocks[:layer])
        }
        if attention is not None:
            replacements[block.attention] = lambda *args, **kwargs: with_hidden_states(
                attention, block.projection(expand(trace.attended[layer]))
            )
        handles = []
        if layer == 0 and start:

            def crop_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
                if args:
                    return (expand(trace.entered[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": expand(trace.entered[0])}

            handles.append(block.layer.register_forward_pre_hook(crop_input, with_kwargs=True))
        if start:

            def pad_output(module: nn.Module, args: Any, output: Any) -> Any:
                # Some models rely on the number of positions; no logits are computed from these.
                return with_hidden_states(
                    output, nn.functional.pad(hidden_states(output), (0, 0, trace.ids.shape[1] - count, 0))
                )

            handles.append(block.layer.register_forward_hook(pad_output))
        cache = self.new_cache()
        with scaled_input(block.projection, scales), replaced_forwards(replacements), removing(handles):
            logits = self.forward(trace.ids.expand(size, -1), cache, count)
        for i in range(layer + 1):
            cache.layers[i] = copy.copy(trace.cache.layers[i])
            cache.layers[i].batch_repeat_interleave(size)
        return self.complete(trace, cache, logits, lambda rows: scaled_input(block.projection, scales[rows]))

    def complete(
        self, trace: Trace, cache: DynamicCache, logits: torch.Tensor,
        ablation: Callable[[torch.Tensor], AbstractContextManager[None]] = lambda rows: nullcontext(),
    ) -> list[Answer]:  # fmt: skip
        """Decode the answers that depart from the reference.

        Args:
            trace: of the prompt.
            cache: consumed; its layers' tensors are not modified in place.
            logits: from the prompt's last token on, shape (B, 1 + tokens of the reference, V).
            ablation: returns a context in which the model is ablated as in these rows of the batch.
        """
        reference = trace.reference.tolist()
        greedy = logits.argmax(-1)
        agreed = [
            next((i for i, id_ in enumerate(reference) if row[i] != id_), len(reference)) for row in greedy.tolist()
        ]
        ended = bool(reference) and reference[-1] in self.stop
        complete = [(ended and count == len(reference)) or count >= self.max_new_tokens for count in agreed]
        open_rows = [row for row, done in enumerate(complete) if not done]
        answers = [(reference[:-1] if ended else reference)[: self.max_new_tokens] for _ in agreed]
        if open_rows:
            shared = min(agreed[row] for row in open_rows)
            rows = torch.tensor(open_rows)  # on the CPU: layers may be on several devices
            # A shallow copy leaves the trace's own cache as it is.
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            if reference:
                cache.crop(shared - len(reference))
            cache.batch_select_indices(rows)
            with ablation(rows):
                decoded = self.decode(cache, greedy[rows, shared], self.max_new_tokens - shared)
            for row, ids in zip(open_rows, decoded, strict=True):
                answers[row] = reference[:shared] + ids
        logprobs = reference_logprobs(logits, trace.reference).tolist()
        return [Answer(ids, logprob) for ids, logprob in zip(answers, logprobs, strict=True)]

    def decode(self, cache: DynamicCache, tokens: torch.Tensor, budget: int) -> list[list[int]]:
        """Decode greedily from a cache and each row's next token, shape (B,), up to ``budget`` tokens."""
        answers: list[list[int]] = [[] for _ in tokens]
        open_rows = set(range(len(answers)))
        while True:
            for row in sorted(open_rows):
                token = int(tokens[row])
                if token in self.stop:
                    open_rows.discard(row)
                    continue
                answers[row].append(token)
                if len(answers[row]) == budget:
                    open_rows.discard(row)
            if not open_rows:
                return answers
            tokens = self.forward(tokens[:, None], cache, 1)[:, -1].argmax(-1)


def record(block: Block, index: int, trace: Trace) -> list[Any]:
    """Register hooks that record a layer's activations in a trace; return their handles."""
    projected: list[torch.Tensor] = []
    emptied = lambda output: with_hidden_states(output, torch.empty(0))  # noqa: E731

    def after_projection(module: nn.Module, args: Any, output: Any) -> None:
        trace.attended[index] = args[0]
        projected.append(output)

    def after_attention(module: nn.Module, args: Any, output: Any) -> None:
        if torch.equal(hidden_states(output), projected.pop()):
            trace.attentions[index] = emptied(output)

    return [
        on_input(block.layer, lambda states: trace.entered.__setitem__(index, states)),
        block.layer.register_forward_hook(lambda _, __, output: trace.outputs.__setitem__(index, emptied(output))),
        block.projection.register_forward_hook(after_projection),
        block.attention.register_forward_hook(after_attention),
    ]


def reference_logprobs(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean log-probability of a reference's tokens, shape (B,); nan where it is empty.

    Args:
        logits: from the prompt's last token on, shape (B, 1 + tokens, V).
        reference: ids, shape (tokens,).
    """
    if not len(reference):
        return torch.full((len(logits),), torch.nan)
    target = reference.expand(len(logits), -1)
    return -nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), target, reduction="none").mean(1)
