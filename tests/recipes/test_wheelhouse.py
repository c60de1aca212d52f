"""Wheels for a GPU machine without a network."""

from __future__ import annotations

import subprocess
from itertools import pairwise

import pytest
from paths import ROOT

from recipes.tools.wheelhouse import download_options, gather, pins, split


def test_pins_are_the_locks_without_pytorch_and_cuda():
    lock = (ROOT / "requirements.lock").read_text()
    kept, all_lines = pins(lock), [line for line in lock.splitlines() if "==" in line]
    assert set(all_lines) - set(kept) == {line for line in all_lines if line.startswith(("torch==", "triton=="))}
    assert any(line.startswith("axolotl==") for line in kept) and any(line.startswith("liger_kernel") for line in kept)
    assert pins("# a==1\nnvidia-cublas==13.1\nnvidia-ml-py==12.5\ncuda-bindings==13\ntorchao==0.17") == [
        "nvidia-ml-py==12.5", "torchao==0.17"
    ]  # fmt: skip


def test_wheels_are_those_of_the_other_machines_python(tmp_path):
    command = download_options("3.12", tmp_path / "wheels", tmp_path / "pins")
    options = set(pairwise(command))
    assert command[0] == "download" and "--no-deps" in command
    assert {("--python-version", "3.12"), ("--abi", "cp312"), ("--abi", "abi3"), ("--abi", "none")} <= options
    assert ("--platform", "manylinux2014_x86_64") in options and ("--platform", "manylinux_2_28_x86_64") in options


def test_parts_hold_every_wheel_and_are_no_larger_than_asked_for():
    sizes = {f"{n}.whl": n for n in range(1, 40)}
    parts = split(sizes, 50)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    assert all(sum(sizes[name] for name in part) <= 50 for part in parts) and len(parts) < 20
    with pytest.raises(ValueError, match="part: 39"):
        split(sizes, 38)


def test_what_cannot_be_gathered_is_refused_before_anything_is_downloaded(tmp_path):
    with pytest.raises(ValueError, match="python: found '3', expected a version"):
        gather("3", tmp_path / "wheels", 500)
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        gather("3.12", tmp_path, 500)


def test_make_passes_its_variables(tmp_path):
    command = ["make", "-n", "-o", ".venv/.installed", "wheelhouse", "PYTHON_VERSION=3.10", "PART=64"]
    for options, out in (([], "wheels"), (["OUT=elsewhere"], "elsewhere")):
        shown = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"-m recipes.tools.wheelhouse --python 3.10 --out {out} --part 64" in shown


@pytest.mark.slow
def test_a_wheel_and_a_source_become_wheels(tmp_path):
    """From the package index, which must be in reach."""
    (tmp_path / "lock").write_text("torch==2.13.0\nclick==8.2.1\nrouge-score==0.1.2\npyyaml==6.0.2\n")
    parts = gather("3.12", tmp_path / "wheels", 1, tmp_path / "lock")
    names = sorted(file.name.split("-")[0].lower() for part in parts for file in part.iterdir())
    assert names == ["click", "pyyaml", "rouge_score", "seal_recipes"]
    assert "cp312" in next(file.name for part in parts for file in part.iterdir() if "yaml" in file.name.lower())
