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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock, Timeout

from axolotl_plugins.common.console import first_line, quiet_libraries, stop
from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.io import file_hash
from axolotl_plugins.common.provenance import current_commit
from axolotl_plugins.common.tokenizer import load_tokenizer
from axolotl_plugins.common.window import context_window, read_config
from data_gen.dataset import Request
from recipes.tools.study_cells import (
    METHODS,
    TASKS,
    Cell,
    Settings,
    capped,
    choose_rate,
    data_file,
    data_requests,
    is_done,
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
    return [cell for cell in with_rates if not is_done(folder, cell)]


@contextmanager
def claimed(folder: Path, cell: Cell) -> Iterator[bool]:
    """Hold the lock of a cell; yield False if another process holds it. The lock ends with the process."""
    file = folder / "locks" / cell.file_name
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(file).acquire(blocking=False)
    except Timeout:
        yield False
        return
    with lock:
        yield True


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
    bench = Workbench(model, device, settings, folder / "data")
    failed: set[Cell] = set()
    while True:
        others_run = False
        for cell in open_cells(folder, cells):
            if cell in failed or (cell.rated_as and cell.rate is None):
                continue
            with claimed(folder, cell) as mine:
                others_run |= not mine
                if not mine or is_done(folder, cell):
                    continue
                try:
                    result = bench.run(cell)
                except (RuntimeError, ValueError, OSError) as error:  # such as a lack of memory: others go on
                    failed.add(cell)
                    print(f"{cell}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
                    continue
                write_cell(folder, cell, {**result, "commit": commit})
            scores = " ".join(f"{row['score']:.2f}" for row in result["scores"]) or result["failed"]
            spent = result.get("tuning_seconds", 0) + result.get("scoring_seconds", 0)
            print(f"{cell}: {scores} ({spent:.0f} s)", flush=True)
            break  # cells before it may have their learning rate now
        else:
            if not others_run:
                return
            time.sleep(WAIT)


def run_cells(deadline: float, jobs: int, *arguments: Any) -> None:
    """Run ``work`` in ``jobs`` processes; those that still run at the deadline are terminated.

    Args:
        deadline: of ``time.monotonic``.
        jobs: number of processes.
        arguments: of ``work``, without ``threads``.
    """
    context = multiprocessing.get_context("spawn")
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))
    workers = [context.Process(target=work, args=(*arguments, threads), daemon=True) for _ in range(jobs)]
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


def draw_sample_file(wanted: Request, model: Path, file: Path) -> None:
    """Draw the samples of one file."""
    write_samples(wanted, load_tokenizer(str(model)), file)


def draw_missing(requests: list[Request], model: Path, folder: Path, jobs: int) -> int:
    """Draw the missing sample files, and return their number."""
    missing = [wanted for wanted in requests if not data_file(folder, wanted).exists()]
    if not missing:
        return 0
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context, initializer=quiet_libraries) as pool:
        futures = [pool.submit(draw_sample_file, wanted, model, data_file(folder, wanted)) for wanted in missing]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="drawing samples", disable=None):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(missing)


# --- command line ----------------------------------------------------------------------------------------------------


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors of the user's input into one line and exit status 1."""
    quiet_libraries()
    try:
        yield
    except (ValueError, OSError) as error:
        stop(error)


def names(text: str, valid: tuple[str, ...], option: str) -> list[str]:
    """Return the names in a comma-separated list, all of them if it is empty.

    Raises:
        ValueError: a name is unknown.
    """
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [name for name in chosen if name not in valid]:
        raise ValueError(f"{option}: found {unknown[0]!r}, expected some of {', '.join(valid)}")
    return [name for name in valid if name in chosen] if chosen else list(valid)


def numbers(text: str, option: str) -> list[int]:
    """Return the distinct numbers of a comma-separated list, in their order.

    Raises:
        ValueError: the list is empty, or has something else than non-negative integers.
    """
    try:
        values = list(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        values = []
    if not values or min(values) < 0:
        raise ValueError(f"{option}: found {text!r}, expected integers such as 0,1,2")
    return values


def pairs(text: str, option: str) -> dict[str, str]:
    """Parse a list such as ``line=512:2048,vt=1024`` into values by task.

    Raises:
        ValueError: a task is unknown or has no value.
    """
    values = dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())
    if wrong := [task for task, value in values.items() if task not in TASKS or not value]:
        raise ValueError(
            f"{option}: found {wrong[0]!r} in {text!r}, expected TASK=VALUE with TASK in {', '.join(TASKS)}"
        )
    return values


def make_settings(
    model: Path, dtype: str, longest: int | None, lengths: str, train_tokens: str, samples: int,
    validation_samples: int, tune_samples: int, shot_tokens: int, haystack: str,
) -> Settings:  # fmt: skip
    """Return the settings of a study.

    Raises:
        ValueError: the model is missing, or a length exceeds its window.
    """
    if not (model / "config.json").is_file():
        raise ValueError(f"model: no config.json in {model}: name a model's folder")
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"model: no *.safetensors in {model}: copy the complete folder")
    window = context_window(read_config(str(model)), str(model))
    train, tested = capped(longest, pairs(train_tokens, "train-tokens"))
    if lengths:
        tested = {task: sorted(numbers(lengths, "lengths")) for task in tested}
    if (longest_test := max(map(max, tested.values()))) > window:
        raise ValueError(f"lengths: {longest_test} tokens do not fit into the window of {window}: see --longest")
    return Settings(
        model=file_hash(weights[0]), window=window, dtype=dtype, samples=samples,
        validation_samples=validation_samples, tune_samples=tune_samples, shot_tokens=shot_tokens, haystack=haystack,
        train=train, lengths=tested,
    )  # fmt: skip


Model = Annotated[Path, typer.Option(help="Folder of the model.")]
Out = Annotated[Path, typer.Option(help="Folder of the study: data, cells, settings.json.")]
Tasks = Annotated[str, typer.Option(help=f"Some of {','.join(TASKS)}; default: all.")]
Methods = Annotated[str, typer.Option(help=f"Some of {','.join(METHODS)}; default: all.")]
Seeds = Annotated[str, typer.Option(help="Seeds of tuned cells; learning rates are chosen under seed 0.")]
Longest = Annotated[int | None, typer.Option(help="Cap of all training and test lengths, in tokens.")]
Lengths = Annotated[str, typer.Option(help="Test lengths of all tasks instead of the built-in ones, as 512,1024.")]
TrainTokens = Annotated[str, typer.Option(help="Training lengths of tasks, as line=512:2048,vt=1024.")]
Samples = Annotated[int, typer.Option(min=1, help="Test samples per length.")]
ValidationSamples = Annotated[int, typer.Option(min=1, help="Validation samples per length.")]
TuneSamples = Annotated[int, typer.Option(min=2, help="Training samples of a cell.")]
ShotTokens = Annotated[int, typer.Option(min=1, help="Longest worked example of one-shot prompts.")]
HaystackOption = Annotated[str, typer.Option(help="Of needles: a folder of text files, essays or prose.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes; several share one GPU.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Minutes = Annotated[float, typer.Option(min=0, max=30_000, help="Stop after this time; running cells are terminated.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or auto: bfloat16 on a GPU.")]


@app.callback()
def main() -> None:
    """Reproduce the paper's tables on a small model, on a CPU or a GPU."""


@app.command(epilog="Example: seal study data --model models/smollm2-135m --out outputs/study --jobs 2")
def data(
    model: Model = Path("models/smollm2-135m"), out: Out = Path("outputs/study"), tasks: Tasks = "",
    methods: Methods = "", seeds: Seeds = "0,1,2", longest: Longest = None, lengths: Lengths = "",
    train_tokens: TrainTokens = "", samples: Samples = 100, validation_samples: ValidationSamples = 30,
    tune_samples: TuneSamples = 50, shot_tokens: ShotTokens = 1000, haystack: HaystackOption = "prose",
    jobs: Jobs = 1,
) -> None:  # fmt: skip
    """Draw all samples into OUT/data, so that `run` needs no word lists; options as of `run`."""
    with one_line_errors():
        settings = make_settings(
            model, "any", longest, lengths, train_tokens, samples, validation_samples, tune_samples, shot_tokens,
            haystack,
        )  # fmt: skip
        cells = plan(names(tasks, TASKS, "tasks"), names(methods, METHODS, "methods"), numbers(seeds, "seeds"))
        requests = data_requests(settings, cells)
        count = draw_missing(requests, model, out / "data", jobs)
        size = sum(data_file(out / "data", wanted).stat().st_size for wanted in requests)
        print(f"{len(requests)} files in {out / 'data'}, {size / 1e6:.1f} MB, {count} of them new")


@app.command(epilog="Example: seal study run --model models/smollm2-135m --device cuda --minutes 10 --jobs 6")
def run(
    model: Model = Path("models/smollm2-135m"), out: Out = Path("outputs/study"), tasks: Tasks = "",
    methods: Methods = "", seeds: Seeds = "0,1,2", longest: Longest = None, lengths: Lengths = "",
    train_tokens: TrainTokens = "", samples: Samples = 100, validation_samples: ValidationSamples = 30,
    tune_samples: TuneSamples = 50, shot_tokens: ShotTokens = 1000, haystack: HaystackOption = "prose",
    jobs: Jobs = 1, device: Device = "auto", dtype: Dtype = "auto",
    minutes: Minutes = 30_000,
) -> None:  # fmt: skip
    """Tune and score all open cells; the same command resumes."""
    deadline = time.monotonic() + 60 * minutes
    with one_line_errors():
        import torch

        if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"device, dtype: found {device!r} and {dtype!r}, expected cpu, cuda or auto, and "
                "float32, bfloat16 or auto"
            )
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        dtype = ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype
        settings = make_settings(
            model, dtype, longest, lengths, train_tokens, samples, validation_samples, tune_samples, shot_tokens,
            haystack,
        )  # fmt: skip
        store_settings(out, settings)
        cells = plan(names(tasks, TASKS, "tasks"), names(methods, METHODS, "methods"), numbers(seeds, "seeds"))
        draw_missing(data_requests(settings, cells), model, out / "data", jobs)
        before = open_cells(out, cells)
        run_cells(
            deadline, min(jobs, max(1, len(before))), model, device, settings, out, before, current_commit()
        )  # fmt: skip
        remaining = open_cells(out, before)
        timely = time.monotonic() < deadline
        more = ", more are open: run the same command again" if remaining and not timely else ""
        print(f"{len(before) - len(remaining)} cells done now{more}")
        if remaining and timely:
            raise ValueError(f"{len(remaining)} cells failed, the first is {remaining[0]}: see above")


@app.command(epilog="Example: seal study collect --out outputs/study --result results/smollm2.json")
def collect(
    out: Out = Path("outputs/study"),
    result: Annotated[Path, typer.Option(help="Result file; its plots go beside it.")] = Path("results/smollm2.json"),
) -> None:
    """Collect the finished cells into one result with plots, and print its tables."""
    with one_line_errors():
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
    with one_line_errors():
        from recipes.tools.adapters import share
        from recipes.tools.study_results import gather

        for folder in share(out, gather(out, current_commit()), model, to):
            print(folder)


if __name__ == "__main__":
    run_app(app, "python -m recipes.study")
