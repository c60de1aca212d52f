"""Results as they come in, one JSON line each, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from axolotl_plugins.common.io import check_output, load_json


def result_name(model: str) -> str:
    """What a model's results are called in a folder of results."""
    return model.strip("/").replace("/", "_")


def result_file(folder: Path, task: str, name: str) -> Path:
    """Where a folder of results has that of a task."""
    return folder / f"{task}_{name}.json"


def check_replaced(out: Path, asked: dict[str, Any]) -> None:
    """See that no result is lost: one that is there already must be of the same samples.

    Args:
        out: the result file.
        asked: what says which samples are scored; a result keeps it under this name.

    Raises:
        ValueError: it is of others.
    """
    if not out.is_file():
        return
    found = load_json(out)
    before = found.get("asked") if isinstance(found, dict) else None
    if before is None:
        raise ValueError(f"{out}: is no result of this command: name another file or folder with --out")
    for key in asked:
        if before.get(key) != asked[key]:
            raise ValueError(f"{out}: holds a result of other samples ({key}: {before.get(key)!r}, now "
                             f"{asked[key]!r}): name another file or folder with --out, or move it away")  # fmt: skip


def journal_file(out: Path, model: str, *settings: object) -> Path:
    """Where results are kept until all are there: beside ``out``, another file for other weights, config or settings.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    check_output(out)
    folder, kinds = Path(model), ("*.safetensors", "*config.json")
    files = sorted(file for kind in kinds for file in folder.glob(kind)) if folder.is_dir() else []
    identity = [model, *settings, *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
    return out.with_name(f".{out.name}.{hashlib.sha256(repr(identity).encode()).hexdigest()[:12]}.partial")


class Journal:
    """Values by key, in memory and, where a file is given, on disk."""

    def __init__(self, file: Path | None) -> None:
        """Read what an earlier run left; a line that it did not finish is dropped."""
        self.file = file
        self.values: dict[str, Any] = {}
        if file is None or not file.exists():
            return
        whole = file.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        with file.open("r+b") as out:
            out.truncate(len(whole))
        for row in map(json.loads, whole.splitlines()):
            self.values[row["key"]] = row["value"]

    def __contains__(self, key: str) -> bool:
        """Whether a key has its value already."""
        return key in self.values

    def add(self, key: str, value: Any) -> None:
        """Keep a value."""
        self.values[key] = value
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "value": value}) + "\n")
