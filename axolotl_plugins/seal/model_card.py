"""Model card of an adapter, and its upload to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl_plugins.common.io import load_json, write_text
from eval.report import TITLES, paper_scores, paper_value, read_results

from . import provenance
from .config import SealConfig
from .model_loading import method_name
from .scales import saved_scales

PAPER = "[arXiv 2501.15225](https://arxiv.org/abs/2501.15225)"


def data_lines(adapter: Path) -> list[str]:
    """Return a Markdown list item for each training data file of an adapter."""
    path = adapter / provenance.FILE
    files = load_json(path)["files"] if path.is_file() else []
    lines = []
    for file in files:
        manifest = file.get("manifest") or {}
        origin = ", ".join(f"{key} {manifest[key]}" for key in ("task", "tokens", "samples", "seed") if key in manifest)
        lines.append(f"- {origin or Path(file['path']).name} (SHA-256 {file['sha256']})")
    return lines


def score_tables(results: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table per result, with the paper's scores where it has that model, method and task."""
    parts, paper = [], paper_scores()
    for result in results:
        title = f"### {TITLES[result['task']]}"
        if "sets" in result:
            rows = [f"| {row['name']} | {row['score']:.2f} | {row['count']} |" for row in result["sets"]]
            parts.append("\n".join([title, "", "| set | score | samples |", "|---|---:|---:|", *rows]))
            continue
        rows = []
        for row in result["scores"]:
            published = paper_value(result, row["length"], paper)
            score = f"{row['score']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
            paper_cell = f"{published[0]:.2f}" if published else ""
            rows.append(f"| {row['length']:,} | {score} | {row['count']} | {paper_cell} |")
        head = "| longest prompt (tokens) | score (95 % interval) | samples | paper |"
        parts.append("\n".join([title, "", head, "|---:|---|---:|---:|", *rows]))
    return parts


def card(adapter: Path, results: Path) -> str:
    """Render a model card in Markdown.

    Args:
        adapter: folder of a SEAL adapter.
        results: folder with JSON files of ``python -m eval run``; those of other models are ignored.

    Raises:
        ValueError: ``adapter`` is not a SEAL adapter, or a result is not JSON.
    """
    scales = saved_scales(adapter)
    config = SealConfig.from_pretrained(str(adapter))
    method = method_name(config)
    name = str(adapter).rstrip("/")
    scored = [result for result in read_results(results) if str(result["model"]).rstrip("/") == name]
    data = data_lines(adapter)
    layers, heads, channels = scales.shape
    units = f"{channels} channels of {heads} heads" if channels > 1 else f"{heads} heads"
    base = config.base_model_name_or_path
    parts = [
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [seal, long-context]\n---",
        f"# {method} on {base}",
        f"{scales.size:,} learned scales of attention outputs ({units} in {layers} layers; from {scales.min():.3f} to "
        f"{scales.max():.3f}, mean {scales.mean():.3f}), trained as in {PAPER}. The model's own weights are unchanged.",
        "## Use",
        "```python\nimport axolotl_plugins.seal  # registers SEAL\nfrom peft import AutoPeftModelForCausalLM\n\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(THIS_REPOSITORY)\n```",
        "`python -m axolotl_plugins.seal merge` folds the scales into the weights, `export` writes them as an IA3 "
        "adapter for programs without this package.",
    ]
    if data:
        parts += ["## Training data", "\n".join(data)]
    if scored:
        parts += ["## Scores", *score_tables(scored)]
    return "\n\n".join(parts) + "\n"


def push(adapter: Path, repository: str, results: Path, *, private: bool) -> str:
    """Write the card into the adapter's folder and upload adapter, tokenizer and card.

    Args:
        adapter: folder of a SEAL adapter.
        repository: hub id.
        results: see ``card``.
        private: make a new repository private.

    Returns:
        URL of the repository.

    Raises:
        ValueError: see ``card``; or the upload failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    write_text(adapter / "README.md", card(adapter, results))
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=adapter,
            allow_patterns=["adapter_*", "README.md", "*.json", "*.jinja", "tokenizer*"],
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"{repository}: the hub refused: {' '.join(str(error).split())[:300]}") from None
    return f"{hub.endpoint}/{repository}"
