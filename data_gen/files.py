"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path, *, folder: bool = False) -> None:
    """See that a file, or a new folder, can be written, before time is spent on what is to be in it.

    Raises:
        ValueError: it cannot; the message names what is in the way.
    """
    if folder and path.exists():
        raise ValueError(f"{path}: exists already: name another folder or remove it")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected the name of a file to write")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path}: cannot be written, for {above} is a file: name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written, for {above} is read-only: name another place")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside ``path`` to write; it takes the name of ``path`` if all went well, else it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text)
