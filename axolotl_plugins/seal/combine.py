"""Weighted combinations of adapters, as PEFT's ``add_weighted_adapter`` makes of other methods'."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from axolotl_plugins.common.io import check_output, load_json, written_whole

from . import provenance
from .model_loading import WRITER_KEYS
from .scales import saved_placements, saved_tensors

WEIGHTS = "adapter_model.safetensors"
OWN = (WEIGHTS, "README.md", provenance.FILE, "checkpoint-*", "debug.log")  # not copied from the first adapter


def combine(adapters: list[Path], weights: list[float], out: Path) -> None:
    """Write the adapter with scales ``1 + sum(weight * (scale - 1))``.

    One adapter with a weight below 1 changes the model less: between the base model and the tuned one, accuracy is
    traded against the change of unrelated text. Several add up what each changes.

    Args:
        adapters: folders of SEAL adapters of one base model and granularity; other files are copied from the first.
        weights: of the adapters.
        out: folder to write; must not exist. Its record of training data is of all adapters.

    Raises:
        ValueError: a folder is not a SEAL adapter, or differs from the first in base model or shape; a weight is
            missing or non-finite; or ``out`` exists.
    """
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights: found {weights}, expected a number for each of {len(adapters)} adapters")
    tensors = [saved_tensors(adapter) for adapter in adapters]
    bases = [provenance.base_model(adapter) for adapter in adapters]
    configs = [model_config(adapter) for adapter in adapters]
    for adapter, base, own, config in zip(adapters, bases, tensors, configs, strict=True):
        if Path(base).resolve() != Path(bases[0]).resolve():
            raise ValueError(f"{adapter}: is of {base}, the first adapter of {bases[0]}: combine adapters of one model")
        if saved_placements(adapter) != saved_placements(adapters[0]):
            raise ValueError(f"{adapter}: scales other placements than {adapters[0]}")
        if {name: scales.shape for name, scales in own.items()} != {n: s.shape for n, s in tensors[0].items()}:
            raise ValueError(f"{adapter}: has other layers or another granularity than {adapters[0]}")
        if config != configs[0]:
            raise ValueError(f"{adapter}: was tuned with another config.json or chat template than {adapters[0]}")
    check_output(out, folder=True)
    combined = {name: np.ones_like(scales) for name, scales in tensors[0].items()}
    with np.errstate(over="ignore", invalid="ignore"):  # which the check below refuses
        for weight, own in zip(weights, tensors, strict=True):
            for name, scales in own.items():
                combined[name] += np.float32(weight) * (scales - 1)
    if not all(np.isfinite(scales).all() for scales in combined.values()):
        raise ValueError(f"weights: {weights} give non-finite scales: name smaller ones, or train the adapters again")
    with written_whole(out) as partial:
        shutil.copytree(adapters[0], partial, ignore=shutil.ignore_patterns(*OWN))
        save_file(combined, partial / WEIGHTS, metadata={"format": "pt"})
        provenance.save(combined_record(adapters, weights), partial)


def model_config(adapter: Path) -> tuple[dict[str, Any], str]:
    """Return the config.json and the chat template beside an adapter, empty where it has none."""
    config, template = adapter / "config.json", adapter / "chat_template.jinja"
    keys = load_json(config) if config.is_file() else {}
    return (
        {key: value for key, value in keys.items() if key not in WRITER_KEYS},
        template.read_text(encoding="utf-8") if template.is_file() else "",
    )


def combined_record(adapters: list[Path], weights: list[float]) -> dict[str, Any]:
    """Return the record of all adapters' training data (``unread`` without one), with their weights as ``sources``.

    Raises:
        ValueError: a record is corrupt.
    """
    records = []
    for adapter in adapters:
        provenance.seen_texts(adapter)  # raises if the record is corrupt
        file = adapter / provenance.FILE
        records.append(load_json(file) if file.is_file() else {"files": [], "unread": [str(adapter)], "texts": []})
    return {
        "sources": [{"adapter": str(a), "weight": weight} for a, weight in zip(adapters, weights, strict=True)],
        "files": [file for record in records for file in record["files"]],
        "unread": sorted({name for record in records for name in record["unread"]}),
        "texts": sorted({text for record in records for text in record["texts"]}),
    }
