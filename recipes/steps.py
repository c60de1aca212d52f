"""Commands as steps of a longer job, run side by side; a step that is done is not done again."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.progress import Progress, TimeElapsedColumn

from data_gen.files import load_json, write_text

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One command of a job.

    Attributes:
        name: also of its log file.
        command: what is run.
        makes: there once the command has succeeded.
        needs: names of steps that must be done before.
    """

    name: str
    command: tuple[str, ...]
    makes: Path
    needs: tuple[str, ...] = ()


def machine() -> str:
    """This machine's processor, its number of cores, and the version of torch: what timings and last digits are of."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}"


def launch(name: str, recipe: Path, adapter: Path, needs: tuple[str, ...] = ()) -> Step:
    """Tuning by the command that stands at the head of every recipe."""
    command = (sys.executable, "-m", "accelerate.commands.launch", "-m", "axolotl.cli.train", str(recipe))
    return Step(name, command, adapter / "adapter_model.safetensors", needs)


def run_step(step: Step, logs: Path) -> float:
    """Run one step, its output in a log file; returns seconds.

    Raises:
        RuntimeError: it failed; the message is the end of its output.
    """
    if step.makes.is_dir():
        shutil.rmtree(step.makes)
    log = logs / f"{step.name.replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    start = time.time()
    with log.open("w") as file:
        done = subprocess.run(step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode or not step.makes.exists():
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
        raise RuntimeError(f"{step.name} failed (exit {done.returncode}); the end of {log}:\n{tail}")
    return round(time.time() - start, 1)


def run_all(
    steps: list[Step], state_file: Path, logs: Path, jobs: int, tell: Callable[[str], object]
) -> dict[str, float]:
    """Run the steps that are not done yet, ``jobs`` at a time; returns the seconds of each.

    What is done is written down after every step, so that an interrupted run goes on where it was.
    """
    state: dict[str, float] = load_json(state_file) if state_file.exists() else {}
    state = {step.name: state[step.name] for step in steps if step.name in state and step.makes.exists()}
    todo = [step for step in steps if step.name not in state]
    running: dict[Future[float], Step] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while todo or running:
                for step in [step for step in todo if all(need in state for need in step.needs)]:
                    if len(running) < jobs:
                        todo.remove(step)
                        running[pool.submit(run_step, step, logs)] = step
                tell(", ".join(step.name for step in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    state[running.pop(future).name] = future.result()
                    write_text(state_file, json.dumps(state, indent=1) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return state


def run_steps(title: str, steps: list[Step], work: Path, jobs: int) -> dict[str, float]:
    """``run_all`` with a progress bar; what is done, and the steps' output, is kept in a folder."""
    state = work / "state.json"
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        bar = progress.add_task(title, total=len(steps))

        def tell(running: str) -> None:
            done = len(json.loads(state.read_text())) if state.exists() else 0
            progress.update(bar, completed=done, description=running or title)

        return run_all(steps, state, work / "logs", jobs, tell)
