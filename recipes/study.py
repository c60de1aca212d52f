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
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_gen.console import quiet_libraries
from data_gen.files import write_text

BASES = {"ntk": Path("recipes/tiny"), "linear": Path("outputs/study/bases/linear")}
LENGTHS = (256, 512, 1024, 1448, 1960)
VALIDATION = LENGTHS[2:]
VALIDATION_SEED = 9000
TRAIN_TOKENS = "1024:1960"
SHOT_TOKENS = 256
RATES = {
    "SEAL-H": (5e-3, 1e-2, 2e-2, 5e-2),
    "SEAL-C": (5e-3, 1e-2, 2e-2, 5e-2),
    "SEAL-L": (2e-4, 1e-3, 5e-3),
    "SEAL-D": (2e-4, 1e-3, 5e-3),
}
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
        return Path("outputs/study/cells") / f"{name}.json"


def wrap(model: Any, method: str) -> Any:
    """A model with what a method trains."""
    from peft import LoraConfig, get_peft_model

    from axolotl_plugins.seal import SealConfig

    if method in ("SEAL-H", "SEAL-C"):
        return get_peft_model(model, SealConfig(granularity="head" if method == "SEAL-H" else "channel"))
    # The paper's low-rank baselines (section 9): r = 4 on q, k, v and o.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, use_dora=method == "SEAL-D"))


def run_cell(cell: Cell) -> dict[str, Any]:
    """Tune and score one cell, or read its result."""
    if cell.file.exists():
        return json.loads(cell.file.read_text())
    import torch

    from axolotl_plugins.seal.load import load
    from axolotl_plugins.seal.tune import tune
    from data_gen.generate import Request
    from eval.probe.tuning import shuffle_heads, training_data, wrong
    from eval.run import run

    loaded = load(BASES[cell.base])
    method = CONTROLS.get(cell.method, cell.method)
    losses: list[float] = []
    if method in RATES:
        torch.manual_seed(cell.seed)  # of LoRA's initial weights
        model = wrap(loaded.model, method)
        chats, answers = training_data(Request("line", TRAIN_TOKENS), loaded.tokenizer, 50, cell.seed)
        if cell.method.startswith("wrong"):
            chats = wrong(chats, answers, random.Random(cell.seed))
        losses = tune(model, chats, loaded.tokenizer, lr=cell.rate, seed=cell.seed)
        if cell.method.startswith("shuffled"):
            shuffle_heads(model, random.Random(cell.seed))
        loaded = type(loaded)(loaded.name, model.eval(), loaded.tokenizer, loaded.base, method, loaded.window)
    lengths = list(VALIDATION if cell.validation else LENGTHS)
    shots = int(cell.method == "one-shot")
    if shots:  # the longest records leave room for the example, as in the paper's Table 3
        lengths = [min(length, max(LENGTHS) - SHOT_TOKENS) for length in lengths]
    result = run(
        loaded, cell.task, lengths=lengths, samples=cell.samples, batch_size=10, shots=shots, shot_tokens=SHOT_TOKENS,
        split="train" if cell.validation else "test", seed=VALIDATION_SEED if cell.validation else 0,
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
    from lm_eval import utils

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    utils.eval_logger.setLevel(logging.ERROR)


def run_all(cells: list[Cell], jobs: int) -> dict[Cell, dict[str, Any]]:
    """Results of all cells, ``jobs`` at a time."""
    from rich.progress import Progress

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


def choose_rates(bases: list[str], jobs: int) -> dict[tuple[str, str], float]:
    """The rate of every base and method with the best mean on validation samples; of equals the smallest."""
    cells = [
        Cell(base, method, rate, samples=40, validation=True)
        for base in bases for method, rates in RATES.items() for rate in rates
    ]  # fmt: skip
    results = run_all(cells, jobs)
    chosen = {}
    for base in bases:
        for method in RATES:
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
    for base in args.bases:
        if not (BASES[base] / "config.json").exists():
            sys.exit(f"study: {BASES[base]} is missing: make it with `python -m recipes.tiny_model --longchat`")
    rates = choose_rates(args.bases, args.jobs)
    cells = []
    for base in args.bases:
        for task in ("line", "niah"):
            cells += [Cell(base, "base", task=task), Cell(base, "one-shot", task=task)]
            for seed in args.seeds:
                cells += [Cell(base, method, rates[base, method], seed, task) for method in RATES]
                cells += [Cell(base, control, rates[base, method], seed, task) for control, method in CONTROLS.items()]
    cells = [cell for cell in cells if cell.task == "line" or cell.method not in ("one-shot", *CONTROLS)]
    results = run_all(cells, args.jobs)
    write_text(args.out, json.dumps({"cells": [results[cell] for cell in cells]}, indent=1) + "\n")
    for base in args.bases:
        print(table(base, [results[cell] for cell in cells if cell.base == base]))


def table(base: str, rows: list[dict[str, Any]]) -> str:
    """A markdown table: mean and range over seeds by length."""
    lines = [f"\n{base}\n", "| task | method | rate | " + " | ".join(map(str, LENGTHS)) + " |",
             "|---|---|---:|" + "---:|" * len(LENGTHS)]  # fmt: skip
    kinds = dict.fromkeys((row["task"], row["method"]) for row in rows)
    for task, method in kinds:
        mine = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        cells = []
        for place in range(len(LENGTHS)):
            values = [row["scores"][place]["score"] for row in mine]
            spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}")
        lines.append(f"| {task} | {method} | {mine[0]['rate'] or '-'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
