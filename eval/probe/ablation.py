"""Answers of a model without some of its heads or channels, for many such variants at little cost.

A head of layer l changes nothing below l, nor the keys, values and attention of l itself. So a prompt is read once by
the whole model; a variant then starts from what entered layer l and from what its attention found, and variants of one
layer go through the rest as one batch. In the last layer, only the answer's positions are computed. The reference
answer is read along with the prompt: where the model would have written it anyway nothing is left to decode, and its
log-probability comes for free.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from eval.generation import can_join_caches
from eval.probe.hooks import Block, blocks, first, forwards, hidden_of, hooks, like, probing


@dataclass(frozen=True)
class Answer:
    """What a variant answers.

    Attributes:
        ids: greedy answer without the token that ends it.
        logprob: mean log-probability of the reference answer's tokens; nan where there is no reference.
    """

    ids: list[int]
    logprob: float


@dataclass
class Reading:
    """What is kept of one pass over a prompt and its reference answer, of T tokens together.

    Attributes:
        ids: shape (1, T).
        prompt: tokens of the prompt.
        entered: hidden states before each layer, shape (1, T, d).
        attended: what each layer's projection read, before the probe, shape (1, T, C).
        outputs: what each layer gave, with an empty first tensor: its form is what is needed.
        attentions: the same of each layer's attention; None where it is more than the projection.
        cache: keys and values of all layers.
        answer: the unchanged model's.
    """

    ids: torch.Tensor
    prompt: int
    entered: list[torch.Tensor]
    attended: list[torch.Tensor]
    outputs: list[Any]
    attentions: list[Any]
    cache: DynamicCache
    answer: Answer


class HeadAblator:
    """Reads prompts, and answers them with variants of the model.

    Args:
        model: wrapped, see ``anatomy.wrapped``.
        stop: ids that end an answer.
        max_new_tokens: most tokens of an answer.
        batch: variants that go through the model together.
    """

    def __init__(self, model: Any, stop: Collection[int], max_new_tokens: int, batch: int = 8) -> None:
        """Find the model's layers."""
        self.model, self.stop, self.max_new_tokens, self.batch = model, stop, max_new_tokens, batch
        self.blocks: list[Block] = blocks(model)
        config = model.config
        # A cache that forgets cannot be cut back to before the reference.
        self.drafts = can_join_caches(model)
        self.new_cache: Callable[[], DynamicCache] = lambda: DynamicCache(config=config)

    @torch.inference_mode()
    def read(self, prompt: list[int], reference: list[int]) -> Reading:
        """One pass over a prompt and its reference answer, whose last token should end it."""
        reference = reference if self.drafts else []
        ids = torch.tensor([prompt + reference], device=self.model.device)
        size = len(self.blocks)
        entered: list[Any] = [None] * size
        attended: list[Any] = [None] * size
        outputs: list[Any] = [None] * size
        attentions: list[Any] = [None] * size
        projected: list[Any] = [None] * size
        handles = []
        for i, block in enumerate(self.blocks):

            def before(module: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
                entered[i] = hidden_of(args, kwargs)

            def after(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
                outputs[i] = like(output, torch.empty(0))

            def scaled(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
                attended[i], projected[i] = args[0], output

            def attend(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
                same = torch.equal(first(output), projected[i])
                attentions[i] = like(output, torch.empty(0)) if same else None

            handles += [
                block.layer.register_forward_pre_hook(before, with_kwargs=True),
                block.layer.register_forward_hook(after),
                block.projection.register_forward_hook(scaled),
                block.attention.register_forward_hook(attend),
            ]
        cache = self.new_cache()
        with hooks(handles):
            logits = self.forward(ids, cache, len(reference) + 1)
        reading = Reading(ids, len(prompt), entered, attended, outputs, attentions, cache, Answer([], 0.0))
        reading.answer = self.finish(reading, copy.copy(cache), logits)[0]
        return reading

    def forward(self, ids: torch.Tensor, cache: DynamicCache, keep: int) -> torch.Tensor:
        """Logits of the last ``keep`` positions, shape (B, keep, V)."""
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[:, -keep:]

    @torch.inference_mode()
    def variants(self, reading: Reading, layer: int, scales: torch.Tensor) -> list[Answer]:
        """Answers of the model with one layer's attention output scaled otherwise.

        Args:
            reading: of the prompt.
            layer: which layer.
            scales: shape (N, C), one row per variant, on top of the model's own scales.
        """
        answers: list[Answer] = []
        for part in scales.to(self.model.device).split(self.batch):
            answers += self.together(reading, layer, part[:, None])
        return answers

    def together(self, reading: Reading, layer: int, scales: torch.Tensor) -> list[Answer]:
        """The same for variants that go through the model as one batch; scales of shape (B, 1, C)."""
        size, block = len(scales), self.blocks[layer]
        keep = reading.ids.shape[1] - reading.prompt + 1
        form = reading.attentions[layer]
        # Without attention above it, the last layer is needed at the answer's positions only.
        start = -keep if layer == len(self.blocks) - 1 and form is not None else 0
        spread = lambda tensor: tensor[:, start:].expand(size, -1, -1)  # noqa: E731
        replacements: dict[nn.Module, Callable[..., Any]] = {
            below.layer: lambda *args, i=i, **kwargs: like(reading.outputs[i], spread(reading.entered[layer]))
            for i, below in enumerate(self.blocks[:layer])
        }
        if form is not None:
            replacements[block.attention] = lambda *args, **kwargs: like(
                form, block.projection(spread(reading.attended[layer]))
            )
        handles = []
        if layer == 0 and start:

            def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
                if args:
                    return (spread(reading.entered[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": spread(reading.entered[0])}

            handles.append(block.layer.register_forward_pre_hook(cut, with_kwargs=True))
        if start:

            def whole(module: nn.Module, args: Any, output: Any) -> Any:
                # Some models rely on the number of positions; no logits are computed from these.
                missing = reading.ids.shape[1] - keep
                return like(output, nn.functional.pad(first(output), (0, 0, missing, 0)))

            handles.append(block.layer.register_forward_hook(whole))
        cache = self.new_cache()
        with probing(block.projection, scales), forwards(replacements), hooks(handles):
            logits = self.forward(reading.ids.expand(size, -1), cache, keep)
        for i in range(layer + 1):
            cache.layers[i] = copy.copy(reading.cache.layers[i])
            cache.layers[i].batch_repeat_interleave(size)
        return self.finish(reading, cache, logits, lambda rows: probing(block.projection, scales[rows]))

    def finish(
        self, reading: Reading, cache: DynamicCache, logits: torch.Tensor,
        scaled: Callable[[torch.Tensor], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
    ) -> list[Answer]:  # fmt: skip
        """Decode the answers of B variants whose prompt and reference were read.

        Args:
            reading: of the prompt.
            cache: keys and values of the B variants; its layers are replaced, none of their tensors is changed.
            logits: from the prompt's last token on, shape (B, 1 + tokens of the reference, V).
            scaled: scales the model within a ``with`` block as the variants at the given row indices are scaled.
        """
        reference = reading.ids[0, reading.prompt :].tolist()
        chosen = logits.argmax(-1)
        if reference:
            target = reading.ids[0, reading.prompt :].expand(len(logits), -1)
            logprobs = -nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), target, reduction="none"
            ).mean(1)
        else:
            logprobs = torch.full((len(logits),), torch.nan)
        agreed = [
            next((place for place, id_ in enumerate(reference) if row[place] != id_), len(reference))
            for row in chosen.tolist()
        ]
        whole = bool(reference) and reference[-1] in self.stop
        open_rows = [row for row, count in enumerate(agreed) if not (whole and count == len(reference))]
        answers = [(reference[:-1] if whole else reference)[: self.max_new_tokens] for _ in agreed]
        if open_rows:
            shared = min(agreed[row] for row in open_rows)
            rows = torch.tensor(open_rows, device=self.model.device)
            # A shallow copy keeps the reading's own cache as it is.
            cache.layers = [copy.copy(each) for each in cache.layers]
            if reference:
                cache.crop(shared - len(reference))
            cache.batch_select_indices(rows)
            with scaled(rows):
                decoded = self.decode(cache, chosen[rows, shared], self.max_new_tokens - shared)
            for row, ids in zip(open_rows, decoded, strict=True):
                answers[row] = reference[:shared] + ids
        return [Answer(ids, value) for ids, value in zip(answers, logprobs.tolist(), strict=True)]

    def decode(self, cache: DynamicCache, tokens: torch.Tensor, room: int) -> list[list[int]]:
        """Greedy continuations of what is in the cache, given each row's next token, shape (B,)."""
        answers: list[list[int]] = [[] for _ in tokens]
        open_rows = set(range(len(answers)))
        while True:
            for row in sorted(open_rows):
                token = int(tokens[row])
                if token in self.stop:
                    open_rows.discard(row)
                    continue
                answers[row].append(token)
                if len(answers[row]) == room:
                    open_rows.discard(row)
            if not open_rows:
                return answers
            tokens = self.forward(tokens[:, None], cache, 1)[:, -1].argmax(-1)
