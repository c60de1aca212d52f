"""Axolotl's own command on a short recipe, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from paths import TINY, TINY_SEALC

STEPS = 4


def run(folder: Path, *command: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, input=stdin, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the recipe's header says: accelerate launch -m axolotl.cli.train recipe.yml."""
    return run(folder, "accelerate.commands.launch", "-m", "axolotl.cli.train", "recipe.yml", *arguments)


def write_recipe(folder: Path, **changes: object) -> dict:
    """The shipped SEAL-C recipe, made short."""
    recipe = yaml.safe_load(TINY_SEALC.read_text())
    recipe |= {"base_model": str(TINY), "sequence_len": 512, "max_steps": STEPS, "output_dir": "out"}
    recipe["seal"]["data"] |= {"tokens": "300:500", "samples": 8}
    recipe |= changes
    (folder / "recipe.yml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    return recipe


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that the plugin says."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("seal: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0]
