"""All probes on the small model: ``make probes``. Results and pictures go to results/probes, and into the report.

Every step is the command a user would type.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from recipes.demo import BASE, LENGTHS, METHODS, fingerprint, recipe_file
from recipes.steps import ROOT, Step, launch, run_steps

OUT = Path("results/probes")
MIDDLE, LONG = 1200, 1960
RAISED_AND_LOWERED = "L1H3,L0H3"  # the heads that SEAL-H moves most
TUNED_FOR = ("line", "niah", "multi")
# The small model's own tasks and lengths: the paper's are in `python -m eval probe transfer --help`.
SCORED_ON = "line,niah"
SCORED_AT = ",".join(map(str, LENGTHS))


def plan(samples: int) -> list[Step]:
    """All steps, in an order in which they can be done."""

    def probe(name: str, *options: str, needs: tuple[str, ...] = ()) -> Step:
        command, _, _ = name.partition("_")
        out = OUT / f"{name}.json"
        return Step(name, (sys.executable, "-m", "eval", "probe", command, *options, "--out", str(out)), out, needs)

    model = ("--model", str(BASE))
    some, lengths = ("--samples", str(samples)), ("--lengths", f"{MIDDLE},{LONG}")
    heads = str(OUT / "heads.json")
    adapter = {(task, method): Path(f"outputs/tiny_{task}_{method}") for task in TUNED_FOR for method in METHODS}
    steps = [
        launch(f"tune {task} {method}", recipe_file(BASE, task, method), folder)
        for (task, method), folder in adapter.items()
    ]
    tuned = tuple(step.name for step in steps)
    # The longest first, so that no core waits for the last one.
    steps += [
        probe("heads", *model, *lengths, *some),
        probe("sweep", "--recipe", "recipes/tiny_line_sealh.yml", "--lengths", f"{MIDDLE},{LONG}", "--rates",
              "0.005,0.01,0.02,0.05", "--samples", "10,25,50", "--validation", str(samples), "--batch-size", "10"),
    ]  # fmt: skip
    for method in ("sealh", "sealc"):
        named = [part for task in TUNED_FOR for part in ("--adapter", f"{task}={adapter[task, method]}")]
        steps.append(
            probe(f"transfer_{method}", *model, *named, "--tasks", SCORED_ON, "--lengths", SCORED_AT, *some,
                  "--batch-size", "10", needs=tuned)
        )  # fmt: skip
        steps.append(
            probe(f"inspect_{method}", "--adapter", str(adapter["line", method]), "--map", heads,
                  needs=("heads", f"tune line {method}"))
        )  # fmt: skip
        steps.append(
            probe(f"controls_{method}", "--recipe", f"recipes/tiny_line_{method}.yml", *lengths, "--validation",
                  str(max(1, samples // 2)), "--batch-size", "10")
        )  # fmt: skip
    both = [part for method in ("sealh", "sealc") for part in ("--adapter", str(adapter["line", method]))]
    steps += [
        probe("gradient", *model, *lengths, *some, "--compare", heads, needs=("heads",)),
        probe("quadrants", *model, "--from", heads, "--lengths", SCORED_AT, *some, "--batch-size", "10",
              needs=("heads",)),
        probe("channels", *model, "--heads", RAISED_AND_LOWERED, "--lengths", str(LONG), "--samples",
              str(max(1, samples // 5))),
        probe("direct", *model, *both, "--length", str(LONG), needs=tuned),
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
        recipes = [recipe_file(BASE, task, method) for task in TUNED_FOR for method in METHODS]
        work = Path("outputs/probes") / fingerprint(args.samples, recipes=recipes)
        run_steps("probes", plan(args.samples), work, args.jobs)
    except (RuntimeError, OSError) as error:
        sys.exit(f"probes: {error}")
    except KeyboardInterrupt:
        sys.exit("probes: interrupted; the same command goes on from here")
    print(f"{OUT}: {time.time() - start:.0f} s; `make report` shows the pictures with what they say")


if __name__ == "__main__":
    main()
