"""Merge scales into a model's weights, and verify that nothing else changes (paper section 4.3, Figure 3b)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import check_output, file_hash, load_json, written_whole
from axolotl_plugins.common.window import read_config

from . import provenance
from .layer import SealLayer, parameter_factors
from .merge_quantised import (
    ABSMAX,
    MAX_RELATIVE_ERROR,
    block_changes,
    dequantise,
    quantisation,
    read_weight,
    stored_tensors,
)
from .model_files import (
    TOKENIZER_FILES,
    Change,
    Place,
    check_copy,
    copy_model,
    find_tensors,
    model_folder,
    read_tensor,
    times,
    write_config,
)
from .model_loading import (
    RECORD,
    LoadedModel,
    adapter_file,
    apply_adapter,
    cannot_load,
    check_adapter,
    check_name,
    load,
)
from .placements import FUSED, Site, features, fused_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Into = Literal["auto", "o_proj", "v_proj"]
# Tolerance of a merge. Where float32 rounds by more, float64 distinguishes rounding from a wrong merge.
MAX_LOGIT_DIFFERENCE = 1e-4
PROOF_WINDOW = 2048  # tokens; bounds the proof's prompts where the config states no window
PLAIN_TOKENS = 256  # of a prompt for models without a chat template
# Attention modules whose values reach the output projection through attention alone.
VALUES_ONLY_ATTEND = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", *FUSED)


def value_rows(attention: nn.Module, output: Site) -> tuple[str, torch.Tensor]:
    """Find the output rows of an attention module's projections that compute its values.

    Returns:
        Name of the projection inside ``attention``, and the indices of its value rows, int64 of shape (C,), in the
        order of the concatenated heads, whose site is ``output``.

    Raises:
        ValueError: there are fewer value heads than query heads, or values may change on their way to the output
            projection, which the class of the module tells.
    """
    kind = type(attention)
    name = kind.__name__.removesuffix("Attention")
    if name not in VALUES_ONLY_ATTEND or not kind.__module__.startswith("transformers.models."):
        raise ValueError(f"{kind.__name__} may change values between their projection and attention: merge into o_proj")
    if name in FUSED:
        child, rows = fused_rows(attention, "value", output.channels)
    else:
        child = "v_proj"
        rows = torch.arange(features(getattr(attention, child))[1])
    if len(rows) != output.channels:
        raise ValueError(
            f"{child} has {len(rows)} value rows where those of {output.heads} heads would be {output.channels}: with "
            "grouped-query attention one value row serves several query heads that have different scales; merge into "
            "o_proj"
        )
    return child, rows


def scale_factors(model: nn.Module, into: Literal["o_proj", "v_proj"]) -> dict[str, torch.Tensor]:
    """Compute what a merge multiplies parameters by.

    Args:
        model: wrapped by SEAL, with active adapters, not merged.
        into: where scales of attention outputs go: ``o_proj``, the columns of the output projections, or ``v_proj``,
            the value rows and biases. Those of other placements have one place each.

    Returns:
        Parameter name, without PEFT's prefix -> float32 factor of a shape that broadcasts to the parameter's.

    Raises:
        ValueError: the architecture does not allow ``into``.
    """
    modules: dict[str, tuple[nn.Module, dict[str, torch.Tensor]]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SealLayer) or (scale := layer.active_scale()) is None:
            continue
        name, scale = name.removeprefix("base_model.model."), scale.detach().cpu()
        if into == "v_proj" and layer.site.heads_of("attention_output"):
            parent = name.rpartition(".")[0]
            attention = model.get_submodule(f"base_model.model.{parent}")
            child, rows = value_rows(attention, layer.site)
            name, base = f"{parent}.{child}", getattr(attention, child)
            base = base.get_base_layer() if isinstance(base, SealLayer) else base
            factor = torch.ones(features(base)[1])
            factor[rows] = scale
            own = parameter_factors(base, factor, of_output=True)
        else:
            base, own = layer.get_base_layer(), layer.parameter_factors(scale)
        _, others = modules.setdefault(name, (base, {}))  # not empty where its values have scales of their own
        others |= {key: others[key] * factor if key in others else factor for key, factor in own.items()}
    factors: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for name, (module, own) in modules.items():
        owner = owners.setdefault(id(module.weight), name)
        if owner == name:
            factors |= {f"{name}.{key}": factor for key, factor in own.items()}
        elif not torch.equal(factors[f"{owner}.weight"], own["weight"]):
            raise ValueError(
                f"{owner} and {name} share one weight but have different scales, which cannot be merged: use the "
                "adapter, or `export` it"
            )
    return factors


def choose(
    loaded: LoadedModel, into: Into, report: Callable[[str], object]
) -> tuple[dict[str, torch.Tensor], dict[str, Place], dict[Place, Change | None]]:
    """Return ``scale_factors``, where they belong in the base model's files, and the changes of the files.

    The second maps parameter names to tensors of the files, for the last see ``copy_model``. If ``auto`` does not take
    ``v_proj``, the reason is reported.

    Raises:
        ValueError: the architecture does not allow ``into``, or the files hold a tensor in another form.
    """
    try:
        factors = scale_factors(loaded.model, "o_proj" if into == "o_proj" else "v_proj")
        folder = model_folder(loaded.base)
        if method := quantisation(loaded.base, load_json(folder / "config.json").get("quantization_config")):
            return factors, *block_changes(folder, method, factors)
        parameters = loaded.model.get_base_model().named_parameters(remove_duplicate=False)
        values = {name.replace(".base_layer.", "."): value for name, value in parameters}
        places = find_tensors(folder, {name: values[name] for name in factors})
        if missing := sorted(factors.keys() - places.keys()):
            raise ValueError(f"{loaded.base}: its files hold {missing[0]} in another form: load it in Transformers, "
                             "save it, and tune the copy")  # fmt: skip
        return factors, places, {places[name]: times(factor) for name, factor in factors.items()}
    except ValueError as error:
        if into != "auto":
            raise
        report(f"merging into the output projections, not into values: {first_line(error)}")
        return choose(loaded, "o_proj", report)


@torch.no_grad()
def last_logits(model: nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Compute the logits at every position of each prompt, shape (T, V), on the CPU."""
    device = next(model.parameters()).device
    return [model(input_ids=ids[None].to(device)).logits[0].cpu() for ids in prompts]


def difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Return the maximum absolute difference over all prompts, positions and tokens."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def prompts_for(loaded: LoadedModel) -> list[torch.Tensor]:
    """Return token ids of two prompts, int64 of shape (T,): line retrieval with answers, of 16 lines or what fits.

    For models without a chat template they are random tokens.

    Raises:
        ValueError: the model's context window is too short for one line.
    """
    from data_gen.dataset import Request, generate

    if not loaded.tokenizer.chat_template:
        vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
        shape = (2, min(PLAIN_TOKENS, loaded.window))
        return list(torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)))
    for lines in (16, 8, 4, 2, 1):
        samples = generate(Request("line", lines=lines, samples=2, split="test"), loaded.tokenizer)
        prompts = [
            loaded.tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=True)["input_ids"][0]
            for row in samples
        ]
        if max(map(len, prompts)) <= loaded.window:
            return prompts
    raise ValueError(f"{loaded.base}: its window of {loaded.window} tokens is too short for a prompt to verify a merge")


def load_adapter(adapter: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> LoadedModel:
    """Load a SEAL adapter and its base model, dequantised; on the meta device if only kernels of GPUs can load it.

    Raises:
        ValueError: the folder is not a SEAL adapter, or its base model is quantised in a way that takes no scales.
    """
    check_name(str(adapter))
    check_adapter(adapter)
    base = provenance.base_model(adapter)
    try:
        config = read_config(base, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise cannot_load(str(adapter), error) from error
    method = quantisation(base, getattr(config, "quantization_config", None))
    loaded = load(adapter, dtype=dtype, default_window=PROOF_WINDOW, needs_template=False, on_cpu=True,
                  trust_remote_code=trust_remote_code, weights=method in (None, "bitsandbytes"))  # fmt: skip
    if not loaded.method.startswith("SEAL"):
        raise ValueError(f"{adapter}: found a {loaded.method} adapter; use `axolotl merge-lora` for it")
    if loaded.model.device.type == "meta":
        model = apply_adapter(loaded.model, adapter).eval()
        scales = {f"{name}.default": scale for name, scale in load_file(adapter_file(adapter)).items()}
        model.load_state_dict(scales, strict=False, assign=True)
        return replace(loaded, model=model)
    if method:
        dequantise(loaded.model.get_base_model())
    return loaded


@dataclass(frozen=True)
class MergeResult:
    """A merge in memory, verified in float32.

    Attributes:
        factors: see ``choose``.
        places: see ``choose``.
        changes: see ``choose``.
        prompts: on which logits were compared, see ``prompts_for``; none if only kernels of GPUs can load the model.
        unmerged: their logits with the adapter, see ``last_logits``.
        difference: maximum change of any logit; None without prompts.
    """

    factors: dict[str, torch.Tensor]
    places: dict[str, Place]
    changes: dict[Place, Change | None]
    prompts: list[torch.Tensor]
    unmerged: list[torch.Tensor]
    difference: float | None

    @property
    def summary(self) -> str:
        """Line that states whether logits agree."""
        if self.difference is None:
            return "only kernels of GPUs can load the model: its tensors are compared, and no logits"
        return f"float32: the merge changes no logit by more than {self.difference:.1e}"


def fold(loaded: LoadedModel, into: Into, report: Callable[[str], object]) -> MergeResult:
    """Merge a model from ``load_adapter`` in place, and compare the logits on the prompts with those before.

    Raises:
        ValueError: see ``choose``; or a logit changes by more than ``MAX_LOGIT_DIFFERENCE`` in float32 and, to rule
            out rounding, in float64.
    """
    factors, places, changes = choose(loaded, into, report)
    if loaded.model.device.type == "meta":
        return MergeResult(factors, places, changes, [], [], None)
    prompts = prompts_for(loaded)
    unmerged, merged = logits_of_both(loaded, factors, prompts)
    change = difference(merged, unmerged)
    if not change <= MAX_LOGIT_DIFFERENCE:
        exact_model = load_adapter(Path(loaded.name), torch.float64, loaded.trust_remote_code)
        exact_model.model.get_base_model().set_experts_implementation("eager")  # others compute in 32 bits at most
        exact = difference(*logits_of_both(exact_model, factors, prompts))
        if not exact <= MAX_LOGIT_DIFFERENCE:
            raise ValueError(f"merging would change logits by {change:.1e} in float32 and {exact:.1e} in float64, more "
                             f"than {MAX_LOGIT_DIFFERENCE:.0e}")  # fmt: skip
    return MergeResult(factors, places, changes, prompts, unmerged, change)


@torch.no_grad()
def logits_of_both(
    loaded: LoadedModel, factors: dict[str, torch.Tensor], prompts: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the logits of a model with its adapter and of the same model merged in place, see ``last_logits``."""
    unmerged = last_logits(loaded.model, prompts)
    plain = loaded.model.unload()
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for name, factor in factors.items():
        parameters[name] *= factor.to(parameters[name].device)
    return unmerged, last_logits(plain, prompts)


def check_saved(folder: Path, base: str, merged: MergeResult, **trust: bool) -> tuple[int, float | None]:
    """Compare every tensor in a merged folder's files with the base model's, and its logits with the unmerged model's.

    Returns:
        Number of tensors in the files, and the maximum difference of logits, due to rounding to the base's dtype; None
        if only kernels of GPUs can load it.

    Raises:
        ValueError: a tensor differs; the message names it.
    """
    original = model_folder(base)
    count = check_copy(original, folder, merged.changes)
    if merged.difference is None:
        return count, None
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **trust).eval()
    if getattr(saved, "is_quantized", False):
        dequantise(saved)
    parameters = dict(saved.named_parameters(remove_duplicate=False))
    stored, stored_before = stored_tensors(folder), stored_tensors(original)
    for name, place in merged.places.items():
        weight = read_weight(folder, stored, place)
        if not torch.equal(parameters[name].cpu(), weight):
            raise ValueError(f"{folder}: {name} is not read from {place.name}, into which it was merged")
        if place.name.endswith(ABSMAX):
            expected = read_weight(original, stored_before, place) * merged.factors[name]
            if not torch.allclose(weight, expected, rtol=MAX_RELATIVE_ERROR, atol=0):
                raise ValueError(f"{folder}: {name} differs from the dequantised product: merge again")
    return count, difference(last_logits(saved, merged.prompts), merged.unmerged)


def weight_hashes(name: str | Path) -> dict[str, str]:
    """Return the SHA-256 of the safetensors files of a model or adapter folder, or of a downloaded hub id."""
    return {file.name: file_hash(file) for file in sorted(model_folder(name).glob("*.safetensors"))}


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a merged folder's files, but for its record."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != RECORD)
    return {file.relative_to(folder).as_posix(): file_hash(file) for file in files}


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, base: Path, out: Path, **trust: bool) -> None:
    """Replace a merged folder's tokenizer, copied from the base model, if the adapter's tokenizer differs from it."""
    try:
        own = AutoTokenizer.from_pretrained(base, **trust)
    except (OSError, ValueError):
        own = None
    if own is not None and tokenizer_state(own) == tokenizer_state(tokenizer):
        template = own.chat_template
        if tokenizer.chat_template == (template.get("default") if isinstance(template, dict) else template):
            return
        if isinstance(tokenizer.chat_template, str):
            (out / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
            return
    for file in out.iterdir():
        if file.name.startswith(TOKENIZER_FILES):
            file.unlink()
    tokenizer.save_pretrained(out)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """Return what two tokenizers that encode alike have in common."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return tokenizer.get_vocab(), tokenizer.special_tokens_map
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str(), tokenizer.special_tokens_map


def merge(
    adapter: str | Path, out: Path, into: Into = "auto", *, report: Callable[[str], object] = print,
    trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a plain Hugging Face folder with a SEAL adapter's scales in its weights.

    The base model's files are copied and only scaled tensors are overwritten, of quantised weights their scales. The
    folder is renamed to ``out`` after it was verified: every tensor in its files is the base model's byte by byte or
    its product with the scales, and in float32 its logits are those of the unmerged model. Otherwise nothing is left.
    The folder records the merge in ``RECORD``, so that ``verify`` can repeat the check.

    Args:
        adapter: folder of a SEAL adapter.
        out: folder to write; must not exist.
        into: see ``scale_factors``; ``auto`` takes ``v_proj``, as the paper does, where the architecture makes that
            equivalent, else ``o_proj``.
        report: called with lines that report progress.
        trust_remote_code: run code that comes with the base model, which is copied.

    Returns:
        ``adapter`` and ``base`` (names), ``method``, ``into`` (the argument), ``changed`` (parameter names), ``dtype``
        (of the changed tensors), ``difference`` (maximum change of any logit by the merge, in float32; None if only
        kernels of GPUs can load the model), ``rounded_difference`` (the same after rounding to ``dtype``), and
        ``adapter_files``, ``base_files`` and ``files`` (file name -> SHA-256; the last are the merged folder's).

    Raises:
        ValueError: invalid input, or verification failed; the message is one line.
    """
    check_output(out, folder=True)
    adapter = Path(adapter)
    trust = {"trust_remote_code": trust_remote_code}
    loaded = load_adapter(adapter, trust_remote_code=trust_remote_code)
    base, tokenizer = model_folder(loaded.base), loaded.tokenizer
    record: dict[str, Any] = {"adapter": str(adapter), "base": loaded.base, "method": loaded.method, "into": into}
    report(f"{loaded.method} on {loaded.base}")
    merged = fold(loaded, into, report)
    del loaded  # frees its memory
    report(merged.summary)
    with written_whole(out) as partial:
        copy_model(base, partial, merged.changes)
        write_config(base, adapter if (adapter / "config.json").is_file() else base, partial, **trust)
        write_tokenizer(tokenizer, base, partial, **trust)
        provenance.copy(adapter, partial)
        count, rounded = check_saved(partial, record["base"], merged, **trust)
        dtype = read_tensor(partial, next(iter(merged.places.values()))).dtype
        record |= {
            "changed": sorted(merged.factors),
            "dtype": str(dtype).removeprefix("torch."),
            "difference": merged.difference,
            "rounded_difference": rounded,
            "adapter_files": weight_hashes(adapter),
            "base_files": weight_hashes(base),
            "files": file_hashes(partial),
        }
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    modules = sorted({name.split(".")[-2] for name in merged.factors})
    report(f"{out}: {len(merged.changes)} of {count} tensors changed ({', '.join(modules)}), all others unchanged")
    if dtype != torch.float32:
        report(f"rounded to {record['dtype']}" + (f", logits differ by up to {rounded:.1e}" if rounded else ""))
    return record


def verify(
    folder: Path, adapter: Path | None = None, *, report: Callable[[str], object] = print,
    trust_remote_code: bool = False,
) -> None:  # fmt: skip
    """Verify a folder that ``merge`` wrote against its record, its adapter (at a new path if named) and its base model.

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
    current = file_hashes(folder)
    if different := sorted(name for name in current.keys() | files.keys() if current.get(name) != files.get(name)):
        raise ValueError(f"{folder / different[0]}: differs from the file that was written: merge again")
    for name, hashes in sources.items():
        try:
            check_name(str(name))
            unchanged = weight_hashes(name) == hashes
        except (OSError, ValueError):
            unchanged = False
        if not unchanged:
            raise ValueError(f"{name}: its weights are missing or changed since the merge: restore them, or give the "
                             "adapter's path by --adapter")  # fmt: skip
    merged = fold(load_adapter(adapter, trust_remote_code=trust_remote_code), into, lambda _: None)
    if sorted(merged.factors) != changed:
        raise ValueError(f"{folder}: merging changes other tensors than its {RECORD} lists: merge again")
    count, rounded = check_saved(folder, base, merged, trust_remote_code=trust_remote_code)
    logits = "no logits compared, which takes kernels of GPUs"
    if merged.difference is not None:
        logits = f"logits differ by {merged.difference:.1e} in float32, by {rounded:.1e} as saved"
    report(
        f"{folder}: {len(files)} files, the adapter and the base model unchanged; {len(merged.changes)} of {count} "
        f"tensors merged, all others equal the base model's; {logits}"
    )
