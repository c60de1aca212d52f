"""Reproduce the paper's tables on a small model, with all methods, rates, seeds and controls (``make study``).

``data`` draws the samples, ``run`` tunes and scores cells on a CPU or a GPU, each into a file of its own, so that an
interrupted run resumes, and ``collect`` writes the result, its plots and tables. Learning rates are chosen on
validation samples of the training split, never on test samples.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import typer

from axolotl_plugins.common.console import first_line, quiet_libraries, stop
from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.io import file_hash
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
    plan,
    read_cell,
    store_settings,
    validation_cells,
    write_cell,
    write_samples,
)

app = typer.Typer(add_completion=False, no_args_is_help=True)
PATIENCE = 5.0  # seconds for a worker to end after SIGTERM
TRIES = 2  # per cell: a worker may fail for a momentary lack of memory


def start_worker_process(threads: int) -> None:
    """Set up a worker process; SIGTERM ends it cleanly."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    quiet_libraries()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def work(connection: Connection, model: Path, device: str, settings: Settings, data: Path, threads: int) -> None:
    """Run the cells that a connection receives and send back their results; an error ends the process."""
    start_worker_process(threads)
    from recipes.tools.study_cells import Workbench

    try:
        bench = Workbench(model, device, settings, data)
        while (cell := connection.recv()) is not None:
            connection.send(bench.run(cell))
    except (EOFError, KeyboardInterrupt):
        return  # the study ended
    except Exception as error:
        connection.send(f"{type(error).__name__}: {first_line(error)}")
        raise


@dataclass
class Worker:
    """A process that runs one cell at a time.

    Attributes:
        process: the process.
        connection: sends cells, receives results.
        cell: the running cell; None while idle.
    """

    process: BaseProcess
    connection: Connection
    cell: Cell | None = None

    def send(self, cell: Cell | None) -> None:
        """Send a cell, or None to end the process."""
        self.cell = cell
        self.connection.send(cell)


class Study:
    """The cells of a study: which are done, and which is next."""

    def __init__(self, folder: Path, cells: list[Cell]) -> None:
        """Start with no results loaded; they are read from the folder on demand."""
        self.folder, self.open = folder, cells
        self.results: dict[Cell, dict[str, Any]] = {}
        self.errors: dict[Cell, list[str]] = {}
        self.running: set[Cell] = set()
        self.new = 0

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's result; None if it is not done."""
        if cell not in self.results and (stored := read_cell(self.folder, cell)) is not None:
            self.results[cell] = stored
        return self.results.get(cell)

    def given_up(self, cell: Cell) -> bool:
        """Return whether a cell failed too often."""
        return len(self.errors.get(cell, ())) >= TRIES

    def with_rate(self, cell: Cell) -> Cell | None:
        """Return a cell with the learning rate that validation chose; None until validation is done."""
        if cell.rated_as is None or cell.rate is not None:
            return cell
        candidates = validation_cells(cell.task, cell.rated_as)
        results = [self.result(candidate) for candidate in candidates if not self.given_up(candidate)]
        if not results or any(result is None for result in results):
            return None
        return replace(cell, rate=choose_rate([result for result in results if result is not None]))

    def next_cell(self) -> Cell | None:
        """Return the first open cell whose learning rate is known; None if there is none for now."""
        waiting = []
        chosen = None
        for position, cell in enumerate(self.open):
            ready = self.with_rate(cell)
            if ready is None or ready in self.running:
                waiting.append(cell)
            elif self.result(ready) is None and not self.given_up(ready):
                chosen = ready
                self.open = waiting + self.open[position:]
                break
        else:
            self.open = waiting
        if chosen is not None:
            self.running.add(chosen)
        return chosen

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Store a result."""
        write_cell(self.folder, cell, result)
        self.running.discard(cell)
        self.results[cell] = result
        self.new += 1

    def fail(self, cell: Cell, error: str) -> None:
        """Record that a cell's worker failed."""
        self.running.discard(cell)
        self.errors.setdefault(cell, []).append(error)


def run_cells(
    study: Study, deadline: float, jobs: int, *, model: Path, device: str, settings: Settings, commit: str | None
) -> bool:
    """Run open cells on ``jobs`` processes until all are done or the deadline has passed.

    Only this process writes results, so that workers can be terminated at any moment.

    Args:
        study: what to run.
        deadline: of ``time.monotonic``; cells that are running then are terminated.
        jobs: worker processes.
        model: folder of the model.
        device: for torch.
        settings: of the study.
        commit: of the code, stored with every result.

    Returns:
        True if all cells are done or have failed too often.
    """
    context = multiprocessing.get_context("spawn")
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))
    workers: list[Worker] = []
    begin = time.monotonic()

    def start() -> Worker:
        here, there = context.Pipe()
        arguments = (there, model, device, settings, study.folder / "data", threads)
        process = context.Process(target=work, args=arguments, daemon=True)
        process.start()
        there.close()
        workers.append(Worker(process, here))
        return workers[-1]

    try:
        while time.monotonic() < deadline:
            idle = [worker for worker in workers if worker.cell is None]
            while (idle or len(workers) < jobs) and (cell := study.next_cell()) is not None:
                (idle.pop() if idle else start()).send(cell)
            busy = {worker.connection: worker for worker in workers if worker.cell is not None}
            if not busy:
                return True
            for connection in wait(list(busy), timeout=min(60.0, max(0.0, deadline - time.monotonic()))):
                worker = busy[connection]  # type: ignore[index]
                if not receive(study, worker, begin, commit):
                    workers.remove(worker)
        return False
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(PATIENCE)
            worker.process.kill()


def receive(study: Study, worker: Worker, begin: float, commit: str | None) -> bool:
    """Receive a worker's result or error and print a line; return whether the worker is still alive.

    Raises:
        ValueError: several cells failed and none was done.
    """
    cell = worker.cell
    assert cell is not None
    try:
        result = worker.connection.recv()
    except EOFError:
        result = "its process was killed, probably out of memory"
    clock = f"[{time.monotonic() - begin:4.0f} s]"
    if isinstance(result, str):
        study.fail(cell, result)
        print(f"{clock} {cell}: {result}", file=sys.stderr, flush=True)
        if not study.new and sum(map(len, study.errors.values())) > 2 * TRIES:
            raise ValueError(f"no cell can be run; the last error: {result}")
        return False
    worker.cell = None
    study.add(cell, {**result, "commit": commit})
    scores = " ".join(f"{row['score']:.2f}" for row in result["scores"]) or result["failed"]
    spent = result.get("tuning_seconds", 0) + result.get("scoring_seconds", 0)
    print(f"{clock} {study.new:3d} {cell}: {scores} ({spent:.0f} s)", flush=True)
    return True


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


def current_commit() -> str | None:
    """Return the commit of the code, with a plus if files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + "+" * bool(changed.stdout.strip())


# --- command line ----------------------------------------------------------------------------------------------------


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors of the user's input into one line and exit status 1."""
    quiet_libraries()
    try:
        yield
    except (ValueError, OSError) as error:
        stop("study", error)


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
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or auto: bfloat16 on a GPU.")]


@app.callback()
def main() -> None:
    """Reproduce the paper's tables on a small model, on a CPU or a GPU."""


@app.command(epilog="Example: python -m recipes.study data --model models/smollm2-135m --out outputs/study --jobs 2")
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


@app.command(
    epilog="Example: python -m recipes.study run --model models/smollm2-135m --device cuda --minutes 10 --jobs 6"
)
def run(
    model: Model = Path("models/smollm2-135m"), out: Out = Path("outputs/study"), tasks: Tasks = "",
    methods: Methods = "", seeds: Seeds = "0,1,2", longest: Longest = None, lengths: Lengths = "",
    train_tokens: TrainTokens = "", samples: Samples = 100, validation_samples: ValidationSamples = 30,
    tune_samples: TuneSamples = 50, shot_tokens: ShotTokens = 1000, haystack: HaystackOption = "prose",
    jobs: Jobs = 1, device: Device = "auto", dtype: Dtype = "auto",
    minutes: Annotated[float, typer.Option(min=0, help="Stop after this time; running cells are terminated.")] = 1e6,
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
        study = Study(out, cells)
        done = run_cells(
            study, deadline, jobs, model=model, device=device, settings=settings, commit=current_commit()
        )  # fmt: skip
        failed = [cell for cell in study.errors if study.given_up(cell)]
        print(f"{study.new} cells done now" + ("" if done else ", more are open: run the same command again"))
        if failed:
            raise ValueError(f"{len(failed)} cells failed, the first is {failed[0]}: {study.errors[failed[0]][-1]}")


@app.command(epilog="Example: python -m recipes.study collect --out outputs/study --result results/smollm2.json")
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


if __name__ == "__main__":
    run_app(app, "python -m recipes.study")
