"""The effect in depth on the small model: all methods, controls, rates, seeds and kinds of base (``make study``).

Every cell of the study is one base, tuned one way and scored; its result is a file, so that a study goes on where it
was interrupted. Rates are chosen on validation samples of the training split, never on test samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.progress import Progress, track

from data_gen.console import quiet_libraries
from data_gen.files import write_text, written_whole
from recipes.demo import BASE, LENGTHS, TASK_LENGTHS, TASKS_BASE, fingerprint
from recipes.matrix import peft_config
from recipes.steps import ROOT
from recipes.tiny_model import ROPE_THETA, ntk_theta

# Kinds of base: the shipped one, its weights with its window made long in another way, and the shipped model that knows
# other tasks as well. Of these, ``FINE_TUNED`` are trained on here, as LongChat was.
BASES: dict[str, dict[str, Any] | Path] = {
    "longrope": BASE,
    "beyond its window": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "ntk": {"rope_type": "default", "rope_theta": ntk_theta(ROPE_THETA, 8.0, 32)},
    "self-extend": {"rope_type": "self_extend", "rope_theta": ROPE_THETA, "group_size": 6, "neighbor_window": 128},
    "longchat-like": {"rope_type": "linear", "rope_theta": ROPE_THETA, "factor": 4.0},
    "three tasks": TASKS_BASE,
}
# A second task shows what tuning on lines does to it, as MMLU does in section 5.2 of the paper.
SCORED = {"longrope": ("line", "niah"), "three tasks": ("line", "niah", "vt")}
FINE_TUNED = ("longchat-like",)
VALIDATION = LENGTHS[2:]
TRAIN_TOKENS = "256:1960"
SHOT_TOKENS = 256
SAMPLES = {"line": 200, "niah": 50, "vt": 200}  # per length; needles go through ten depths
RATES = {
    "SEAL-H": (5e-3, 1e-2, 2e-2, 5e-2),
    "SEAL-C": (5e-3, 1e-2, 2e-2, 5e-2),
    "SEAL-L": (2e-4, 1e-3, 5e-3),
    "SEAL-D": (2e-4, 1e-3, 5e-3),
}
# What Figure 6 shows of windows that were stretched; everything else is asked of the shipped base alone.
STRETCHED_METHODS = ("base", "SEAL-H", "SEAL-C")
CONTROLS = {"shuffled H": "SEAL-H", "shuffled C": "SEAL-C", "wrong answers H": "SEAL-H", "wrong answers C": "SEAL-C"}


@dataclass(frozen=True)
class Cell:
    """One model and how it is scored.

    Attributes:
        base: a name in ``BASES``.
        method: ``base``, ``one-shot``, a method in ``RATES`` or a control in ``CONTROLS``.
        rate: learning rate; 0 where nothing is tuned.
        seed: of data and order of tuning.
        task: what is scored.
        samples: per length.
        validation: scored on samples of the training split under another seed.
    """

    base: str
    method: str
    rate: float = 0.0
    seed: int = 0
    task: str = "line"
    samples: int = 200
    validation: bool = False

    @property
    def file(self) -> Path:
        """Where the result lies."""
        name = "_".join(str(value).replace(" ", "-") for value in asdict(self).values())
        return work(self.base) / "cells" / f"{name}.json"


@cache
def work(name: str) -> Path:
    """Where results of a kind of base are kept: with the model that it is, or is made of."""
    rope = BASES[name]
    return Path("outputs/study") / fingerprint(bases=[rope if isinstance(rope, Path) else BASE])


def base_folder(name: str) -> Path:
    """The folder of a kind of base, which is made of the shipped model when it is missing."""
    rope = BASES[name]
    if isinstance(rope, Path):
        return rope
    folder = work(name) / "bases" / name
    if not folder.exists():
        with written_whole(folder) as partial:
            shutil.copytree(BASE, partial)
            config = json.loads((BASE / "config.json").read_text()) | {"rope_parameters": rope}
            write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
            if name in FINE_TUNED:
                fine_tune(partial)
    return folder


def fine_tune(folder: Path, *, steps: int = 120, lines: int = 5, lr: float = 1e-3, tokens: int = 4096) -> None:
    """Train a model on short records at a constant rate, so that what it finds in long ones is left to luck.

    Args:
        folder: of the model, changed in place.
        steps: of training.
        lines: longest record.
        lr: after 20 steps.
        tokens: per batch.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from recipes.tiny_model import Records, curriculum, descend, optimizer_of

    torch.set_num_threads(1)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    records, stage, optimizer = Records(tokenizer, 1), curriculum(lines)[-1], optimizer_of(model)
    for step in track(range(steps), "fine-tuning"):
        ids, weights = records.batch(stage, tokens)
        descend(model, optimizer, lr * min(1.0, (step + 1) / 20), ids, weights, records.choices(stage, ids))
    model.save_pretrained(folder)


def run_cell(cell: Cell) -> dict[str, Any]:
    """Tune and score one cell, or read its result."""
    if cell.file.exists():
        return json.loads(cell.file.read_text())
    import torch

    from axolotl_plugins.seal.load import load, with_adapter
    from axolotl_plugins.seal.tune import tune
    from data_gen.generate import Request
    from eval.probe.maps import PROBE_SEED
    from eval.probe.tuning import shuffle_heads, training_data, wrong_answers
    from eval.run import run

    loaded = load(base_folder(cell.base))
    method = CONTROLS.get(cell.method, cell.method)
    losses: list[float] = []
    if method in RATES:
        torch.manual_seed(cell.seed)  # of LoRA's initial weights
        loaded = with_adapter(loaded, peft_config(method.replace("-", "").lower()))
        chats, _ = training_data(Request("line", TRAIN_TOKENS), loaded.tokenizer, 50, cell.seed)
        if cell.method.startswith("wrong"):
            chats = wrong_answers(chats, random.Random(cell.seed))
        losses = tune(loaded.model, chats, loaded.tokenizer, lr=cell.rate, seed=cell.seed)
        if cell.method.startswith("shuffled"):
            shuffle_heads(loaded.model, random.Random(cell.seed))
    lengths = list(VALIDATION if cell.validation else TASK_LENGTHS.get(cell.task, LENGTHS))
    shots = int(cell.method == "one-shot")
    if shots:  # the longest records leave room for the example, as in the paper's Table 3
        lengths = [min(length, max(LENGTHS) - SHOT_TOKENS) for length in lengths]
    result = run(
        loaded, cell.task, lengths=lengths, samples=cell.samples, batch_size=10, shots=shots, shot_tokens=SHOT_TOKENS,
        split="train" if cell.validation else "test", seed=PROBE_SEED if cell.validation else 0,
    )  # fmt: skip
    trainable = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    found = {
        **asdict(cell),
        "parameters": trainable if method in RATES else 0,
        "losses": [round(loss, 4) for loss in losses],
        "scores": [{key: score[key] for key in ("length", "tokens", "count", "score")} for score in result["scores"]],
    }
    write_text(cell.file, json.dumps(found, indent=1) + "\n")
    return found


def start() -> None:
    """What every worker does first."""
    quiet_libraries()
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def run_all(cells: list[Cell], jobs: int) -> dict[Cell, dict[str, Any]]:
    """Results of all cells, ``jobs`` at a time."""
    results = {}
    with ProcessPoolExecutor(jobs, initializer=start) as pool, Progress() as progress:
        bar = progress.add_task("cells", total=len(cells))
        futures = {pool.submit(run_cell, cell): cell for cell in cells}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            progress.advance(bar)
    return results


def mean(result: dict[str, Any]) -> float:
    """Mean over lengths."""
    return sum(score["score"] for score in result["scores"]) / len(result["scores"])


def methods_of(base: str) -> tuple[str, ...]:
    """What is compared on a kind of base."""
    return ("base", "one-shot", *RATES, *CONTROLS) if base == "longrope" else STRETCHED_METHODS


def choose_rates(bases: list[str], jobs: int) -> dict[tuple[str, str], float]:
    """The rate of every base and method with the best mean on validation samples; of equals the smallest."""
    cells = [
        Cell(base, method, rate, samples=40, validation=True)
        for base in bases for method, rates in RATES.items() if method in methods_of(base) for rate in rates
    ]  # fmt: skip
    results = run_all(cells, jobs)
    chosen = {}
    for base in bases:
        for method in set(RATES) & set(methods_of(base)):
            mine = [cell for cell in cells if (cell.base, cell.method) == (base, method)]
            chosen[base, method] = max(mine, key=lambda cell: (mean(results[cell]), -cell.rate)).rate
    return chosen


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("results/study.json"))
    args = parser.parse_args()
    os.chdir(ROOT)
    try:
        study(args.bases, list(dict.fromkeys(args.seeds)), args.jobs, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("study: interrupted; the same command goes on from here")


def study(bases: list[str], seeds: list[int], jobs: int, out: Path) -> None:
    """Choose rates, run every cell, write results and picture, and print tables."""
    for base in bases:
        base_folder(base)
    rates = choose_rates(bases, jobs)
    cells = []
    for base in bases:
        for method in methods_of(base):
            tuned = CONTROLS.get(method, method)
            tasks = SCORED.get(base, ("line",)) if method in ("base", *RATES) else ("line",)
            tried = seeds if tuned in RATES else [0]
            cells += [
                Cell(base, method, rates.get((base, tuned), 0.0), seed, task, SAMPLES[task])
                for task in tasks
                for seed in tried
            ]
    results = run_all(cells, jobs)
    write_text(out, json.dumps({"cells": [results[cell] for cell in cells]}, indent=1) + "\n")
    draw([results[cell] for cell in cells], bases, out.with_suffix(".png"))
    for base in bases:
        print(table(base, [results[cell] for cell in cells if cell.base == base]))


def draw(cells: list[dict[str, Any]], bases: list[str], out: Path) -> None:
    """Accuracy by length on every kind of base, the shape of Figures 1, 2c and 6: one panel each."""
    import matplotlib.pyplot as plt

    from eval.plot import draw_accuracy, save_figure
    from eval.score import wilson

    def with_interval(score: dict[str, Any]) -> dict[str, Any]:
        return score | dict(zip(("low", "high"), wilson(score["score"], score["count"]), strict=True))

    columns = min(3, len(bases))
    rows = -(-len(bases) // columns)
    size = (0.6 + 3.8 * columns, 4 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels.flat[len(bases) :]:
        axes.set_axis_off()
    for axes, base in zip(panels.flat, bases, strict=False):
        runs = [
            {"method": cell["method"], "scores": [with_interval(score) for score in cell["scores"]]}
            for cell in cells
            if (cell["base"], cell["task"]) == (base, "line") and cell["method"] not in CONTROLS
        ]
        draw_accuracy(axes, runs)
        axes.set_title(base)
    save_figure(figure, out)


def table(base: str, rows: list[dict[str, Any]]) -> str:
    """A markdown table: mean and range over seeds by length."""
    lines = [f"\n{base}\n", "| task | method | rate | " + " | ".join(map(str, LENGTHS)) + " |",
             "|---|---|---:|" + "---:|" * len(LENGTHS)]  # fmt: skip
    kinds = dict.fromkeys((row["task"], row["method"]) for row in rows)
    for task, method in kinds:
        mine = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        cells = [""] * (len(LENGTHS) - len(mine[0]["scores"]))  # lengths that are too short for the task
        for place in range(len(mine[0]["scores"])):
            values = [row["scores"][place]["score"] for row in mine]
            spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}")
        lines.append(f"| {task} | {method} | {mine[0]['rate'] or '-'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
