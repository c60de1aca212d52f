"""Adapters of a study as folders that PEFT loads, each with its training data's record and a model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from axolotl_plugins.common.io import load_json, write_text
from axolotl_plugins.common.tokenizer import load_tokenizer
from axolotl_plugins.seal import provenance
from axolotl_plugins.seal.model_card import card
from recipes.tools.methods import KEYS
from recipes.tools.study_cells import Cell, Settings, adapter_folder, data_file, read_samples, training_requests

SHARED = ("SEAL-H", "SEAL-C")


def share(study: Path, gathered: dict[str, Any], model: Path, out: Path) -> list[Path]:
    """Write every SEAL adapter of a study that was tested, of each task and method the one with the smallest seed.

    Args:
        study: folder of the study.
        gathered: see ``study_results.gather``.
        model: folder of the base model, whose name the adapters state.
        out: gets one folder per task and method, as ``line_sealc``; all are returned.

    Raises:
        ValueError: the study has no tested adapter.
    """
    settings = Settings(**load_json(study / "settings.json"))
    tokenizer = load_tokenizer(str(model))
    written: dict[str, Path] = {}
    for row in gathered["rows"]:
        cell = Cell(row["task"], row["method"], "test", row["seed"], row["rate"])
        name = f"{cell.task}_{KEYS.get(cell.method)}"
        source = adapter_folder(study, cell)
        if cell.method not in SHARED or name in written or not source.is_dir():
            continue
        folder = written[name] = out / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        config = load_json(source / "adapter_config.json") | {"base_model_name_or_path": str(model)}
        write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        provenance.save(training_data(study, settings, cell, tokenizer), folder)
        write_text(folder / "README.md", card(folder, [scores(row, gathered)]))
    if not written:
        raise ValueError(f"out: no SEAL adapter was tested in {study}: run the study first")
    return list(written.values())


def training_data(study: Path, settings: Settings, cell: Cell, tokenizer: Any) -> dict[str, Any]:
    """Return the record of the samples that a cell was tuned on, see ``provenance.record``."""
    (wanted,) = training_requests(settings, cell)
    rows = read_samples(wanted, tokenizer, study / "data")
    file = data_file(study / "data", wanted)
    manifest = {key: getattr(wanted, key) for key in ("task", "tokens", "samples", "seed", "split")}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "files": [{"path": file.name, "sha256": digest, "manifest": manifest}],
        "unread": [],
        "texts": sorted({provenance.text_hash(text) for row in rows for text in provenance.texts(row)}),
    }


def scores(row: dict[str, Any], gathered: dict[str, Any]) -> str:
    """Return a Markdown section with an adapter's scores, those of the base model and how they were measured."""
    base = next(r for r in gathered["rows"] if (r["task"], r["method"]) == (row["task"], "base"))
    lengths = " | ".join(f"{score['length']:,}" for score in row["scores"])
    lines = [f"| tokens | {lengths} |", "|---|" + "---:|" * len(row["scores"])]
    for name, tested in (("base", base), (row["method"], row)):
        lines.append(f"| {name} | " + " | ".join(f"{score['score']:.2f}" for score in tested["scores"]) + " |")
    general = next(
        r for r in gathered["general"] if all(r[key] == row[key] for key in ("task", "method", "seed", "rate"))
    )
    return "\n".join([
        f"### {row['task']}",
        "",
        *lines,
        "",
        f"{row['scores'][0]['count']} test samples per length, greedy, {gathered['device']}, {gathered['date']}. "
        f"Learning rate {row['rate']:g}, seed {row['seed']}. Perplexity on unrelated text, tuned / base: "
        f"{general['ratio']:.2f}.",
    ])  # fmt: skip
