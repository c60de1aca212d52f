"""Gather the wheels that a GPU machine without a network needs (``make wheelhouse``).

They are the packages of requirements.lock and this project, without PyTorch and what comes with it, in folders of a
bounded size that can be copied one at a time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from axolotl_plugins.common.console import run

ROOT = Path(__file__).parents[2]
ON_THE_MACHINE = re.compile(r"(torch|triton|nvidia-(?!ml-py).*|cuda-.*)==")  # its own, built for its driver
# Wheels for Linux on x86-64 of every glibc that a current distribution has.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
PROJECT = {"LICENSE", "README.md", "pyproject.toml", "axolotl_plugins", "data_gen", "eval", "recipes"}


def pins(lock: str) -> list[str]:
    """Return the lines ``name==version`` of a lock, without what the machine has."""
    lines = [line.strip() for line in lock.splitlines()]
    return [line for line in lines if "==" in line and not line.startswith("#") and not ON_THE_MACHINE.match(line)]


def download_options(python: str, folder: Path, requirements: Path) -> list[str]:
    """Return the command of pip that downloads each pin as a wheel for another Python, or its source if it has none."""
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    return ["download", "--quiet", "--no-deps", "--python-version", python, "--implementation", "cp", "--abi",
            f"cp{python.replace('.', '')}", "--abi", "abi3", "--abi", "none", *platforms, "--dest", str(folder),
            "--requirement", str(requirements)]  # fmt: skip


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Distribute files over parts of at most ``limit`` bytes, the largest first, each into the first with room.

    Raises:
        ValueError: a file alone is larger.
    """
    parts: list[list[str]] = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if size > limit:
            raise ValueError(f"part: {name} has {size / 2**20:.0f} MiB: ask for parts of at least as many")
        with_room = (part for part in parts if sum(sizes[other] for other in part) + size <= limit)
        part = next(with_room, None)
        if part is None:
            parts.append(part := [])
        part.append(name)
    return parts


def gather(python: str, out: Path, part_mib: int, lock: Path = ROOT / "requirements.lock") -> list[Path]:
    """Write the folders of wheels, and return them.

    Args:
        python: version of the GPU machine's Python, such as ``3.12``.
        out: folder to write.
        part_mib: size of a part at most.
        lock: pins, one a line.

    Raises:
        ValueError: ``out`` is not empty, pip fails, a package is neither pure Python nor has a wheel, or a wheel is
            larger than a part.
    """
    if not re.fullmatch(r"3\.\d+", python):
        raise ValueError(f"python: found {python!r}, expected a version such as 3.12")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out: {out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as work:
        folder, requirements = Path(work) / "wheels", Path(work) / "pins"
        requirements.write_text("\n".join(pins(lock.read_text())) + "\n")
        run_pip(*download_options(python, folder, requirements))
        sources = [file for file in folder.iterdir() if file.suffix != ".whl"]
        project = Path(work) / "project"  # a copy, because setuptools writes beside the sources
        shutil.copytree(ROOT, project, ignore=lambda folder, names: set(names) - PROJECT if folder == str(ROOT) else ())
        run_pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *map(str, sources), str(project))
        for source in sources:
            source.unlink()
        wheels = {file.name: file.stat().st_size for file in folder.iterdir()}
        tag = f"cp{python.replace('.', '')}-"
        if wrong := [name for name in wheels if f"-{tag}" not in name and "-py" not in name and "-abi3-" not in name]:
            raise ValueError(f"{wrong[0]}: was built for this Python, not for {python}: run with PYTHON={python}")
        parts = []
        for number, names in enumerate(split(wheels, part_mib * 2**20), 1):
            parts.append(out / f"part{number}")
            parts[-1].mkdir()
            for name in names:
                (folder / name).rename(parts[-1] / name)
    return parts


def run_pip(*arguments: str) -> None:
    """Run a command of pip, with the user's own settings.

    Raises:
        ValueError: it fails; the message is its last error.
    """
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        raise ValueError(next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]))


app = typer.Typer(add_completion=False)


@app.command(epilog="Example: make wheelhouse PYTHON_VERSION=3.12 OUT=wheels PART=500")
def main(
    python: Annotated[str, typer.Option(help="Version of the GPU machine's Python.")] = f"3.{sys.version_info[1]}",
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("wheels"),
    part: Annotated[int, typer.Option(help="MiB of a part, at most.")] = 500,
) -> None:
    """Gather the wheels that a GPU machine without a network needs."""
    for folder in gather(python, out, part):
        sizes = [file.stat().st_size for file in folder.iterdir()]
        print(f"{folder}: {len(sizes)} wheels, {sum(sizes) / 2**20:.0f} MiB")
    print(f"on the GPU machine: pip install --no-index --no-deps {out}/part*/*.whl")


if __name__ == "__main__":
    run(app, "python -m recipes.tools.wheelhouse")
