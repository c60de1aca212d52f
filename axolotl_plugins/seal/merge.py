"""Folding scales into a model's weights, and proving that nothing else changed (paper section 4.3, Figure 3b)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .layer import SealLayer, scale_columns
from .load import Loaded, is_adapter, load

Into = Literal["auto", "o_proj", "v_proj"]
# In float32; logits of 30 carry rounding errors of 1e-4 themselves, hence the second, a share of the largest logit.
MAX_LOGIT_DIFFERENCE = 1e-4
MAX_LOGIT_SHARE = 1e-5


def value_rows(parent: nn.Module, num_heads: int, head_dim: int) -> tuple[str, torch.Tensor]:
    """Which output rows of an attention module's projections hold its values.

    Args:
        parent: the module that owns the attention output projection.
        num_heads: H, query heads.
        head_dim: D, channels of one head.

    Returns:
        Name of the projection inside ``parent``, and the indices of its value rows, int64 of shape (H * D,), in the
        order of the concatenated heads.

    Raises:
        ValueError: there are fewer value heads than query heads, or the layout is not known.
    """
    size = num_heads * head_dim
    for name in ("v_proj", "qkv_proj", "query_key_value", "c_attn"):
        projection = getattr(parent, name, None)
        if projection is None:
            continue
        rows = projection.nf if isinstance(projection, Conv1D) else projection.out_features
        expected = size if name == "v_proj" else 3 * size
        if rows != expected:
            raise ValueError(
                f"{name} has {rows} rows where {num_heads} value heads of {head_dim} would need {expected}: with "
                "grouped-query attention one value row serves several query heads that have different scales; "
                "merge into o_proj"
            )
        if name == "query_key_value":  # GPT-NeoX: for each head its query, key and value
            return name, torch.arange(3 * size).view(num_heads, 3, head_dim)[:, 2].flatten()
        return name, torch.arange(rows - size, rows)
    raise ValueError(f"{type(parent).__name__} has no value projection that is known: merge into o_proj")


def merged_tensors(model: nn.Module, into: Into) -> dict[str, torch.Tensor]:
    """The tensors that a merge changes, with their new values.

    Args:
        model: wrapped by SEAL, active adapters applied, not merged.
        into: ``o_proj`` scales the columns of attention output projections; ``v_proj`` the value rows and biases;
            ``auto`` takes ``v_proj`` where every value head serves one query head, else ``o_proj``, as the paper does.

    Returns:
        Name in the unwrapped model -> new tensor, in the dtype of the old one; products are formed in float32.

    Raises:
        ValueError: ``into`` does not fit the architecture.
    """
    if into == "auto":
        try:
            return merged_tensors(model, "v_proj")
        except ValueError:
            return merged_tensors(model, "o_proj")
    changed: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SealLayer) or (scale := layer.active_scale()) is None:
            continue
        scale = scale.detach()
        if into == "o_proj":
            changed[f"{name}.weight"] = scale_columns(layer.get_base_layer(), scale)
            continue
        parent_name = name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        child, rows = value_rows(parent, layer.num_heads, layer.in_features // layer.num_heads)
        projection = getattr(parent, child)
        factor = torch.ones(projection.nf if isinstance(projection, Conv1D) else projection.out_features)
        factor[rows] = scale.cpu()
        factor = factor.to(scale.device)
        for kind in ("weight", "bias"):
            tensor = getattr(projection, kind)
            if tensor is not None:
                by_row = factor if tensor.dim() == 1 or isinstance(projection, Conv1D) else factor[:, None]
                changed[f"{parent_name}.{child}.{kind}"] = (tensor.detach().float() * by_row).to(tensor.dtype)
    return changed


@torch.no_grad()
def last_logits(model: nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits at every position of each prompt, float32 of shape (T, vocabulary), on the CPU."""
    device = next(model.parameters()).device
    return [model(input_ids=ids[None].to(device)).logits[0].float().cpu() for ids in prompts]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Greatest absolute difference over all prompts, positions and tokens."""
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def write_older_rope_keys(folder: Path) -> None:
    """Add ``rope_theta`` and ``rope_scaling`` to a config.json: engines on Transformers 4 read only those."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def prompts_for(loaded: Loaded, longest: int = 512) -> list[torch.Tensor]:
    """Token ids of a few line retrieval prompts with their answers, int64 of shape (T,)."""
    from data_gen.generate import Request, generate

    request = Request("line", str(min(longest, loaded.window)), samples=2, split="test")
    return [
        loaded.tokenizer.apply_chat_template(sample["messages"], return_tensors="pt", return_dict=True)["input_ids"][0]
        for sample in generate(request, loaded.tokenizer)
    ]


def merge(
    adapter: str | Path, out: Path, into: Into = "auto", *, report: Callable[[str], object] = print
) -> dict[str, Any]:
    """Write a plain Hugging Face folder with a SEAL adapter's scales in its weights.

    The folder gets its name only after it was loaded again and proved: in float32 its logits on real prompts are those
    of the unmerged model, and no tensor differs from the base model's but those scaled. Nothing is left otherwise.

    Args:
        adapter: folder of a SEAL adapter.
        out: the folder to write; must not exist.
        into: see ``merged_tensors``.
        report: told what is being done.

    Returns:
        ``into`` (what ``auto`` chose), ``changed`` (number of tensors), ``difference`` (greatest change of any logit
        by the merge, in float32) and ``rounded_difference`` (the same after rounding to the base's dtype ``dtype``).

    Raises:
        ValueError: bad input, or the proof failed; the message is one line.
    """
    if not is_adapter(adapter):
        raise ValueError(f"{adapter}: not an adapter folder (it has no adapter_config.json)")
    if out.exists():
        raise ValueError(f"{out}: exists already: name another folder or remove it")
    loaded = load(adapter)
    if not loaded.method.startswith("SEAL"):
        raise ValueError(f"{adapter}: found a {loaded.method} adapter; use `axolotl merge-lora` for it")
    dtype = loaded.model.dtype
    if not all(parameter.is_floating_point() for parameter in loaded.model.parameters()):
        raise ValueError(f"{loaded.base}: is quantised: merge into the full-precision model it was made from")
    report(f"{loaded.method} on {loaded.base} ({str(dtype).removeprefix('torch.')})")
    prompts = prompts_for(loaded)
    # Wrapped names lose PEFT's prefix and the wrapper's level, and become those of the base model.
    exact = loaded.model.float()
    unmerged = last_logits(exact, prompts)
    changed = {name.removeprefix("base_model.model."): tensor for name, tensor in merged_tensors(exact, into).items()}
    plain: PreTrainedModel = exact.unload()
    parameters = dict(plain.named_parameters())
    for name, tensor in changed.items():
        parameters[name].data = tensor
    gap = difference(last_logits(plain, prompts), unmerged)
    largest = max(logits.abs().max().item() for logits in unmerged)
    allowed = max(MAX_LOGIT_DIFFERENCE, MAX_LOGIT_SHARE * largest)
    if not gap <= allowed:
        raise ValueError(f"merging would change logits by {gap:.1e} in float32, more than {allowed:.1e}")
    report(f"float32: the merge changes no logit (up to {largest:.0f} in size) by more than {gap:.1e}")
    plain.to(dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        plain.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        write_older_rope_keys(partial)
        saved = AutoModelForCausalLM.from_pretrained(partial, dtype=dtype).eval()
        base = AutoModelForCausalLM.from_pretrained(loaded.base, dtype=dtype)
        for (name, ours), theirs in zip(saved.named_parameters(), base.parameters(), strict=True):
            if not torch.equal(ours, changed[name].to(dtype) if name in changed else theirs):
                raise ValueError(f"{name} was not saved as it should be; nothing was written")
        del base
        rounded = difference(last_logits(saved.float(), prompts), unmerged)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    kinds = {name.split(".")[-2] for name in changed}
    report(f"{out}: {len(changed)} tensors changed ({', '.join(sorted(kinds))}), all others as they were")
    if dtype != torch.float32:
        report(f"rounded to {str(dtype).removeprefix('torch.')}, logits differ by up to {rounded:.1e}")
    return {
        "into": ", ".join(sorted(kinds)),
        "changed": len(changed),
        "difference": gap,
        "dtype": str(dtype).removeprefix("torch."),
        "rounded_difference": rounded,
    }
