"""All probes on the small model: ``make probes``. Results and pictures go to results/probes, and into the report.

Every step is the command a user would type.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from recipes.demo import BASE, LENGTHS, METHODS, TASK_LENGTHS, TASKS_BASE, fingerprint, recipe_file
from recipes.steps import ROOT, Step, launch, run_steps

OUT = Path("results/probes")
MIDDLE, LONG = 1200, 1960
RAISED_AND_LOWERED = "L1H3,L0H3"  # the heads that SEAL-H moves most
SCORED_AT = ",".join(map(str, LENGTHS))
# Needles are not among what is transferred: their base scores 1 at all lengths, and equation 2 divides by its range.
TRANSFERRED = ("line", "vt")
TRANSFERRED_AT = ",".join(map(str, TASK_LENGTHS["vt"]))


def tunings() -> list[Step]:
    """Adapters that probes look at, each where its recipe puts it."""
    wanted = [(BASE, "line"), *((TASKS_BASE, task) for task in (*TRANSFERRED, "multi"))]
    recipes = [recipe_file(base, task, method) for base, task in wanted for method in METHODS]
    return [launch(recipe.stem, recipe, Path("outputs") / recipe.stem) for recipe in recipes]


def plan(samples: int) -> list[Step]:
    """All steps, in an order in which they can be done."""

    def probe(name: str, *options: str, needs: tuple[str, ...] = ()) -> Step:
        command, _, _ = name.partition("_")
        out = OUT / f"{name}.json"
        return Step(name, (sys.executable, "-m", "eval", "probe", command, *options, "--out", str(out)), out, needs)

    model = ("--model", str(BASE))
    some, fewer = ("--samples", str(samples)), str(max(1, samples // 2))
    lengths, batch = ("--lengths", f"{MIDDLE},{LONG}"), ("--batch-size", "10")
    heads = str(OUT / "heads.json")
    transferred = {
        f"{title} {task}": recipe_file(TASKS_BASE, task, method).stem
        for method, title in METHODS.items()
        for task in (*TRANSFERRED, "multi")
    }
    named = [part for title, name in transferred.items() for part in ("--adapter", f"{title}=outputs/{name}")]
    # The longest first, so that no core waits for the last one.
    steps = [
        *tunings(),
        probe("heads", *model, *lengths, *some),
        probe("sweep", "--recipe", "recipes/tiny_line_sealh.yml", *lengths, "--rates", "0.005,0.01,0.02,0.05",
              "--samples", "10,25,50", "--validation", fewer, *batch),
        probe("transfer", "--model", str(TASKS_BASE), *named, "--tasks", ",".join(TRANSFERRED), "--lengths",
              TRANSFERRED_AT, "--samples", fewer, *batch, needs=tuple(transferred.values())),
    ]  # fmt: skip
    for method in METHODS:
        line = recipe_file(BASE, "line", method).stem
        steps += [
            probe(f"controls_{method}", "--recipe", f"recipes/{line}.yml", *lengths, "--validation", fewer, *batch),
            probe(f"inspect_{method}", "--adapter", f"outputs/{line}", "--map", heads, needs=("heads", line)),
        ]  # fmt: skip
    lines = [recipe_file(BASE, "line", method).stem for method in METHODS]
    both = [part for name in lines for part in ("--adapter", f"outputs/{name}")]
    steps += [
        probe("quadrants", *model, "--from", heads, "--lengths", SCORED_AT, *some, *batch, needs=("heads",)),
        probe("channels", *model, "--heads", RAISED_AND_LOWERED, "--lengths", str(LONG), "--samples",
              str(max(1, samples // 5))),
        probe("gradient", *model, *lengths, *some, "--compare", heads, needs=("heads",)),
        probe("direct", *model, *both, "--length", str(LONG), needs=tuple(lines)),
    ]  # fmt: skip
    return steps


def main() -> None:
    """Run all probes from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50, help="per length")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="steps run side by side")
    args = parser.parse_args()
    os.chdir(ROOT)
    start = time.time()
    try:
        recipes = [Path(step.command[-1]) for step in tunings()]
        work = Path("outputs/probes") / fingerprint(args.samples, bases=[BASE, TASKS_BASE], recipes=recipes)
        run_steps("probes", plan(args.samples), work, args.jobs)
    except (RuntimeError, OSError) as error:
        sys.exit(f"probes: {error}")
    except KeyboardInterrupt:
        sys.exit("probes: interrupted; the same command goes on from here")
    print(f"{OUT}: {time.time() - start:.0f} s; `make report` shows the pictures with what they say")


if __name__ == "__main__":
    main()
