"""Adapters of a study as folders that PEFT loads, each with its training data's record and a model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_plugins.common.io import file_hash, load_json, write_text
from axolotl_plugins.common.tokenizer import load_tokenizer
from axolotl_plugins.seal import provenance
from axolotl_plugins.seal.model_card import card
from recipes.tools.methods import KEYS
from recipes.tools.study_cells import Cell, Settings, adapter_folder, data_file, read_samples, training_requests

SHARED = ("SEAL-H", "SEAL-C", "SEAL-H from full mixture", "SEAL-C from full mixture")


def share(study: Path, gathered: dict[str, Any], model: Path, out: Path) -> list[Path]:
    """Write a study's tested SEAL adapters of every task and of the full mixture, each with the smallest seed.

    Args:
        study: folder of the study.
        gathered: see ``study_results.gather``.
        model: folder of the base model, whose name the adapters state.
        out: gets one folder per task and method, as ``line_sealc`` or ``mixture_sealc``; all are returned.

    Raises:
        ValueError: the study has no tested adapter, is of another model, or changed the model's config.
    """
    settings = Settings(**load_json(study / "settings.json"))
    if settings.model_config:
        raise ValueError(f"{study}: its adapters are of a model with changed config, which their folders would not "
                         "state: tune such a model by a recipe with `model_config`")  # fmt: skip
    if settings.model not in map(file_hash, model.glob("*.safetensors")):
        raise ValueError(f"model: {model} is not the one that {study} tuned: name it with --model")
    tokenizer = load_tokenizer(str(model))
    written: dict[str, Path] = {}
    for row in gathered["rows"]:
        cell = Cell(row["task"], row["method"], "test", row["seed"], row["rate"])
        name = f"{'mixture' if len(cell.sources) > 1 else cell.task}_{KEYS.get(str(cell.tuned_as))}"
        source = adapter_folder(study, cell.tuned_cell)
        if cell.method not in SHARED or name in written or not source.is_dir():
            continue
        folder = written[name] = out / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        config = load_json(source / "adapter_config.json") | {"base_model_name_or_path": str(model)}
        write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        provenance.save(training_data(study, settings, cell, tokenizer), folder)
        tested = [each for each in gathered["rows"] if (each["method"], each["seed"]) == (row["method"], row["seed"])]
        tested = tested if len(cell.sources) > 1 else [row]
        write_text(folder / "README.md", card(folder, [scores(each, gathered) for each in tested]))
    if not written:
        raise ValueError(f"out: no SEAL adapter was tested in {study}: run the study first")
    return list(written.values())


def training_data(study: Path, settings: Settings, cell: Cell, tokenizer: Any) -> dict[str, Any]:
    """Return the record of the samples that a cell was tuned on, see ``provenance.record``."""
    files, texts = [], set()
    for wanted in training_requests(settings, cell):
        file = data_file(study / "data", wanted)
        manifest = {key: getattr(wanted, key) for key in ("task", "tokens", "samples", "seed", "split")}
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        files.append({"path": file.name, "sha256": digest, "manifest": manifest})
        rows = read_samples(wanted, tokenizer, study / "data")
        texts |= {provenance.text_hash(text) for row in rows for text in provenance.texts(row)}
    return {"files": files, "unread": [], "texts": sorted(texts)}


def scores(row: dict[str, Any], gathered: dict[str, Any]) -> str:
    """Return a Markdown section with an adapter's scores, those of the base model and how they were measured."""
    base = [r for r in gathered["rows"] if (r["task"], r["method"]) == (row["task"], "base")]
    lengths = " | ".join(f"{score['length']:,}" for score in row["scores"])
    lines = [f"| tokens | {lengths} |", "|---|" + "---:|" * len(row["scores"])]
    for tested in (*base, row):
        lines.append(
            f"| {tested['method']} | " + " | ".join(f"{score['score']:.2f}" for score in tested["scores"]) + " |"
        )
    general = [r for r in gathered["general"] if all(r[key] == row[key] for key in ("task", "method", "seed", "rate"))]
    moved = "".join(f" Perplexity on unrelated text, tuned / base: {r['ratio']:.2f}." for r in general)
    device = " and ".join(np.atleast_1d(gathered["device"]))
    return "\n".join([
        f"### {row['task']}",
        "",
        *lines,
        "",
        f"{row['scores'][0]['count']} test samples per length, greedy, {device}, {gathered['date']}. "
        f"Learning rate {row['rate']:g}, seed {row['seed']}.{moved}",
    ])  # fmt: skip
