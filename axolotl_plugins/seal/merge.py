"""Merge scales into a model's weights, and verify that nothing else changes (paper section 4.3, Figure 3b)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import check_output, file_hash, load_json, written_whole

from . import provenance
from .layer import SealLayer, scale_columns
from .model_loading import RECORD, LoadedModel, check_name, is_adapter, load

Into = Literal["auto", "o_proj", "v_proj"]
# Tolerance of a merge. Where float32 rounds by more, float64 distinguishes rounding from a wrong merge.
MAX_LOGIT_DIFFERENCE = 1e-4
PROOF_WINDOW = 2048  # tokens; bounds the proof's prompts where the config states no window


def value_rows(parent: nn.Module, num_heads: int, head_dim: int) -> tuple[str, torch.Tensor]:
    """Find the output rows of an attention module's projections that compute its values.

    Args:
        parent: the module that contains the attention output projection.
        num_heads: H, query heads.
        head_dim: D, channels of one head.

    Returns:
        Name of the projection inside ``parent``, and the indices of its value rows, int64 of shape (H * D,), in the
        order of the concatenated heads.

    Raises:
        ValueError: there are fewer value heads than query heads, or the layout is unknown.
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
    raise ValueError(f"{type(parent).__name__} has no known value projection: merge into o_proj")


def merged_tensors(model: nn.Module, into: Into) -> dict[str, torch.Tensor]:
    """Compute the tensors that a merge changes.

    Args:
        model: wrapped by SEAL, with active adapters, not merged.
        into: ``o_proj`` scales the columns of attention output projections; ``v_proj`` the value rows and biases;
            ``auto`` takes ``v_proj`` without grouped-query attention, else ``o_proj``, as the paper does.

    Returns:
        Parameter name -> new tensor, in the dtype of the old one; products are computed in float32 or, if that is
        wider, in that dtype.

    Raises:
        ValueError: the architecture does not allow ``into``.
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
                changed[f"{parent_name}.{child}.{kind}"] = (tensor.detach() * by_row).to(tensor.dtype)
    return changed


@torch.no_grad()
def last_logits(model: nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Compute the logits at every position of each prompt, shape (T, V), on the CPU."""
    device = next(model.parameters()).device
    return [model(input_ids=ids[None].to(device)).logits[0].cpu() for ids in prompts]


def difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Return the maximum absolute difference over all prompts, positions and tokens."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def write_older_rope_keys(folder: Path) -> None:
    """Add ``rope_theta``, ``rope_scaling`` and LongRoPE's original window to config.json, for Transformers 4."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        if rope.get("rope_type") == "longrope":
            config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def prompts_for(loaded: LoadedModel) -> list[torch.Tensor]:
    """Return token ids of two line retrieval prompts with answers, int64 of shape (T,): 16 lines, or what fits.

    Raises:
        ValueError: the model's context window is too short for one line.
    """
    from data_gen.dataset import Request, generate

    for lines in (16, 8, 4, 2, 1):
        samples = generate(Request("line", lines=lines, samples=2, split="test"), loaded.tokenizer)
        prompts = [
            loaded.tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=True)["input_ids"][0]
            for row in samples
        ]
        if max(map(len, prompts)) <= loaded.window:
            return prompts
    raise ValueError(f"{loaded.base}: its window of {loaded.window} tokens is too short for a prompt to verify a merge")


def load_adapter(adapter: Path) -> LoadedModel:
    """Load a SEAL adapter and its base model, which must not be quantised.

    Raises:
        ValueError: the folder is not a SEAL adapter, or its base model is quantised.
    """
    check_name(str(adapter))
    if (adapter / RECORD).is_file():
        raise ValueError(f"{adapter}: is a merged model, expected an adapter folder")
    if not is_adapter(adapter):
        raise ValueError(f"{adapter}: not an adapter folder (it has no adapter_config.json)")
    loaded = load(adapter, default_window=PROOF_WINDOW)
    if not loaded.method.startswith("SEAL"):
        raise ValueError(f"{adapter}: found a {loaded.method} adapter; use `axolotl merge-lora` for it")
    if not all(parameter.is_floating_point() for parameter in loaded.model.parameters()):
        raise ValueError(f"{loaded.base}: is quantised: merge into the full-precision model that it was quantised from")
    return loaded


@dataclass(frozen=True)
class MergeResult:
    """A merge in memory, verified in float32.

    Attributes:
        plain: the merged model, float32.
        changed: parameter name -> tensor that the merge changed, float32.
        dtype: dtype of the base model's weights.
        prompts: prompts on which logits were compared, see ``prompts_for``.
        unmerged: logits of the model with its adapter, see ``last_logits``.
        difference: maximum change of any logit.
    """

    plain: PreTrainedModel
    changed: dict[str, torch.Tensor]
    dtype: torch.dtype
    prompts: list[torch.Tensor]
    unmerged: list[torch.Tensor]
    difference: float


def fold(loaded: LoadedModel, into: Into) -> MergeResult:
    """Merge in memory, and compare the logits on line retrieval prompts.

    Args:
        loaded: see ``load_adapter``; unusable afterwards.
        into: see ``merged_tensors``.

    Raises:
        ValueError: the architecture does not allow ``into``, or a logit changes by more than ``MAX_LOGIT_DIFFERENCE``
            in float32 and, to rule out rounding, in float64.
    """
    dtype, prompts = loaded.model.dtype, prompts_for(loaded)
    merged = fold_in(torch.float32, loaded, into, dtype, prompts)
    if not merged.difference <= MAX_LOGIT_DIFFERENCE:
        exact = fold_in(torch.float64, load_adapter(Path(loaded.name)), into, dtype, prompts).difference
        if not exact <= MAX_LOGIT_DIFFERENCE:
            raise ValueError(f"merging would change logits by {merged.difference:.1e} in float32 and {exact:.1e} in "
                             f"float64, more than {MAX_LOGIT_DIFFERENCE:.0e}")  # fmt: skip
    return merged


def fold_in(
    dtype: torch.dtype, loaded: LoadedModel, into: Into, base_dtype: torch.dtype, prompts: list[torch.Tensor]
) -> MergeResult:
    """Merge in memory with weights cast to ``dtype``, without a check of the logits; see ``fold``."""
    # Without PEFT's prefix the names are those of the base model.
    exact = loaded.model.to(dtype)
    unmerged = last_logits(exact, prompts)
    changed = {name.removeprefix("base_model.model."): tensor for name, tensor in merged_tensors(exact, into).items()}
    plain: PreTrainedModel = exact.unload()
    parameters = dict(plain.named_parameters())
    for name, tensor in changed.items():
        parameters[name].data = tensor
    return MergeResult(plain, changed, base_dtype, prompts, unmerged, difference(last_logits(plain, prompts), unmerged))


def check_saved(folder: Path, base: str, merged: MergeResult) -> float:
    """Load a merged folder and compare every tensor with the base model and the merge in memory.

    Returns:
        Maximum difference of its logits from the unmerged model's, due to rounding to the base's dtype.

    Raises:
        ValueError: a tensor differs; the message names it.
    """
    saved_model = AutoModelForCausalLM.from_pretrained(folder, dtype=merged.dtype, use_safetensors=True).eval()
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=merged.dtype, use_safetensors=True)
    for (name, saved), original in zip(saved_model.named_parameters(), base_model.parameters(), strict=True):
        if not torch.equal(saved, merged.changed[name].to(merged.dtype) if name in merged.changed else original):
            raise ValueError(f"{folder}: {name} differs from a merge into {base}: merge again")
    del base_model
    return difference(last_logits(saved_model.float(), merged.prompts), merged.unmerged)


def weight_hashes(name: str | Path) -> dict[str, str]:
    """Return the SHA-256 of the safetensors files of a model folder, or of a downloaded hub id."""
    from huggingface_hub import snapshot_download

    weights = "*.safetensors"
    if not Path(name).is_dir():
        name = snapshot_download(str(name), allow_patterns=weights, local_files_only=True)
    return {file.name: file_hash(file) for file in sorted(Path(name).glob(weights))}


def merge(
    adapter: str | Path, out: Path, into: Into = "auto", *, report: Callable[[str], object] = print
) -> dict[str, Any]:
    """Write a plain Hugging Face folder with a SEAL adapter's scales in its weights.

    The folder is renamed to ``out`` after it was loaded again and verified: in float32 its logits on line retrieval
    prompts are those of the unmerged model, and only scaled tensors differ from the base model's. Otherwise nothing is
    left. The folder records the merge in ``RECORD``, so that ``verify`` can repeat the check.

    Args:
        adapter: folder of a SEAL adapter.
        out: folder to write; must not exist.
        into: see ``merged_tensors``.
        report: called with lines that report progress.

    Returns:
        ``adapter`` and ``base`` (names), ``method``, ``into`` (the argument), ``changed`` (parameter names), ``dtype``,
        ``difference`` (maximum change of any logit by the merge, in float32), ``rounded_difference`` (the same after
        rounding to ``dtype``), and ``adapter_files``, ``base_files`` and ``files`` (file name -> SHA-256; the last are
        the merged folder's).

    Raises:
        ValueError: invalid input, or verification failed; the message is one line.
    """
    check_output(out, folder=True)
    adapter = Path(adapter)
    loaded = load_adapter(adapter)
    report(f"{loaded.method} on {loaded.base} ({str(loaded.model.dtype).removeprefix('torch.')})")
    merged = fold(loaded, into)
    report(f"float32: the merge changes no logit by more than {merged.difference:.1e}")
    merged.plain.to(merged.dtype)
    with written_whole(out) as partial:
        merged.plain.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        write_older_rope_keys(partial)
        provenance.copy(adapter, partial)
        rounded = check_saved(partial, loaded.base, merged)
        record = {
            "adapter": str(adapter),
            "base": loaded.base,
            "method": loaded.method,
            "into": into,
            "changed": sorted(merged.changed),
            "dtype": str(merged.dtype).removeprefix("torch."),
            "difference": merged.difference,
            "rounded_difference": rounded,
            "adapter_files": weight_hashes(adapter),
            "base_files": weight_hashes(loaded.base),
            "files": {file.name: file_hash(file) for file in sorted(partial.iterdir())},
        }
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    modules = {name.split(".")[-2] for name in merged.changed}
    report(f"{out}: {len(merged.changed)} tensors changed ({', '.join(sorted(modules))}), all others unchanged")
    if merged.dtype != torch.float32:
        report(f"rounded to {record['dtype']}, logits differ by up to {rounded:.1e}")
    return record


def verify(folder: Path, adapter: Path | None = None, *, report: Callable[[str], object] = print) -> None:
    """Verify a merged folder against its record, adapter and base model.

    Args:
        folder: folder that ``merge`` wrote.
        adapter: new path of the adapter; None reads it from the record.
        report: called with the result.

    Raises:
        ValueError: the folder, the adapter or the base model changed, or the logits differ; the message is one line.
    """
    try:
        record = load_json(folder / RECORD)
        adapter, base, into = Path(adapter or record["adapter"]), record["base"], record["into"]
        files, changed = record["files"], record["changed"]
        sources = {adapter: record["adapter_files"], base: record["base_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: has no valid {RECORD} as `merge` writes it ({first_line(error)})") from None
    current = {file.name: file_hash(file) for file in folder.iterdir() if file.is_file() and file.name != RECORD}
    if different := sorted(name for name in current.keys() | files.keys() if current.get(name) != files.get(name)):
        raise ValueError(f"{folder / different[0]}: differs from the file that was written: merge again")
    for name, hashes in sources.items():
        if weight_hashes(name) != hashes:
            raise ValueError(f"{name}: its weights are missing or changed since the merge: restore them, or give the "
                             "adapter's path by --adapter")  # fmt: skip
    merged = fold(load_adapter(adapter), into)
    if sorted(merged.changed) != changed:
        raise ValueError(f"{folder}: merging changes other tensors than its {RECORD} lists: merge again")
    rounded = check_saved(folder, base, merged)
    report(
        f"{folder}: {len(files)} files, the adapter and the base model unchanged; {len(changed)} tensors merged, all "
        f"others equal the base model's; logits differ by {merged.difference:.1e} in float32, by {rounded:.1e} as saved"
    )
