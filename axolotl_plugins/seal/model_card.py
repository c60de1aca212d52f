"""Model card of an adapter, and its upload to the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub.utils import filter_repo_objects

from axolotl_plugins.common.io import load_json, write_text

from . import provenance
from .config import SealConfig
from .model import layer_index
from .model_loading import method_name
from .scales import saved_tensors

UPLOADED = ["adapter_*", "README.md", "*.json", "*.jinja", "tokenizer*"]
PAPER = "[arXiv 2501.15225](https://arxiv.org/abs/2501.15225)"


def data_section(adapter: Path) -> list[str]:
    """Return the Markdown paragraphs on an adapter's training data: sources, files, each with an example; lengths."""
    path = adapter / provenance.FILE
    record = load_json(path) if path.is_file() else {"files": []}
    parts = [f"- {source['weight']:g} of the adapter {source['adapter']}" for source in record.get("sources", ())]
    if parts:
        parts.insert(0, "A weighted combination (`1 + sum(weight * (scale - 1))`), trained on the data of all sources:")
    if record.get("unread"):
        parts.append(f"Not recorded: the data of {', '.join(Path(name).name for name in record['unread'])}.")
    for file in record["files"]:
        manifest = file.get("manifest") or {}
        origin = ", ".join(f"{key} {manifest[key]}" for key in ("task", "tokens", "samples", "seed") if key in manifest)
        own = f"{Path(file['path']).name}, samples {file.get('samples', 'unknown')}"
        parts.append(f"- {origin or own} (SHA-256 {file['sha256']})")
        if shown := file.get("example"):
            parts += ["A prompt and its answer:", fenced(shown["prompt"]), fenced(shown["answer"])]
    if tokens := record.get("tokens"):
        parts.append(f"The samples have {tokens[0]:,} to {tokens[1]:,} tokens.")
    return ["## Training data", *parts] if parts else []


def fenced(text: str) -> str:
    """Return a text as a Markdown code block, whatever it contains."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}"


def card(adapter: Path, scores: Sequence[str] = ()) -> str:
    """Render a model card in Markdown.

    Args:
        adapter: folder of a SEAL adapter.
        scores: Markdown sections with the adapter's scores.

    Raises:
        ValueError: ``adapter`` is not a SEAL adapter.
    """
    tensors = saved_tensors(adapter)
    layers = len({layer_index(name) for name in tensors})
    config = SealConfig.from_pretrained(str(adapter))
    method = method_name(config)
    scales = np.concatenate(list(tensors.values()))
    base = provenance.base_model(adapter)
    paper = PAPER if config.placements == ["attention_output"] else f"{PAPER}, which scales attention outputs only"
    parts = [
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [seal, long-context]\n---",
        f"# {method} on {base}",
        f"{scales.size:,} learned scales of {described(config.placements)} (one per {config.granularity} in {layers} "
        f"layers; from {scales.min():.3f} to {scales.max():.3f}, mean {scales.mean():.3f}), trained as in {paper}. "
        "The model's own weights are unchanged.",
        "## Use",
        "```python\nfrom axolotl_plugins.seal import SealConfig  # registers SEAL\n"
        "from peft import AutoPeftModelForCausalLM\n\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(THIS_REPOSITORY)\n```",
        "`seal merge` folds the scales into the weights, `export` writes them as an IA3 "
        "adapter for programs without this package.",
    ]
    parts += data_section(adapter)
    if scores:
        parts += ["## Scores", *scores]
    return "\n\n".join(parts) + "\n"


def described(placements: Sequence[str]) -> str:
    """Return placements in words."""
    names = {"attention_output": "attention outputs", "query": "queries", "value": "values", "mlp": "MLP activations"}
    return ", ".join(names[placement] for placement in placements)


def uploaded_files(adapter: Path) -> list[Path]:
    """Return the files of an adapter's folder that ``push`` uploads."""
    names = [str(path.relative_to(adapter)) for path in sorted(adapter.rglob("*")) if path.is_file()]
    return [adapter / name for name in filter_repo_objects(names, allow_patterns=UPLOADED)]


def check_base(adapter: Path) -> None:
    """Raise ValueError if the base model of an adapter is a folder, which those who download the adapter lack."""
    base = provenance.base_model(adapter)
    if Path(base).is_dir():
        raise ValueError(
            f"{adapter}: names its base model by the folder {base}, which others lack: set `base_model_name_or_path` "
            "in adapter_config.json to its hub id before you upload it"
        )


def push(adapter: Path, repository: str, scores: Sequence[str] = (), *, private: bool) -> str:
    """Write the ``card`` into an adapter's folder, upload adapter, tokenizer and card, and return the repository's URL.

    A repository (a hub id) that is new is made ``private`` on demand.

    Raises:
        ValueError: see ``card`` and ``check_base``; or the upload failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    check_base(adapter)
    write_text(adapter / "README.md", card(adapter, scores))
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=adapter, allow_patterns=UPLOADED)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"{repository}: the hub refused: {' '.join(str(error).split())[:300]}") from None
    return f"{hub.endpoint}/{repository}"
