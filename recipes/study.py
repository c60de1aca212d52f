"""Reproduce the paper's tables on a small model, with all methods, rates, seeds and controls (``make study``).

``data`` draws the samples, ``run`` tunes and scores cells on a CPU or a GPU, each into a file of its own, so that an
interrupted run resumes, and ``collect`` writes the result, its plots and tables. Learning rates are chosen on
validation samples of the training split, never on test samples.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from filelock import FileLock, Timeout

from axolotl_plugins.common.console import first_line, quiet_libraries
from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.environment import current_commit
from axolotl_plugins.common.io import file_hash
from axolotl_plugins.common.window import context_window, read_config
from data_gen.dataset import Request
from eval.cli_options import parse_names, parse_numbers, read_model_config
from recipes.tools.study_cells import (
    METHODS,
    MIXTURES,
    TASKS,
    Cell,
    Settings,
    capped,
    choose_rate,
    data_file,
    data_requests,
    plan,
    read_cell,
    store_settings,
    validation_cells,
    write_cell,
    write_samples,
)

app = typer.Typer(add_completion=False, no_args_is_help=True)
PATIENCE = 5.0  # seconds for a worker to end after SIGTERM
WAIT = 1.0  # seconds until a worker looks again whether another one has finished the cells that it needs


# --- workers ---------------------------------------------------------------------------------------------------------


def rated(folder: Path, cell: Cell) -> Cell | None:
    """Return a cell with the learning rate that validation chose; None until validation is done."""
    if cell.rated_as is None or cell.rate is not None:
        return cell
    rates = []
    for source in cell.sources:
        results = [read_cell(folder, candidate) for candidate in validation_cells(source, cell.rated_as)]
        if any(result is None for result in results):
            return None
        rates.append(choose_rate([result for result in results if result is not None]))
    return replace(cell, rate=statistics.median_low(rates))  # of a mixture: the median of its tasks' rates


def open_cells(folder: Path, cells: list[Cell]) -> list[Cell]:
    """Return the cells without a result; those whose validation is done with their learning rate."""
    with_rates = [rated(folder, cell) or cell for cell in cells]
    return [cell for cell in with_rates if not cell.file(folder).exists()]


def work(
    model: Path, device: str, settings: Settings, folder: Path, cells: list[Cell], commit: str | None, threads: int
) -> None:
    """Run open cells, the first that no other process runs, until none is left; a cell that fails is skipped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    quiet_libraries()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch
    import transformers

    from recipes.tools.study_cells import Workbench

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        bench = Workbench(model, device, settings, folder / "data")
    except (RuntimeError, ValueError, OSError) as error:
        cause = " with the model_config, whose shapes must be those of the weights" if settings.model_config else ""
        sys.exit(f"{model} cannot be loaded{cause}: {first_line(error)}")
    locks, failed = folder / "locks", set[Cell]()
    locks.mkdir(parents=True, exist_ok=True)
    while True:
        others_run = False
        for cell in open_cells(folder, cells):
            if cell in failed or (cell.rated_as and cell.rate is None):
                continue
            try:
                with FileLock(locks / cell.file_name).acquire(blocking=False):  # it ends with the process
                    if cell.file(folder).exists():
                        continue
                    result = bench.run(cell)
                    write_cell(folder, cell, {**result, "commit": commit})
            except Timeout:
                others_run = True
                continue
            except (RuntimeError, ValueError, OSError) as error:  # such as a lack of memory: others go on
                failed.add(cell)
                print(f"{cell}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
                continue
            scores = " ".join(f"{row['score']:.2f}" for row in result["scores"]) or result["failed"]
            spent = result.get("tuning_seconds", 0) + result.get("scoring_seconds", 0)
            print(f"{cell}: {scores} ({spent:.0f} s)", flush=True)
            break  # cells before it may have their learning rate now
        else:
            if not others_run:
                return
            time.sleep(WAIT)


def run_cells(deadline: float, jobs: int, *arguments: Any) -> None:
    """Run ``work`` in so many processes; those that run at the deadline (of ``time.monotonic``) are terminated."""
    context = multiprocessing.get_context("spawn")
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))
    workers = [context.Process(target=work, args=(*arguments, threads), daemon=True) for _ in range(jobs)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers are terminated too
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(PATIENCE)
            worker.kill()


def run_open_cells(
    deadline: float, jobs: int, model: Path, device: str, settings: Settings, out: Path, cells: list[Cell]
) -> None:
    """Run the cells without a result, see ``run_cells``; print how many were done.

    Raises:
        ValueError: cells failed.
    """
    before = open_cells(out, cells)
    run_cells(deadline, min(jobs, max(1, len(before))), model, device, settings, out, before, current_commit())
    remaining = open_cells(out, before)
    timely = time.monotonic() < deadline
    more = ", more are open: run the same command again" if remaining and not timely else ""
    print(f"{len(before) - len(remaining)} cells done now{more}")
    if remaining and timely:
        raise ValueError(f"{len(remaining)} cells failed, the first is {remaining[0]}: see above")


def draw_missing(requests: list[Request], model: Path, folder: Path, jobs: int) -> int:
    """Draw the missing sample files, and return their number."""
    missing = [wanted for wanted in requests if not data_file(folder, wanted).exists()]
    if not missing:
        return 0
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context, initializer=quiet_libraries) as pool:
        drawn = pool.map(write_samples, missing, repeat(model), [data_file(folder, wanted) for wanted in missing])
        list(tqdm(drawn, total=len(missing), desc="drawing samples", disable=None))  # an error cancels what is left
    return len(missing)


# --- command line ----------------------------------------------------------------------------------------------------


def pairs(text: str, option: str) -> dict[str, str]:
    """Parse a list such as ``line=512:2048,vt=1024`` into values by task.

    Raises:
        ValueError: a task is unknown or has no value.
    """
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    values = {task: value for task, _, value in parts}
    if len(values) < len(parts):
        raise ValueError(f"{option}: found {text!r}, which names a task twice")
    if wrong := [task for task, value in values.items() if task not in TASKS or not value]:
        raise ValueError(
            f"{option}: found {wrong[0]!r} in {text!r}, expected TASK=VALUE with TASK in {', '.join(TASKS)}"
        )
    return values


def make_settings(
    model: Path, tasks: list[str], longest: int | None, lengths: str, train_tokens: str,
    model_config: dict[str, Any] | None = None, **others: Any,
) -> Settings:  # fmt: skip
    """Return the settings of a study of these tasks; ``others`` are settings as they are.

    Raises:
        ValueError: the model is missing, or a length exceeds its window.
    """
    if not (model / "config.json").is_file():
        raise ValueError(f"model: no config.json in {model}: name a model's folder")
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"model: no *.safetensors in {model}: copy the complete folder")
    window = context_window(read_config(str(model), model_config), str(model))
    train, tested = capped(longest, pairs(train_tokens, "train-tokens"))
    if "=" in lengths:
        tested |= {task: sorted(set(parse_numbers(values.replace("/", ","), "lengths")))
                   for task, values in pairs(lengths, "lengths").items()}  # fmt: skip
    elif lengths:
        tested = {task: sorted(set(parse_numbers(lengths, "lengths"))) for task in tested}
    if (longest_test := max(max(tested[task]) for task in tasks)) > window:
        raise ValueError(f"lengths: {longest_test} tokens do not fit into the window of {window}: see --longest")
    return Settings(model=file_hash(weights[0]), window=window, train=train, lengths=tested, model_config=model_config,
                    name=str(model), **others)  # fmt: skip


Model = Annotated[Path, typer.Option(help="Folder of the model.")]
Out = Annotated[Path, typer.Option(help="Folder of the study: data, cells, settings.json.")]


@app.callback()
def main() -> None:
    """Reproduce the paper's tables on a small model, on a CPU or a GPU."""


@app.command(
    "data", help="Draw all samples into OUT/data, so that `run` needs no word lists; options as of `run`.",
    epilog="Example: seal study data --model models/smollm2-135m --out outputs/study --jobs 2",
)  # fmt: skip
@app.command(
    "run", help="Tune and score all open cells; the same command resumes.",
    epilog="Example: seal study run --model models/smollm2-135m --device cuda --minutes 10 --jobs 6",
)  # fmt: skip
def run(
    context: typer.Context,
    model: Model = Path("models/smollm2-135m"),
    out: Out = Path("outputs/study"),
    tasks: Annotated[str, typer.Option(help=f"Some of {','.join(TASKS)}; default: all.")] = "",
    methods: Annotated[str, typer.Option(help=f"Some of {','.join(METHODS)}; default: all.")] = "",
    seeds: Annotated[str, typer.Option(help="Of tuned cells; learning rates are chosen under seed 0.")] = "0,1,2",
    longest: Annotated[int | None, typer.Option(help="Cap of all training and test lengths, in tokens.")] = None,
    lengths: Annotated[
        str, typer.Option(help="Test lengths: of all tasks, as 512,1024, or of some, as line=512/1024,vt=1024.")
    ] = "",
    train_tokens: Annotated[str, typer.Option(help="Training lengths of tasks, as line=512:2048,vt=1024.")] = "",
    samples: Annotated[int, typer.Option(min=1, help="Test samples per length.")] = 100,
    validation_samples: Annotated[int, typer.Option(min=1, help="Validation samples per length.")] = 30,
    tune_samples: Annotated[int, typer.Option(min=2, help="Training samples of a cell.")] = 50,
    shot_tokens: Annotated[int, typer.Option(min=1, help="Longest worked example of one-shot prompts.")] = 1000,
    haystack: Annotated[str, typer.Option(help="Of needles: a folder of text files, essays or prose.")] = "prose",
    model_config: Annotated[
        Path | None, typer.Option(help="A recipe whose `model_config` the model gets: NTK, Self-Extend.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; several share one GPU.")] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Of weights; auto: bfloat16 on a GPU.")
    ] = "auto",
    minutes: Annotated[
        float, typer.Option(min=0, max=30_000, help="Stop after this time; running cells are terminated.")
    ] = 30_000,
) -> None:
    """Draw the samples of the cells; unless called as ``data``, tune and score them."""
    deadline = time.monotonic() + 60 * minutes
    chosen = parse_names(tasks, TASKS, "tasks"), parse_names(methods, METHODS, "methods")
    settings = make_settings(
        model, chosen[0], longest, lengths, train_tokens, read_model_config(model_config) if model_config else None,
        dtype=dtype, samples=samples, validation_samples=validation_samples,
        tune_samples=tune_samples, shot_tokens=shot_tokens, haystack=haystack,
    )  # fmt: skip
    cells = plan(*chosen, parse_numbers(seeds, "seeds", zero=True), settings.train)
    if methods and (none := [name for name in chosen[1] if all(cell.method != name for cell in cells)]):
        raise ValueError(
            f"methods: {none[0]!r} applies to none of the tasks {', '.join(chosen[0])}: it is of the same task, or "
            "shortens no range of --train-tokens"
        )
    if tune_samples % len(TASKS) and any(cell.method.endswith(f"from {MIXTURES[0]}") for cell in cells):
        raise ValueError(f"tune-samples: {tune_samples} cannot be shared equally by the mixture's {len(TASKS)} tasks: "
                         f"name a multiple of {len(TASKS)}")  # fmt: skip
    requests = data_requests(settings, cells)
    if context.info_name == "data":
        count = draw_missing(requests, model, out / "data", jobs)
        size = sum(data_file(out / "data", wanted).stat().st_size for wanted in requests)
        print(f"{len(requests)} files in {out / 'data'}, {size / 1e6:.1f} MB, {count} of them new")
        return
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: PyTorch finds no CUDA GPU here: leave --device out, or install its CUDA build")
    if dtype == "auto":
        settings = replace(settings, dtype="bfloat16" if device == "cuda" else "float32")
    draw_missing(requests, model, out / "data", jobs)
    store_settings(out, settings)
    run_open_cells(deadline, jobs, model, device, settings, out, cells)


@app.command(epilog="Example: seal study collect --out outputs/study --result results/smollm2.json")
def collect(
    out: Out = Path("outputs/study"),
    result: Annotated[Path, typer.Option(help="Result file; its plots go beside it.")] = Path("results/smollm2.json"),
) -> None:
    """Collect the finished cells into one result with plots, and print its tables."""
    from recipes.tools.study_results import gather, save, tables

    gathered = gather(out, current_commit())
    save(gathered, result)
    print(tables(gathered))


@app.command(epilog="Example: seal study adapters --out outputs/study --to results/adapters/smollm2-135m")
def adapters(
    model: Model = Path("models/smollm2-135m"), out: Out = Path("outputs/study"),
    to: Annotated[Path, typer.Option(help="Gets one folder per task and method.")] = Path("outputs/adapters"),
) -> None:  # fmt: skip
    """Write the tested SEAL adapters, each with its model card and the record of its training data."""
    from recipes.tools.study_adapters import share
    from recipes.tools.study_results import gather

    print(*share(out, gather(out, current_commit()), model, to), sep="\n")


if __name__ == "__main__":
    run_app(app, "python -m recipes.study")
