"""The whole path on a small model: score, tune, merge, score again, draw (``make demo``, ``make demo-all``).

Every step is the command a user would type.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_gen.files import load_json, write_text
from eval.journal import result_file, result_name
from recipes.matrix import recipe_name
from recipes.steps import ROOT, Step, launch, machine, run_steps

BASE = Path("recipes/tiny")
TASKS_BASE = Path("recipes/tiny_tasks")  # the same model, taught needles and variable tracking as well
# Test lengths of the demo and the study; the 100 tokens of answer that LongEval allows stay on the prompt's side of the
# trained window, since keys that were turned by one set of frequencies do not match queries turned by the other.
LENGTHS = (256, 512, 896, 1448, 1960)
TASK_LENGTHS = {"vt": LENGTHS[2:]}  # whose worked example alone has 500 tokens
METHODS = {"sealh": "SEAL-H", "sealc": "SEAL-C"}


def derive_recipe(recipe: Path, seed: int, output_dir: Path, folder: Path) -> Path:
    """The same recipe with another seed for data and training: the file itself is what is launched.

    Seed 0 is the recipe as it is, but for its ``output_dir``.
    """
    settings = yaml.safe_load(recipe.read_text())
    settings["seed"] += seed
    settings["seal"]["data"]["seed"] += seed
    if seed:
        path = Path(settings["datasets"][0]["path"])
        settings["datasets"][0]["path"] = str(path.with_stem(f"{path.stem}_seed{seed}"))
    settings["output_dir"] = str(output_dir)
    derived = folder / f"{recipe.stem}_seed{seed}.yml"
    write_text(derived, yaml.safe_dump(settings, sort_keys=False))
    return derived


def recipe_file(base: Path, task: str, method: str) -> Path:
    """The recipe of a small model, a task and a method."""
    return Path("recipes") / f"{recipe_name(base.name, task, method)}.yml"


def score_file(model: Path, task: str, work: Path) -> Path:
    """Where the scores of a model lie."""
    return result_file(work / "scores", task, result_name(str(model)))


def plan(base: Path, task: str, seeds: list[int], samples: int, work: Path) -> list[Step]:
    """All steps of one task, in an order in which they can be done."""
    python = sys.executable

    def score(name: str, models: list[Path], needs: tuple[str, ...] = ()) -> Step:
        lengths = ",".join(map(str, TASK_LENGTHS.get(task, LENGTHS)))
        named = [part for model in models for part in ("--model", str(model))]
        command = (python, "-m", "eval", "run", *named, "--task", task, "--lengths", lengths,
                   "--samples", str(samples), "--batch-size", "10", "--out", str(work / "scores"))  # fmt: skip
        return Step(f"score {name}", command, score_file(models[-1], task, work), needs)

    steps = [score(f"{task}_base", [base])]
    for seed in seeds:
        for method in METHODS:
            name = f"{task}_{method}_seed{seed}"
            adapter, merged = work / name, work / f"{name}_merged"
            recipe = derive_recipe(recipe_file(base, task, method), seed, adapter, work / "recipes")
            steps.append(launch(f"tune {name}", recipe, adapter))
            fold = (python, "-m", "axolotl_plugins.seal", "merge", str(adapter), str(merged))
            steps.append(Step(f"merge {name}", fold, merged, (f"tune {name}",)))
            steps.append(score(name, [adapter, merged], (f"merge {name}",)))
    return steps


def collect(base: Path, task: str, seeds: list[int], seconds: dict[str, float], work: Path) -> dict[str, Any]:
    """Gather the scores of a task's steps into an entry of ``results/demo.json``.

    Raises:
        RuntimeError: a merged model answered anything otherwise than the unmerged one.
    """
    from safetensors.torch import load_file

    def scores(model: Path) -> Any:
        return load_json(score_file(model, task, work))

    untuned = scores(base)["scores"]
    result: dict[str, Any] = {
        "task": task,
        "base_model": str(base),
        "samples_per_length": untuned[0]["count"],
        "lengths_tokens": [score["tokens"] for score in untuned],
        "seeds": seeds,
        "trainable_parameters": {},
        "accuracy": {"base": [[score["score"] for score in untuned]]},
        "scales": {},
    }
    for method, title in METHODS.items():
        runs = []
        for seed in seeds:
            name = f"{task}_{method}_seed{seed}"
            unmerged, merged = scores(work / name), scores(work / f"{name}_merged")
            ours, theirs = ([row["response"] for row in run["responses"]] for run in (unmerged, merged))
            if different := sum(a != b for a, b in zip(ours, theirs, strict=True)):
                raise RuntimeError(f"{name}: merged and unmerged differ in {different} of {len(ours)} answers")
            runs.append([score["score"] for score in merged["scores"]])
        adapter = work / f"{task}_{method}_seed{seeds[0]}"
        weights = load_file(adapter / "adapter_model.safetensors")
        heads = load_json(adapter / "adapter_config.json")["num_heads"]
        result["trainable_parameters"][title] = sum(tensor.numel() for tensor in weights.values())
        result["accuracy"][title] = runs
        result["scales"][title] = [tensor.view(heads, -1).mean(1).tolist() for _, tensor in sorted(weights.items())]
    result["merged_equals_unmerged"] = True
    result["machine"] = machine()
    result["seconds"] = {name: taken for name, taken in seconds.items() if name.split()[1].startswith(f"{task}_")}
    return result


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """For each task accuracy by length, and the scales that were learned (seed by seed means over channels)."""
    import matplotlib.pyplot as plt

    from eval.plot import save_figure

    size = (14, 4.2 * len(results))
    figure, rows = plt.subplots(
        len(results), 3, figsize=size, width_ratios=(1.5, 1, 1), layout="constrained", squeeze=False
    )
    for row, result in zip(rows, results, strict=True):
        draw_task(figure, row, result)
    save_figure(figure, out)


def draw_task(figure: Any, panels: Any, result: dict[str, Any]) -> None:
    """One task's three panels."""
    import numpy as np

    from eval.plot import draw_accuracy, draw_scales
    from eval.score import wilson
    from recipes.matrix import TASKS

    left, middle, right = panels
    count = result["samples_per_length"]
    runs = [
        {
            "method": method,
            "scores": [
                {
                    "tokens": tokens,
                    "score": accuracy,
                    **dict(zip(("low", "high"), wilson(accuracy, count), strict=True)),
                }
                for tokens, accuracy in zip(result["lengths_tokens"], row, strict=True)
            ],
        }
        for method, rows in result["accuracy"].items()
        for row in rows
    ]
    draw_accuracy(left, runs)
    left.set_title(f"{TASKS[result['task']]}: {count} test samples per length, tunings: {len(result['seeds'])}")
    for axes, method in ((middle, "SEAL-H"), (right, "SEAL-C")):
        what = "scales" if method == "SEAL-H" else "scales, mean of each head"
        number = result["trainable_parameters"][method]
        draw_scales(figure, axes, np.array(result["scales"][method]), f"{method}: {number} {what}")


def print_table(result: dict[str, Any]) -> None:
    """Mean accuracy over seeds, and their range, by length."""
    from rich.console import Console
    from rich.table import Table

    from recipes.matrix import TASKS

    table = Table(title=f"{TASKS[result['task']]}: score, mean over seeds {result['seeds']}, and range")
    table.add_column("tokens:")
    table.add_column("scales", justify="right")
    for tokens in result["lengths_tokens"]:
        table.add_column(f"{tokens:.0f}", justify="right")
    for method, runs in result["accuracy"].items():
        cells = []
        for values in zip(*runs, strict=True):
            spread = f"\n{min(values):.2f}-{max(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}")
        table.add_row(method, str(result["trainable_parameters"].get(method, "-")), *cells)
    Console().print(table)


def fingerprint(*parts: object, bases: Sequence[Path] = (BASE,), recipes: Sequence[Path] = ()) -> str:
    """Changes with base models, with recipes and with what else is given: results of others are not reused.

    Raises:
        OSError: there is no such base or recipe.
    """
    digest = hashlib.sha256(repr(parts).encode())
    for path in [*(file for base in bases for file in sorted(base.iterdir())), *recipes]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, choices=(BASE, TASKS_BASE), default=BASE, help="the small model")
    parser.add_argument("--tasks", nargs="+", choices=("line", "niah", "vt"), default=["line"], help="that it knows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one tuning of each kind per seed")
    parser.add_argument("--samples", type=int, default=100, help="test samples per length")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="steps run side by side")
    parser.add_argument("--out", type=Path, default=Path("results/demo.json"))
    args = parser.parse_args()
    if min(args.samples, args.jobs) < 1:
        sys.exit(f"demo: found {args.samples} samples and {args.jobs} jobs, expected at least 1 of each")
    args.tasks, args.seeds = list(dict.fromkeys(args.tasks)), list(dict.fromkeys(args.seeds))
    os.chdir(ROOT)
    start = time.time()
    recipes = [recipe_file(args.base, task, method) for task in args.tasks for method in METHODS]
    try:
        found = fingerprint(args.tasks, args.seeds, args.samples, LENGTHS, bases=[args.base], recipes=recipes)
        work = Path("outputs/demo") / found
        steps = [step for task in args.tasks for step in plan(args.base, task, args.seeds, args.samples, work)]
        seconds = run_steps("demo", steps, work, args.jobs)
        results = [collect(args.base, task, args.seeds, seconds, work) for task in args.tasks]
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; the same command goes on from here")
    draw(results, args.out.with_suffix(".png"))
    write_text(args.out, json.dumps(results, indent=1) + "\n")
    for result in results:
        print_table(result)
    print(f"{args.out} and {args.out.with_suffix('.png')}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
