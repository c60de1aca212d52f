"""Read JSON, YAML and JSON lines; write files atomically."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axolotl_plugins.common.console import first_line, in_rust

LARGEST_JSON = 1 << 28  # bytes; a hundred times the results of long runs


def check_output(path: Path, *, folder: bool = False, new: bool = False) -> None:
    """Check that a file, a ``new`` file or a new folder can be written, before its content is computed.

    Raises:
        ValueError: it cannot; the message names the obstacle.
    """
    if path.is_dir() and not folder:
        raise ValueError(f"{path}: is a folder, expected the name of a file to write")
    if (folder or new) and path.exists():
        raise ValueError(f"{path}: exists already: name another {'folder' if folder else 'file'} or remove it")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{path}: cannot be written, for {existing} is a file: name another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written, for {existing} is not writable: name another path")


def check_file(path: Path) -> None:
    """Raise ValueError unless a file exists; the message names the existing file with the nearest name."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file")
    if not path.exists():
        files = [file.name for file in path.parent.iterdir() if file.is_file()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, files, n=1)
        where = f"is {path.parent / close[0]} meant?" if close else f"there is none like it in {path.parent}"
        raise ValueError(f"{path}: no such file; {where}")


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def running(process: int) -> bool:
    """Return whether a process runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to ``path`` on success and removed on failure.

    Temporary files that a killed process left are removed as well.

    Raises:
        OSError: writing failed; the error names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start, end = f".{path.name}.pid", ".partial"
    for old in path.parent.iterdir():
        if old.name.startswith(start) and old.name.endswith(end):
            process = old.name[len(start) : -len(end)]
            if process.isdecimal() and not running(int(process)):
                remove(old)
    partial = path.with_name(f"{start}{os.getpid()}{end}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.filename2 is None):  # two: of a copy
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write names no file
    except Exception as error:
        if not in_rust(error):
            raise
        raise OSError(f"{path}: {first_line(error)}") from error
    finally:
        remove(partial)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON, or larger than ``LARGEST_JSON``.
    """
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path}: has {size} bytes, expected at most {LARGEST_JSON}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({first_line(error)}): mend it or move it away") from None


def load_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """Read a YAML file that holds a mapping; ``what`` names it in error messages.

    Raises:
        ValueError: it is not YAML, or holds no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a {what}: found {type(content).__name__}, expected settings and their values")
    return content


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers, from 1, and rows of a JSON lines file; skip empty lines.

    Raises:
        ValueError: a line is not a JSON object, or the file is not UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    try:
                        row = json.loads(text.strip())
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise ValueError(
                            f"{path}, line {number}: not JSON ({first_line(error)}): mend or remove it"
                        ) from None
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}, line {number}: found {text.strip()[:40]!r}, expected a JSON object")
                    yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({first_line(error)}): convert it") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with written_whole(path) as partial:
        partial.write_text(text)
