"""The demo's runner: it goes on where it was, and says what failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from recipes.demo import BASE, derive_recipe, plan
from recipes.probes import plan as probes
from recipes.steps import Step, run_all

ROOT = Path(__file__).parent.parent


def step(folder: Path, name: str, code: str, *needs: str) -> Step:
    return Step(name, (sys.executable, "-c", code), folder / f"{name}.txt", needs)


def write(path: Path, text: str = "x") -> str:
    return f"open({str(path)!r}, 'a').write({text!r})"


def test_steps_run_once_in_order_and_a_rerun_goes_on(tmp_path):
    one = step(tmp_path, "one", write(tmp_path / "one.txt"))
    two = step(tmp_path, "two", f"assert open({str(tmp_path / 'one.txt')!r}).read() == 'x'", "one")
    arguments = {"state_file": tmp_path / "state.json", "logs": tmp_path / "logs", "jobs": 2, "tell": lambda _: None}
    with pytest.raises(RuntimeError, match="two failed"):
        run_all([two, one], **arguments)  # succeeds, but makes nothing
    mended = step(tmp_path, "two", write(tmp_path / "two.txt"), "one")
    assert set(run_all([mended, one], **arguments)) == {"one", "two"}
    assert set(run_all([mended, one], **arguments)) == {"one", "two"}
    assert (tmp_path / "one.txt").read_text() == (tmp_path / "two.txt").read_text() == "x"


def test_a_failure_shows_the_end_of_its_output(tmp_path):
    bad = step(tmp_path, "bad", "raise SystemExit('no luck today')")
    with pytest.raises(RuntimeError, match=r"(?s)bad failed \(exit 1\).*no luck today"):
        run_all([bad], tmp_path / "state.json", tmp_path / "logs", 1, lambda _: None)


def test_other_seeds_change_data_and_training(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = Path("recipes/tiny_line_sealc.yml")
    original = yaml.safe_load(recipe.read_text())
    derived = yaml.safe_load(derive_recipe(recipe, 2, tmp_path / "out", tmp_path).read_text())
    assert derived.pop("seed") == original.pop("seed") + 2
    assert derived["seal"]["data"].pop("seed") == original["seal"]["data"].pop("seed") + 2
    assert derived["datasets"][0].pop("path") != original["datasets"][0].pop("path")
    assert derived.pop("output_dir") != original.pop("output_dir")
    assert derived == original


def test_the_plan_scores_merged_and_unmerged_models_of_every_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = {step.name: step for step in plan(BASE, "line", [0, 1], 4, tmp_path)}
    assert len(steps) == 1 + 3 * 4
    for method in ("sealh", "sealc"):
        for seed in (0, 1):
            tag = f"line_{method}_seed{seed}"
            assert {f"tune {tag}", f"merge {tag}"} <= steps.keys()
            command = steps[f"score {tag}"].command
            models = [command[place + 1] for place, part in enumerate(command) if part == "--model"]
            assert models == [str(tmp_path / tag), str(tmp_path / f"{tag}_merged")]
    assert "score line_base" in steps


def test_the_probes_are_in_an_order_in_which_they_can_be_done():
    steps = probes(4)
    for place, one in enumerate(steps):
        assert set(one.needs) <= {earlier.name for earlier in steps[:place]}
    assert len({one.makes for one in steps}) == len(steps)
    kinds = {one.name.partition("_")[0] for one in steps} - {"tiny"}
    known = {"heads", "channels", "gradient", "quadrants", "direct", "transfer", "sweep", "controls", "inspect"}
    assert kinds == known
