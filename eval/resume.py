"""Cache of values as they come in, one JSON line each, so that an interrupted run resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from axolotl_plugins.common.io import check_output, load_json
from axolotl_plugins.seal.provenance import base_model, texts
from eval.results import same_model

# Of weights, configs, tokenizers, templates, code and samples; not of a model card or of logs.
SOURCES = {".safetensors", ".json", ".jinja", ".py", ".model", ".jsonl", ".txt"}


def result_name(model: str) -> str:
    """Return a model's or a task's name as part of a file name."""
    return re.sub(r"[/:]", "_", model.strip("/"))


def result_file(folder: Path, task: str, name: str) -> Path:
    """Return the result file of a task and a named model in a folder."""
    return folder / f"{result_name(task.removesuffix('.jsonl'))}_{name}.json"


def check_replaced(out: Path, model: str, task: str, options: dict[str, Any]) -> None:
    """Check that writing a result loses none: an existing one must be of the same model, task and samples (``asked``).

    Raises:
        ValueError: ``out`` holds anything else.
    """
    if not out.is_file():
        return
    existing = load_json(out)
    before = existing.get("asked") if isinstance(existing, dict) and "model" in existing else None
    if not isinstance(before, dict):
        raise ValueError(f"{out}: is no result of this command: name another file or folder with --out")
    changed = [f"other samples ({key}: {before.get(key)!r}, now {options[key]!r})"
               for key in options if before.get(key) != options[key]]  # fmt: skip
    if existing.get("task") != task and "file_sha256" not in options:  # a file may have moved
        changed = [f"{existing.get('task')}, not of {task}"]
    if not same_model(str(existing["model"]), model):
        changed = [f"{existing['model']}, not of {model}"]
    if changed:
        raise ValueError(f"{out}: holds a result of {changed[0]}: move it away, or name another with --out")


def journal_file(out: Path, model: str, *settings: object) -> Path:
    """Return the cache file beside ``out``; its name depends on the model and on settings, see ``fingerprint``.

    Raises:
        ValueError: ``out`` cannot be written.
    """
    check_output(out)
    return out.with_name(f".{out.name}.{fingerprint(model, *settings)}.partial")


def fingerprint(model: str, *settings: object) -> str:
    """Return a hash of a model's name, of settings, and of the state of the local files that they name.

    Files are those of the model's folder, of the base model's if it is an adapter, and of every path among the settings
    (a chat template, a folder of cases); their state is size and time of change.
    """
    paths = [model, *texts(settings)]
    with contextlib.suppress(OSError, ValueError):  # no adapter, or one that cannot be loaded
        paths.insert(1, base_model(model))
    states = [(path, *file_states(Path(path))) for path in dict.fromkeys(paths) if path and os.path.exists(path)]
    return hashlib.sha256(repr([model, *settings, *states]).encode()).hexdigest()[:12]


def file_states(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of a file, or of the files in a folder that responses depend on."""
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in SOURCES)
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


class Journal:
    """Values by key, in memory and appended to a file."""

    def __init__(self, file: Path | None) -> None:
        """Read the values of an earlier run; an incomplete last line is truncated.

        Args:
            file: one JSON object per line; None stores values in memory only.
        """
        self.file = file
        self.values: dict[str, Any] = {}
        if file is None or not file.exists():
            return
        content = file.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        with file.open("r+b") as out:
            out.truncate(len(complete))
        for row in map(json.loads, complete.splitlines()):
            self.values[row["key"]] = row["value"]

    def __contains__(self, key: str) -> bool:
        """Return whether a key has a value."""
        return key in self.values

    def add(self, key: str, value: Any) -> None:
        """Store a value."""
        self.values[key] = value
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "value": value}) + "\n")
