"""Direct effects: what every head, every MLP and the embedding add to a token's logit (paper section 5.1, Figure 4)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from axolotl_plugins.common.tokenizer import Messages
from axolotl_plugins.seal.model_loading import LoadedModel
from axolotl_plugins.seal.tune import encode
from data_gen.dataset import Request, generate
from eval.generation import generate_answers, stop_ids
from eval.probe.head_importance import PROBE_SEED
from eval.probe.hooks import blocks, first, hidden_of, hooks
from eval.scoring import answer_budget


@dataclass(frozen=True)
class Components:
    """Everything that is summed up in the residual stream at one position.

    Attributes:
        embedding: what enters the first layer, shape (d,).
        heads: what each head adds through its columns of the projection, scales included, shape (layers, heads, d).
        biases: of the projections, shape (layers, d).
        mlps: what each layer adds besides its attention, shape (layers, d).
        final: the sum as the model has it, shape (d,).
        logits: the model's at that position, shape (V,).
    """

    embedding: torch.Tensor
    heads: torch.Tensor
    biases: torch.Tensor
    mlps: torch.Tensor
    final: torch.Tensor
    logits: torch.Tensor


@torch.inference_mode()
def components(model: Any, ids: torch.Tensor) -> Components:
    """Take the residual stream at the last position apart.

    Args:
        model: wrapped, see ``anatomy.wrapped``.
        ids: shape (1, T).

    Returns:
        The components, float32.

    Raises:
        ValueError: a layer adds something else than its attention and its MLP, such as a norm behind either.
    """
    found = blocks(model)
    size = len(found)
    entered: list[Any] = [None] * size
    left: list[Any] = [None] * size
    read: list[Any] = [None] * size
    attended: list[Any] = [None] * size
    parts: list[list[torch.Tensor]] = [[] for _ in range(size)]
    handles = []
    for i, block in enumerate(found):

        def before(module: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
            entered[i] = hidden_of(args, kwargs)[0, -1].float()

        def after(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
            left[i] = first(output)[0, -1].float()

        def projection(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
            read[i] = args[0][0, -1].float()

        def attention(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
            attended[i] = first(output)[0, -1].float()

        def part(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
            if isinstance(first(output), torch.Tensor):
                parts[i].append(first(output).reshape(-1, first(output).shape[-1])[-1].float())

        handles += [
            block.layer.register_forward_pre_hook(before, with_kwargs=True),
            block.layer.register_forward_hook(after),
            # What the projection itself reads: the probe and the adapters are in it.
            block.projection.get_base_layer().register_forward_hook(projection),
            block.attention.register_forward_hook(attention),
        ]
        handles += [
            child.register_forward_hook(part) for child in block.layer.children() if child is not block.attention
        ]
    with hooks(handles):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    heads, biases, mlps = [], [], []
    for i, block in enumerate(found):
        base = block.projection.get_base_layer()
        weight = base.weight.T if hasattr(base, "nf") else base.weight  # Conv1D keeps it the other way round
        by_head = weight.float().view(weight.shape[0], block.heads, -1)
        heads.append(torch.einsum("dhc,hc->hd", by_head, read[i].view(block.heads, -1)))
        biases.append(torch.zeros_like(entered[i]) if base.bias is None else base.bias.float())
        mlps.append(left[i] - entered[i] - attended[i])
        largest = left[i].abs().max()
        whole = (heads[-1].sum(0) + biases[-1] - attended[i]).abs().max() <= 1e-2 * largest
        if not whole or not any((one - mlps[-1]).abs().max() <= 1e-2 * largest for one in parts[i]):
            raise ValueError(
                f"layer {i} of {type(block.layer).__name__} adds something else than its attention and its MLP, "
                "so direct effects are not defined for this architecture"
            )
    return Components(entered[0], torch.stack(heads), torch.stack(biases), torch.stack(mlps), left[-1], logits)


def final_norm(model: Any) -> nn.Module:
    """The norm between the last layer and the unembedding.

    Raises:
        ValueError: there is no such module, or more than one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stack = getattr(base, base.base_model_prefix)
    found = [child for child in stack.children() if "norm" in type(child).__name__.lower()]
    if len(found) != 1:
        raise ValueError(f"cannot tell which module of {type(base).__name__} is its final norm: found {len(found)}")
    return found[0]


@torch.inference_mode()
def effects(model: Any, found: Components, tokens: list[int], *, normalised: bool) -> dict[str, Any]:
    """Direct effects on the logits of chosen tokens at the last position: ``W_unembed f(p)`` (equation 1).

    Args:
        model: wrapped, see ``anatomy.wrapped``.
        found: its components.
        tokens: N token ids.
        normalised: fold the final norm, at the scale it has on this prompt, into every component, so that their sum is
            the logit; otherwise leave it out, as the paper does.

    Returns:
        ``embedding`` (N), ``heads`` (N, layers, heads), ``mlps`` (N, layers), ``bias`` (N: of projections, norm and
        unembedding) and ``logits`` (N), as lists.

    Raises:
        ValueError: see ``final_norm``.
    """
    norm: Any = final_norm(model)
    unembed = model.get_output_embeddings()
    rows = unembed.weight[tokens].float()
    shift = torch.zeros_like(found.embedding)
    fold = lambda vector: vector  # noqa: E731
    if normalised:
        centred = isinstance(norm, nn.LayerNorm)
        shift = norm.bias.float() if centred and norm.bias is not None else shift
        middle = found.final - found.final.mean() if centred else found.final
        # Both kinds of norm multiply every channel by a factor that depends on the whole: read it off.
        factor = (norm(found.final.to(norm.weight.dtype)).float() - shift) / middle
        fold = lambda vector: (vector - vector.mean(-1, keepdim=True) if centred else vector) * factor  # noqa: E731
    bias = rows @ (fold(found.biases).sum(0) + shift)
    if getattr(unembed, "bias", None) is not None:
        bias = bias + unembed.bias[tokens].float()
    return {
        "embedding": (rows @ fold(found.embedding)).tolist(),
        "heads": torch.einsum("nd,lhd->nlh", rows, fold(found.heads)).tolist(),
        "mlps": (rows @ fold(found.mlps).T).tolist(),
        "bias": bias.tolist(),
        "logits": found.logits[tokens].tolist(),
    }


def first_difference(
    base: Any, tuned: Any, messages: Messages, tokenizer: Any, stop: Collection[int], budget: int
) -> tuple[torch.Tensor, int, int] | None:
    """Where two models' greedy answers part, if the tuned one's is right up to there and the base one's is not.

    Returns:
        The prompt with what both answer alike, shape (1, T); the tuned model's next token; the base model's. None if
        the base model is right, or the tuned one wrong.
    """
    ids, start = encode(messages, tokenizer)
    prompt, reference = ids[0, :start].tolist(), ids[0, start:].tolist()
    one, two = (generate_answers(model, [prompt], max_new_tokens=budget, stop=stop)[0] for model in (base, tuned))
    right = [id_ for id_ in reference if id_ not in stop]
    if two[: len(right)] != right or one[: len(right)] == right:
        return None
    place = next(i for i, id_ in enumerate(right) if i >= len(one) or one[i] != id_)
    if place >= len(one):
        return None
    return torch.tensor([prompt + right[:place]]), right[place], one[place]


def compare_models(models: list[LoadedModel], task: str, length: int, find: int, normalised: bool) -> dict[str, Any]:
    """Direct effects in a base model and its adapters on a prompt that the base gets wrong and all adapters right.

    Args:
        models: the base first; all wrapped, see ``anatomy.wrapped``.
        task: one of ``METRICS``.
        length: longest sample, in tokens.
        find: how many samples to search.
        normalised: see ``effects``.

    Returns:
        ``tokens`` (the right one and the base model's), ``candidates`` with each model's ``candidate_logits`` (the
        tokens that any model ranks among its five first), and per model the lists of ``effects``.

    Raises:
        ValueError: no such sample among those searched; or see ``components``,
            ``effects`` and ``LoadedModel.check_room``.
    """
    base, tokenizer = models[0], models[0].tokenizer
    stop, budget = stop_ids(base.model, tokenizer), answer_budget(task)
    for sample in generate(Request(task, str(length), samples=find, seed=PROBE_SEED), tokenizer):
        base.check_room(encode(sample["messages"], tokenizer)[1], budget)
        parted = [
            first_difference(base.model, each.model, sample["messages"], tokenizer, stop, budget) for each in models[1:]
        ]
        if all(parted):
            break
    else:
        raise ValueError(f"none of {find} samples of {length} tokens is wrong in the base model and right with every "
                         "adapter: search more with --find, or another --length")  # fmt: skip
    assert parted[0] is not None
    ids, right, mistaken = parted[0]
    found = [components(each.model, ids) for each in models]
    candidates = sorted({int(token) for one in found for token in one.logits.topk(5).indices})
    return {
        "kind": "direct", "model": base.name, "base_model": base.base, "task": task, "length": length,
        "sample": sample["index"], "normalised": normalised,
        "tokens": [tokenizer.decode([token]) for token in (right, mistaken)],
        "candidates": [tokenizer.decode([token]) for token in candidates],
        "models": [
            {"method": each.method, **effects(each.model, one, [right, mistaken], normalised=normalised),
             "candidate_logits": one.logits[candidates].tolist()}
            for each, one in zip(models, found, strict=True)
        ],
    }  # fmt: skip
