"""Greedy decoding of many prompts: each prompt is prefilled alone, then many are decoded together.

A prompt that is prefilled alone needs no mask, so attention takes its causal kernel, and a prefix that it shares with
the prompt before it is prefilled once. The key-value caches of a group are then left-padded to one length and decoded
as a batch. Architectures whose caches cannot be joined (sliding windows, recurrent states) answer one by one.

Shapes: B prompts, H key-value heads, T tokens, D head dimension.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
from peft import PeftModel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts are ordered by prefix rather than by length if that saves at least this share of all tokens.
MIN_PREFIX_SAVING = 1.2
MIN_REUSED_SHARE = 0.1  # of a prompt that must be in the cache to be reused; 4 % cost 8 % of a prefill on a CPU
MAX_BATCH = 32  # decoded together unless told otherwise; a killed run loses the prefill of one batch at most
CACHE_SHARE = 0.4  # of the free memory that the caches of a batch may take
GROUPED = "seal_grouped_sdpa"  # name of ``grouped_attention`` among Transformers' attention functions


def stop_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token id that ends an answer.

    They are the end-of-sequence ids of the tokenizer, of the model's config and of its generation config, and the
    token with which the chat template ends an assistant turn: checkpoints exist in which any of them is missing.
    """
    ids: set[int | None] = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    for config in (model.config.get_text_config(), model.generation_config):
        ends = getattr(config, "eos_token_id", None)
        ids.update(ends if isinstance(ends, list | tuple) else [ends])
    return frozenset(token for token in ids if token is not None)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that a rendered chat has right after an assistant turn, or None if no single token ends it."""
    if not tokenizer.chat_template:
        return None
    answer = "the answer 7391"  # a text that no template holds itself
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    _, written, rest = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(answer)
    ending = rest.strip() if written else ""
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
    if not ids:
        return None
    # A template may end turns with plain words ("### User:"), whose first token also occurs inside answers.
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return ids[0] if ids[0] in special or len(ids) == 1 else None


def can_join_caches(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether all layers keep all keys and positions can be given, so that caches can be cropped and joined."""
    model = base_model(model)
    layers = DynamicCache(config=model.config).layers
    keeps_all = all(type(layer) is DynamicLayer for layer in layers)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    # Without layer types in its config, a model may apply its sliding window in the mask alone.
    typed = getattr(model.config.get_text_config(), "layer_types", None)
    arguments = inspect.signature(model.forward).parameters
    return keeps_all and (bool(typed) or not window) and {"position_ids", "past_key_values"} <= arguments.keys()


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the Transformers model, adapters applied, inside a PEFT model."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix of two token sequences."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def reused_prefix(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many tokens of a prompt are taken from the cache of the one before.

    Short prefixes are computed again: behind a prefix attention needs a mask, which costs more than they do. So is the
    last token even where all are shared, for its logits are needed.
    """
    shared = min(common_prefix(cached, prompt), len(prompt) - 1)
    return shared if shared >= MIN_REUSED_SHARE * len(prompt) else 0


def uncached_tokens(prompts: list[list[int]]) -> int:
    """Return how many tokens of all prompts are prefilled if shared prefixes are prefilled once."""
    total = 0
    previous: list[int] = []
    for prompt in sorted(prompts):
        total += len(prompt) - reused_prefix(previous, prompt)
        previous = prompt
    return total


def prefix_saving(prompts: list[list[int]]) -> float:
    """Return the ratio of all tokens to those that are prefilled if shared prefixes are prefilled once."""
    return sum(map(len, prompts)) / max(1, uncached_tokens(prompts))


def decoding_order(prompts: list[list[int]]) -> list[int]:
    """Order prompts for decoding: by prefix where prefixes are worth sharing, else by length, longest first."""
    indices = range(len(prompts))
    if prefix_saving(prompts) >= MIN_PREFIX_SAVING:
        return sorted(indices, key=prompts.__getitem__)
    return sorted(indices, key=lambda index: (-len(prompts[index]), prompts[index]))


class BatchedLayer(DynamicLayer):
    """Keys and values of a batch, left-padded to one length, with preallocated room for the answers.

    Args:
        layer: of the first prompt, whose shapes and dtype are taken; its keys have shape (1, H, T, D).
        batch: B.
        length: T of the longest prompt.
        capacity: T with room for the answers.
    """

    def __init__(self, layer: DynamicLayer, batch: int, length: int, capacity: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.buffers = [
            tensor.new_zeros(batch, tensor.shape[1], capacity, tensor.shape[3]) for tensor in (layer.keys, layer.values)
        ]
        self.resize(length)

    def resize(self, length: int) -> None:
        """Let keys and values be the first ``length`` positions of their buffers."""
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def insert(self, row: int, layer: DynamicLayer) -> None:
        """Copy one prompt's keys and values to the right end of a row."""
        for own, tensor in ((self.keys, layer.keys), (self.values, layer.values)):
            own[row, :, own.shape[2] - tensor.shape[2] :] = tensor[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values in place; shapes (B, H, 1, D)."""
        start = self.keys.shape[2]
        self.resize(start + key_states.shape[2])
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows."""
        length = self.keys.shape[2]
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.resize(length)


def batch_limit(cache: Cache, tokens: int, capacity: int) -> int:
    """Return how many prompts fit into memory together, from 1 to ``MAX_BATCH``.

    They are estimated from the cache of one prompt of so many tokens; ``capacity`` is T of the longest and its answer.
    """
    keys = cache.layers[0].keys
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / tokens
    free = torch.cuda.mem_get_info(keys.device)[0] if keys.is_cuda else psutil.virtual_memory().available
    return max(1, min(MAX_BATCH, int(CACHE_SHARE * free / (per_token * capacity))))


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel | PeftModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int],
    ends: Callable[[list[int]], bool] = lambda ids: False,
    batch_size: int | None = None,
    on_answer: Callable[[int, list[int]], object] = lambda index, ids: None,
) -> list[list[int]]:
    """Decode prompts greedily, whatever the model's generation config says of sampling and penalties.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, each of at least one token.
        max_new_tokens: longest answer.
        stop: ids that end an answer and are not part of it, see ``stop_ids``.
        ends: whether an answer, given by its ids, ends here; its last token is part of it.
        batch_size: prompts decoded together; None takes what memory allows, ``MAX_BATCH`` at most.
        on_answer: called with a prompt's index and its answer, batch by batch.

    Returns:
        Token ids of the answers, in the order of the prompts.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not can_join_caches(model):
        for index, prompt in enumerate(prompts):
            answers[index] = generate_one(model, prompt, max_new_tokens, stop, ends)
            on_answer(index, answers[index])
        return answers
    order = decoding_order(prompts)
    cache = DynamicCache(config=base_model(model).config)
    cached: list[int] = []
    while order:
        longest = max(len(prompts[index]) for index in order[: batch_size or MAX_BATCH])
        first = prefill(model, cache, cached, prompts[order[0]])
        cached = prompts[order[0]]
        size = min(len(order), batch_size or batch_limit(cache, len(cached), longest + max_new_tokens))
        group, order = order[:size], order[size:]
        length = max(len(prompts[index]) for index in group)
        layers = [BatchedLayer(layer, size, length, length + max_new_tokens) for layer in cache.layers]
        tokens = []
        for row, index in enumerate(group):
            tokens.append(first if row == 0 else prefill(model, cache, cached, prompts[index]))
            cached = prompts[index]
            for batched, layer in zip(layers, cache.layers, strict=True):
                batched.insert(row, layer)
        lengths = [len(prompts[index]) for index in group]
        with decoding_attention(base_model(model)):
            decoded = decode(model, Cache(layers=layers), lengths, tokens, max_new_tokens, stop, ends)
        for index, answer in zip(group, decoded, strict=True):
            answers[index] = answer
            on_answer(index, answer)
    return answers


def grouped_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend with one query token per row, without a copy of keys and values for every query head that shares them.

    Where there is a mask, Transformers' own function makes these copies of the whole cache for every token; it is
    called where there are several query tokens or a position bias.

    Args:
        module: the attention module.
        query: shape (B, query heads, 1, D).
        key: shape (B, H, T, D); a group of query heads shares each of the H heads.
        value: shape (B, H, T, D).
        attention_mask: which keys count, shape (B, 1, 1, T); None for all.
        scaling: of scores.
        kwargs: of Transformers' own function.
    """
    batch, heads, tokens, size = query.shape
    if tokens > 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.view(batch, key.shape[1], -1, size), key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch, 1, heads, -1), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextlib.contextmanager
def decoding_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model decode with ``grouped_attention`` if its attention is ``sdpa``."""
    own = model.config._attn_implementation
    if own != "sdpa":
        yield
        return
    model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def prefill(model: PreTrainedModel | PeftModel, cache: Cache, cached: list[int], prompt: list[int]) -> int:
    """Bring a cache from one prompt (or none) to another, computing what they do not share; return the next token."""
    shared = reused_prefix(cached, prompt)
    cache.crop(shared - len(cached))
    ids = torch.tensor([prompt[shared:]], device=model.device)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


def decode(
    model: PreTrainedModel | PeftModel, cache: Cache, lengths: list[int], tokens: list[int], max_new_tokens: int,
    stop: Collection[int], ends: Callable[[list[int]], bool],
) -> list[list[int]]:  # fmt: skip
    """Decode a batch as ``generate_answers`` does, from its joined cache of ``BatchedLayer``.

    B prompts have these lengths, and their answers begin with these tokens.
    """
    answers: list[list[int]] = [[] for _ in lengths]
    ended = [False] * len(lengths)
    rows = list(range(len(lengths)))  # of the cache -> of the answers
    device, width = model.device, max(lengths)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths], device=device)
    positions = torch.tensor(lengths, device=device)[:, None]
    while True:
        for row, token in zip(rows, tokens, strict=True):
            if not ended[row] and token not in stop:
                answers[row].append(token)
            ended[row] = ended[row] or token in stop or len(answers[row]) == max_new_tokens or ends(answers[row])
        active = [place for place, row in enumerate(rows) if not ended[row]]
        if not active:
            return answers
        if len(active) <= len(rows) // 2:  # fewer copies than dropping every row as it ends
            kept = torch.tensor(active)  # on the CPU: layers of a cache may be on several devices
            cache.batch_select_indices(kept)
            mask, positions = mask[kept], positions[kept]
            rows, tokens = [rows[place] for place in active], [tokens[place] for place in active]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = model(
            input_ids=torch.tensor(tokens, device=device)[:, None], attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        positions = positions + 1
        tokens = logits[:, -1].argmax(-1).tolist()


@contextlib.contextmanager
def default_generation(model: PreTrainedModel) -> Iterator[None]:
    """Replace a model's generation config by the library's defaults, which `generate` falls back to key by key."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def generate_one(
    model: PreTrainedModel | PeftModel, prompt: list[int], max_new_tokens: int, stop: Collection[int],
    ends: Callable[[list[int]], bool],
) -> list[int]:  # fmt: skip
    """Decode one prompt greedily with the model's own cache; see ``generate_answers``."""

    class Ends(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([ends(input_ids[0, len(prompt) :].tolist())], device=input_ids.device)

    model = base_model(model)
    ids = torch.tensor([prompt], device=model.device)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop) or None, pad_token_id=0
    )
    with default_generation(model):
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, stopping_criteria=[Ends()]
        )
    answer = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stop else answer
