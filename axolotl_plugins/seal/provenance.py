"""Where an adapter comes from: its base model, and a record of its training data to detect contaminated evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import file_hash, load_json, read_rows, write_text
from data_gen.dataset import manifest_path

FILE = "training_data.json"
SHOWN = 600, 300  # characters at the start and at the end of a long example


def base_model(adapter: str | Path) -> str:
    """Return the base model that an adapter's config names: hub id or folder.

    Raises:
        OSError: the folder has no readable adapter_config.json.
        ValueError: the config names none.
    """
    config = load_json(Path(adapter) / "adapter_config.json")
    if base := config.get("base_model_name_or_path") if isinstance(config, dict) else None:
        return str(base)
    raise ValueError(f"{adapter}: its adapter_config.json names no base_model_name_or_path: set it there")


def text_hash(text: str) -> str:
    """Return the first 16 hexadecimal digits of a text's SHA-256, after normalising white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def texts(row: Any) -> Iterator[str]:
    """Yield every string in a row, at any depth, so that the prompt is among them in any data format."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, (list, tuple, dict)):
        for part in row.values() if isinstance(row, dict) else row:
            yield from texts(part)


def shorten(text: str) -> str:
    """Return a text, or its start and end if it is long, with the number of characters left out between."""
    start, end = SHOWN
    if (left_out := len(text) - start - end) <= 0:
        return text
    return f"{text[:start]}\n[... {left_out:,} characters left out ...]\n{text[-end:]}"


def example(turns: Any) -> dict[str, str] | None:
    """Return ``prompt`` and ``answer`` of a chat, shortened; None if it has another form."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    *prompt, answer = [str(turn.get("content", turn.get("value"))) for turn in turns]
    return {"prompt": shorten("\n\n".join(prompt)), "answer": shorten(answer)}


def record(datasets: list[dict[str, Any]]) -> dict[str, Any]:
    """Read a recipe's training data, and return its record.

    Args:
        datasets: ``datasets`` of an Axolotl recipe, whose JSON lines files are read.

    Returns:
        ``files``, with ``path``, ``sha256``, number of ``samples``, an ``example`` of them and, for generated data,
        their ``manifest``; ``unread``, names of datasets that are not local JSON lines files; and ``texts``, hashes of
        all texts that were read.

    Raises:
        ValueError: a file has no samples, or a line is no JSON object; the message names file and line.
    """
    files: list[dict[str, Any]] = []
    unread: list[str] = []
    hashes: set[str] = set()
    for dataset in datasets:
        path = Path(str(dataset.get("path")))
        if not path.is_file() or path.suffix != ".jsonl":
            unread.append(str(path))
            continue
        count, shown = 0, None
        for count, (_, row) in enumerate(read_rows(path), 1):  # noqa: B007
            shown = shown or example(row.get(dataset.get("field_messages") or "messages"))
            hashes.update(map(text_hash, texts(row)))
        if not count:
            raise ValueError(f"{path}: has no samples: remove it, or set another path")
        manifest = manifest_path(path)
        files.append({
            "path": str(path),
            "sha256": file_hash(path),
            "samples": count,
            "example": shown,
            "manifest": load_json(manifest) if manifest.is_file() else None,
        })  # fmt: skip
    return {"files": files, "unread": unread, "texts": sorted(hashes)}


def save(training_data: dict[str, Any], folder: Path) -> None:
    """Write a record into a model folder."""
    write_text(folder / FILE, json.dumps(training_data, indent=1) + "\n")


def copy(source: Path, folder: Path) -> None:
    """Copy the record of one model folder, if it has one, to a folder derived from it."""
    if (source / FILE).is_file():
        write_text(folder / FILE, (source / FILE).read_text(encoding="utf-8"))


def ruler_version(folder: Path, task: str) -> int | None:
    """Return the version of RULER that the model in a folder was tuned on a task of, None if on none."""
    files = load_json(folder / FILE)["files"] if (folder / FILE).is_file() else []
    manifests = [file["manifest"] or {} for file in files]
    return next((each.get("ruler_version") for each in manifests if each.get("task") == task), None)


def seen_texts(folder: Path) -> frozenset[str] | None:
    """Return the hashes of all texts that the model in a folder was tuned on, or None if they are unknown.

    Raises:
        ValueError: the record is corrupt.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        training_data = load_json(file)
        training_data["files"]
        return None if training_data["unread"] else frozenset(training_data["texts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a record of training data ({first_line(error)}): tune again") from None
