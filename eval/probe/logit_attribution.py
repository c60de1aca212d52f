"""Direct logit attribution: what heads, MLPs and the embedding add to a token's logit (section 5.1, Figure 4)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from axolotl_plugins.seal.model_loading import LoadedModel
from data_gen.dataset import samples_by_length
from data_gen.tasks import Task
from eval.generation import generate_answers, stop_ids
from eval.probe.head_importance import PROBE_SEED
from eval.probe.hooks import Block, decoder_blocks, hidden_states, on_input, removing
from eval.score_samples import prompt_and_answer
from eval.spec import scored_task

TOLERANCE = 1e-2  # of a layer's sum, relative to its largest entry


@dataclass(frozen=True)
class Components:
    """All terms of the residual stream at one position, float32.

    Attributes:
        embedding: input of the first layer, shape (d,).
        heads: term of each head through its columns of the projection, scales included, shape (layers, heads, d).
        biases: of the projections, shape (layers, d).
        mlps: terms of each layer besides its attention, shape (layers, d).
        final: the model's own sum, shape (d,).
        logits: the model's at that position, shape (V,).
    """

    embedding: torch.Tensor
    heads: torch.Tensor
    biases: torch.Tensor
    mlps: torch.Tensor
    final: torch.Tensor
    logits: torch.Tensor


@dataclass
class LayerRecord:
    """Activations of one layer at the last position, float32.

    Attributes:
        before: hidden states before the layer, shape (d,).
        after: hidden states behind it, shape (d,).
        projection_input: scales included, shape (C,).
        attention: output of the attention, shape (d,).
        others: outputs of the layer's other modules.
    """

    before: torch.Tensor
    after: torch.Tensor
    projection_input: torch.Tensor
    attention: torch.Tensor
    others: list[torch.Tensor]


@torch.inference_mode()
def decompose(model: Any, ids: torch.Tensor) -> Components:
    """Decompose the residual stream at the last position.

    Args:
        model: see ``hooks.wrap``.
        ids: shape (1, T).

    Raises:
        ValueError: a layer adds another term than its attention and its MLP, such as a norm behind either.
    """
    blocks = decoder_blocks(model)
    empty = torch.empty(0)
    records = [LayerRecord(empty, empty, empty, empty, []) for _ in blocks]
    handles = [handle for pair in zip(blocks, records, strict=True) for handle in record(*pair)]
    with removing(handles):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    terms = [layer_terms(i, *pair) for i, pair in enumerate(zip(blocks, records, strict=True))]
    heads, biases, mlps = (torch.stack(column) for column in zip(*terms, strict=True))
    return Components(records[0].before, heads, biases, mlps, records[-1].after, logits)


def record(block: Block, layer: LayerRecord) -> list[Any]:
    """Register hooks that fill a layer's record; return their handles."""

    def last(states: torch.Tensor) -> torch.Tensor:
        return states.reshape(-1, states.shape[-1])[-1].float()

    def after_other(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(states := hidden_states(output), torch.Tensor):
            layer.others.append(last(states))

    def store(module: nn.Module, field: str) -> Any:
        return module.register_forward_hook(lambda _, __, output: setattr(layer, field, last(hidden_states(output))))

    return [
        on_input(block.layer, lambda states: setattr(layer, "before", last(states))),
        store(block.layer, "after"),
        # The base layer's input includes the scales.
        on_input(block.projection.get_base_layer(), lambda states: setattr(layer, "projection_input", last(states))),
        store(block.attention, "attention"),
        *(child.register_forward_hook(after_other) for child in block.layer.children() if child is not block.attention),
    ]


def layer_terms(index: int, block: Block, layer: LayerRecord) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a layer's terms: heads of shape (heads, d), bias (d,) and MLP (d,).

    Raises:
        ValueError: they are not all that the layer adds.
    """
    base = block.projection.get_base_layer()
    weight = base.weight.T if hasattr(base, "nf") else base.weight  # Conv1D stores the transpose
    by_head = weight.float().view(weight.shape[0], block.heads, -1)
    heads = torch.einsum("dhc,hc->hd", by_head, layer.projection_input.view(block.heads, -1))
    bias = torch.zeros_like(layer.before) if base.bias is None else base.bias.float()
    mlp = layer.after - layer.before - layer.attention
    bound = TOLERANCE * layer.after.abs().max()
    complete = (heads.sum(0) + bias - layer.attention).abs().max() <= bound
    if not complete or not any((output - mlp).abs().max() <= bound for output in layer.others):
        raise ValueError(
            f"layer {index} of {type(block.layer).__name__} adds something else than its attention and its MLP, "
            "so direct effects are not defined for this architecture"
        )
    return heads, bias, mlp


def final_norm(model: Any) -> nn.Module:
    """Return the norm between the last layer and the unembedding.

    Raises:
        ValueError: there is no such module, or more than one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stack = getattr(base, base.base_model_prefix)
    norms = [child for child in stack.children() if "norm" in type(child).__name__.lower()]
    if len(norms) != 1:
        raise ValueError(f"cannot tell which module of {type(base).__name__} is its final norm: found {len(norms)}")
    return norms[0]


@torch.inference_mode()
def effects(model: Any, components: Components, tokens: list[int], *, normalised: bool) -> dict[str, Any]:
    """Compute direct effects on the logits of tokens at the last position: ``W_unembed f(p)`` (equation 1).

    Args:
        model: see ``hooks.wrap``.
        components: see ``decompose``.
        tokens: N token ids.
        normalised: apply the final norm, with its factor on this prompt, to every component, so that their sum is the
            logit; otherwise omit it, as the paper does.

    Returns:
        ``embedding`` (N), ``heads`` (N, layers, heads), ``mlps`` (N, layers), ``bias`` (N: of projections, norm and
        unembedding) and ``logits`` (N), as lists.

    Raises:
        ValueError: see ``final_norm``.
    """
    norm: Any = final_norm(model)
    unembed = model.get_output_embeddings()
    rows = unembed.weight[tokens].float()
    shift = torch.zeros_like(components.embedding)
    fold = lambda vector: vector  # noqa: E731
    if normalised:
        centred = isinstance(norm, nn.LayerNorm)
        shift = norm.bias.float() if centred and norm.bias is not None else shift
        middle = components.final - components.final.mean() if centred else components.final
        # Both kinds of norm multiply every channel by a factor that depends on all of them: divide to get it.
        factor = (norm(components.final.to(norm.weight.dtype)).float() - shift) / middle
        fold = lambda vector: (vector - vector.mean(-1, keepdim=True) if centred else vector) * factor  # noqa: E731
    bias = rows @ (fold(components.biases).sum(0) + shift)
    if getattr(unembed, "bias", None) is not None:
        bias = bias + unembed.bias[tokens].float()
    return {
        "embedding": (rows @ fold(components.embedding)).tolist(),
        "heads": torch.einsum("nd,lhd->nlh", rows, fold(components.heads)).tolist(),
        "mlps": (rows @ fold(components.mlps).T).tolist(),
        "bias": bias.tolist(),
        "logits": components.logits[tokens].tolist(),
    }


def first_difference(
    base: Any, tuned: Any, prompt: list[int], reference: list[int], stop: Collection[int], budget: int
) -> tuple[torch.Tensor, int, int] | None:
    """Find where two models' greedy answers diverge, if the tuned one's is right and the base one's is not.

    Returns:
        The prompt with the common prefix of both answers, shape (1, T); the tuned model's next token; the base
        model's. None if the base model is right, or the tuned one wrong.
    """
    base_answer, tuned_answer = (
        generate_answers(model, [prompt], max_new_tokens=budget, stop=stop)[0] for model in (base, tuned)
    )
    right = [id_ for id_ in reference if id_ not in stop]
    if tuned_answer[: len(right)] != right or base_answer[: len(right)] == right:
        return None
    position = next(i for i, id_ in enumerate(right) if i >= len(base_answer) or base_answer[i] != id_)
    if position >= len(base_answer):
        return None
    return torch.tensor([prompt + right[:position]]), right[position], base_answer[position]


def compare_models(
    models: list[LoadedModel], task: str | Task, length: int | None, find: int, normalised: bool
) -> dict[str, Any]:
    """Compute direct effects in a base model and its adapters on a prompt that only the base gets wrong.

    Args:
        models: the base first; see ``hooks.wrap``.
        task: see ``scored_task``.
        length: of the samples, see ``samples_by_length``.
        find: how many samples of each length to search.
        normalised: see ``effects``.

    Returns:
        ``tokens`` (the right one and the base model's), ``candidates`` with each model's ``candidate_logits`` (the
        tokens among any model's top five), and per model the lists of ``effects``.

    Raises:
        ValueError: no such sample among those searched; or see ``decompose``, ``effects`` and
            ``LoadedModel.check_room``.
    """
    base, tokenizer = models[0], models[0].tokenizer
    task, stop = scored_task(task), stop_ids(base.model, tokenizer)
    budget, lengths = task.answer_budget, None if length is None else [length]
    for sample in samples_by_length(task, tokenizer, lengths, find, seed=PROBE_SEED):
        prompt, reference = prompt_and_answer(tokenizer, sample)
        base.check_room(len(prompt), budget)
        differences = [
            first_difference(base.model, tuned.model, prompt, reference, stop, budget) for tuned in models[1:]
        ]
        if all(differences):
            break
    else:
        raise ValueError(f"none of {find} samples of a length is wrong in the base model and right with every adapter: "
                         "search more with --find, or another --length")  # fmt: skip
    assert differences[0] is not None
    ids, right, mistaken = differences[0]
    decompositions = [decompose(loaded.model, ids) for loaded in models]
    candidates = sorted({int(token) for terms in decompositions for token in terms.logits.topk(5).indices})
    return {
        "kind": "direct", "model": base.name, "base_model": base.base, "task": task.name, "title": task.title,
        "length": sample["length"], "sample": sample["index"], "normalised": normalised,
        "tokens": [tokenizer.decode([token]) for token in (right, mistaken)],
        "candidates": [tokenizer.decode([token]) for token in candidates],
        "models": [
            {"method": loaded.method, **effects(loaded.model, terms, [right, mistaken], normalised=normalised),
             "candidate_logits": terms.logits[candidates].tolist()}
            for loaded, terms in zip(models, decompositions, strict=True)
        ],
    }  # fmt: skip
