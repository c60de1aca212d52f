"""What an adapter was trained on, kept in its folder, so that it is not scored on the same samples."""

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


def text_hash(text: str) -> str:
    """First 16 hexadecimal digits of a text's SHA-256; white space does not count."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def texts(row: Any) -> Iterator[str]:
    """Every string in a row, however deep, so that the prompt is among them in whatever format the data is."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, (list, dict)):
        for part in row.values() if isinstance(row, dict) else row:
            yield from texts(part)


def check_chat(file: Path, number: int, row: dict[str, Any], field: str) -> None:
    """See that a row can be learned from.

    Raises:
        ValueError: it is no chat that ends with an answer.
    """
    turns = row.get(field)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns) or not turns:
        raise ValueError(f"{file}, line {number}: found no chat, expected a list of turns under {field!r}")
    last = turns[-1].get("content", turns[-1].get("value"))
    if not isinstance(last, str) or not last.strip():
        raise ValueError(f"{file}, line {number}: the last turn is empty, expected the assistant's answer")


def record(datasets: list[dict[str, Any]]) -> dict[str, Any]:
    """Read a recipe's data, and describe it.

    Args:
        datasets: of an Axolotl recipe; JSON lines files are read, and those of type ``chat_template`` checked.

    Returns:
        ``files``, with ``path``, ``sha256`` and, for generated data, their ``manifest``; ``unread``, names of data
        that is no local JSON lines file; and ``texts``, hashes of all texts that were read.

    Raises:
        ValueError: a row cannot be learned from; the message names its file and line.
    """
    files: list[dict[str, Any]] = []
    unread: list[str] = []
    found: set[str] = set()
    for dataset in datasets:
        path = Path(str(dataset.get("path")))
        if not path.is_file() or path.suffix != ".jsonl":
            unread.append(str(path))
            continue
        count = 0
        for count, (number, row) in enumerate(read_rows(path), 1):  # noqa: B007
            if dataset.get("type") == "chat_template":
                check_chat(path, number, row, dataset.get("field_messages") or "messages")
            found.update(map(text_hash, texts(row)))
        if not count:
            raise ValueError(f"{path}: holds no samples: remove it, or name another file")
        manifest = manifest_path(path)
        files.append({
            "path": str(path),
            "sha256": file_hash(path),
            "manifest": load_json(manifest) if manifest.is_file() else None,
        })  # fmt: skip
    return {"files": files, "unread": unread, "texts": sorted(found)}


def save(found: dict[str, Any], folder: Path) -> None:
    """Put a record into a model's folder."""
    write_text(folder / FILE, json.dumps(found, indent=1) + "\n")


def copy(source: Path, folder: Path) -> None:
    """Take a model's record, if it has one, into the folder of what is made of it."""
    if (source / FILE).is_file():
        write_text(folder / FILE, (source / FILE).read_text(encoding="utf-8"))


def seen_texts(folder: Path) -> frozenset[str] | None:
    """Hashes of all texts that the model in a folder was tuned on; None where they are not known.

    Raises:
        ValueError: the record cannot be read.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        found = load_json(file)
        return None if found["unread"] else frozenset(found["texts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a record of training data ({first_line(error)}): tune again") from None
