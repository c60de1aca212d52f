"""Folding scales into a model's weights, and proving that nothing else changed (paper section 4.3, Figure 3b)."""

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
# Of any logit by a merge. Where float32 itself rounds by more, float64 tells rounding from a wrong merge.
MAX_LOGIT_DIFFERENCE = 1e-4


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
        Name in the unwrapped model -> new tensor, in the dtype of the old one; products are formed in float32 or, if
        that is wider, in that dtype.

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
                changed[f"{parent_name}.{child}.{kind}"] = (tensor.detach() * by_row).to(tensor.dtype)
    return changed


@torch.no_grad()
def last_logits(model: nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits at every position of each prompt, of shape (T, vocabulary), on the CPU."""
    device = next(model.parameters()).device
    return [model(input_ids=ids[None].to(device)).logits[0].cpu() for ids in prompts]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Greatest absolute difference over all prompts, positions and tokens."""
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def write_older_rope_keys(folder: Path) -> None:
    """Add ``rope_theta``, ``rope_scaling`` and LongRoPE's boundary to a config.json, for engines on Transformers 4."""
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
    """Token ids of two line retrieval prompts with their answers, int64 of shape (T,): 16 lines, or what fits.

    Raises:
        ValueError: the model's window is too short for one line.
    """
    from data_gen.dataset import Request, generate

    for lines in (16, 8, 4, 2, 1):
        samples = generate(Request("line", lines=lines, samples=2, split="test"), loaded.tokenizer)
        found = [
            loaded.tokenizer.apply_chat_template(one["messages"], return_tensors="pt", return_dict=True)["input_ids"][0]
            for one in samples
        ]
        if max(map(len, found)) <= loaded.window:
            return found
    raise ValueError(f"{loaded.base}: its window of {loaded.window} tokens is too short to prove a merge on a record")


def load_adapter(adapter: Path) -> LoadedModel:
    """A SEAL adapter on its base model, which must not be quantised.

    Raises:
        ValueError: it is none, or its base is quantised.
    """
    check_name(str(adapter))
    if (adapter / RECORD).is_file():
        raise ValueError(f"{adapter}: is a merged model already, not an adapter")
    if not is_adapter(adapter):
        raise ValueError(f"{adapter}: not an adapter folder (it has no adapter_config.json)")
    loaded = load(adapter)
    if not loaded.method.startswith("SEAL"):
        raise ValueError(f"{adapter}: found a {loaded.method} adapter; use `axolotl merge-lora` for it")
    if not all(parameter.is_floating_point() for parameter in loaded.model.parameters()):
        raise ValueError(f"{loaded.base}: is quantised: merge into the full-precision model it was made from")
    return loaded


@dataclass(frozen=True)
class MergeResult:
    """A merge in memory, proved in float32.

    Attributes:
        plain: the merged model, float32.
        changed: name -> tensor that the merge changed, float32.
        dtype: of the base's weights.
        prompts: what logits were compared on, see ``prompts_for``.
        unmerged: logits of the model with its adapter, see ``last_logits``.
        difference: greatest change of any logit.
    """

    plain: PreTrainedModel
    changed: dict[str, torch.Tensor]
    dtype: torch.dtype
    prompts: list[torch.Tensor]
    unmerged: list[torch.Tensor]
    difference: float


def fold(loaded: LoadedModel, into: Into) -> MergeResult:
    """Merge in memory, and compare the logits on real prompts.

    Args:
        loaded: see ``load_adapter``; not to be used afterwards.
        into: see ``merged_tensors``.

    Raises:
        ValueError: ``into`` does not fit, or a logit changes by more than ``MAX_LOGIT_DIFFERENCE`` in float32 and,
            where sums are so deep that float32 rounds by more, in float64 as well.
    """
    dtype, prompts = loaded.model.dtype, prompts_for(loaded)
    folded = fold_in(torch.float32, loaded, into, dtype, prompts)
    if not folded.difference <= MAX_LOGIT_DIFFERENCE:
        exact = fold_in(torch.float64, load_adapter(Path(loaded.name)), into, dtype, prompts).difference
        if not exact <= MAX_LOGIT_DIFFERENCE:
            raise ValueError(f"merging would change logits by {folded.difference:.1e} in float32 and {exact:.1e} in "
                             f"float64, more than {MAX_LOGIT_DIFFERENCE:.0e}")  # fmt: skip
    return folded


def fold_in(
    dtype: torch.dtype, loaded: LoadedModel, into: Into, own: torch.dtype, prompts: list[torch.Tensor]
) -> MergeResult:
    """The merge computed in a dtype, whatever comes of it: see ``fold``; ``own`` is the base's dtype."""
    # Wrapped names lose PEFT's prefix and the wrapper's level, and become those of the base model.
    exact = loaded.model.to(dtype)
    unmerged = last_logits(exact, prompts)
    changed = {name.removeprefix("base_model.model."): tensor for name, tensor in merged_tensors(exact, into).items()}
    plain: PreTrainedModel = exact.unload()
    parameters = dict(plain.named_parameters())
    for name, tensor in changed.items():
        parameters[name].data = tensor
    return MergeResult(plain, changed, own, prompts, unmerged, difference(last_logits(plain, prompts), unmerged))


def check_saved(folder: Path, base: str, folded: MergeResult) -> float:
    """Load a merged folder and compare it, tensor by tensor, with its base model and the merge in memory.

    Returns:
        Greatest difference of its logits from the unmerged model's, which is that of rounding to the base's dtype.

    Raises:
        ValueError: a tensor is not what it should be; the message names it.
    """
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=folded.dtype, use_safetensors=True).eval()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=folded.dtype, use_safetensors=True)
    for (name, ours), theirs in zip(saved.named_parameters(), plain.parameters(), strict=True):
        if not torch.equal(ours, folded.changed[name].to(folded.dtype) if name in folded.changed else theirs):
            raise ValueError(f"{folder}: {name} is not what merging makes of {base}: merge again")
    del plain
    return difference(last_logits(saved.float(), folded.prompts), folded.unmerged)


def weight_hashes(name: str | Path) -> dict[str, str]:
    """SHA-256 of the safetensors files of a model folder, or of a hub id that was fetched."""
    from huggingface_hub import snapshot_download

    weights = "*.safetensors"
    if not Path(name).is_dir():
        name = snapshot_download(str(name), allow_patterns=weights, local_files_only=True)
    return {file.name: file_hash(file) for file in sorted(Path(name).glob(weights))}


def merge(
    adapter: str | Path, out: Path, into: Into = "auto", *, report: Callable[[str], object] = print
) -> dict[str, Any]:
    """Write a plain Hugging Face folder with a SEAL adapter's scales in its weights.

    The folder gets its name only after it was loaded again and proved: in float32 its logits on real prompts are those
    of the unmerged model, and no tensor differs from the base model's but those scaled. Nothing is left otherwise. What
    was merged is kept in it, see ``RECORD``, so that ``verify`` can repeat the proof.

    Args:
        adapter: folder of a SEAL adapter.
        out: the folder to write; must not exist.
        into: see ``merged_tensors``.
        report: told what is being done.

    Returns:
        ``adapter`` and ``base`` (names), ``method``, ``into`` (as asked for), ``changed`` (names of tensors),
        ``dtype``, ``difference`` (greatest change of any logit by the merge, in float32), ``rounded_difference`` (the
        same after rounding to ``dtype``), and ``adapter_files``, ``base_files`` and ``files`` (file name -> SHA-256;
        the last are the merged folder's).

    Raises:
        ValueError: bad input, or the proof failed; the message is one line.
    """
    check_output(out, folder=True)
    adapter = Path(adapter)
    loaded = load_adapter(adapter)
    report(f"{loaded.method} on {loaded.base} ({str(loaded.model.dtype).removeprefix('torch.')})")
    folded = fold(loaded, into)
    report(f"float32: the merge changes no logit by more than {folded.difference:.1e}")
    folded.plain.to(folded.dtype)
    with written_whole(out) as partial:
        folded.plain.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        write_older_rope_keys(partial)
        provenance.copy(adapter, partial)
        rounded = check_saved(partial, loaded.base, folded)
        found = {
            "adapter": str(adapter),
            "base": loaded.base,
            "method": loaded.method,
            "into": into,
            "changed": sorted(folded.changed),
            "dtype": str(folded.dtype).removeprefix("torch."),
            "difference": folded.difference,
            "rounded_difference": rounded,
            "adapter_files": weight_hashes(adapter),
            "base_files": weight_hashes(loaded.base),
            "files": {file.name: file_hash(file) for file in sorted(partial.iterdir())},
        }
        (partial / RECORD).write_text(json.dumps(found, indent=1) + "\n")
    kinds = {name.split(".")[-2] for name in folded.changed}
    report(f"{out}: {len(folded.changed)} tensors changed ({', '.join(sorted(kinds))}), all others as they were")
    if folded.dtype != torch.float32:
        report(f"rounded to {found['dtype']}, logits differ by up to {rounded:.1e}")
    return found


def verify(folder: Path, adapter: Path | None = None, *, report: Callable[[str], object] = print) -> None:
    """Repeat the proof that ``merge`` gave for a folder.

    Args:
        folder: that ``merge`` wrote.
        adapter: where the adapter is now; None means where it was.
        report: told what was found.

    Raises:
        ValueError: the folder, adapter or base model is not what was merged, or the proof fails; one line.
    """
    try:
        found = load_json(folder / RECORD)
        adapter, base, into = Path(adapter or found["adapter"]), found["base"], found["into"]
        files, changed = found["files"], found["changed"]
        before = {adapter: found["adapter_files"], base: found["base_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: holds no {RECORD} as `merge` writes it ({first_line(error)})") from None
    now = {file.name: file_hash(file) for file in folder.iterdir() if file.is_file() and file.name != RECORD}
    if different := sorted(name for name in now.keys() | files.keys() if now.get(name) != files.get(name)):
        raise ValueError(f"{folder / different[0]}: is not the file that was written: merge again")
    for name, hashes in before.items():
        if weight_hashes(name) != hashes:
            raise ValueError(f"{name}: its weights are not there, or not those that were merged: put them back, or say "
                             "where the adapter is by --adapter")  # fmt: skip
    folded = fold(load_adapter(adapter), into)
    if sorted(folded.changed) != changed:
        raise ValueError(f"{folder}: merging changes other tensors than its {RECORD} names: merge again")
    rounded = check_saved(folder, base, folded)
    report(
        f"{folder}: {len(files)} files, the adapter and the base model as they were; {len(changed)} tensors changed, "
        f"all others the base model's; logits differ by {folded.difference:.1e} in float32, by {rounded:.1e} as saved"
    )
