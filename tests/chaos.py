"""Kill commands at random moments, rerun them and compare the bytes (``make chaos``); simulate a full disk.

Every command runs in a fork of this process, which has imported the libraries, so that kills hit the work itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from paths import TINY, TINY_SEALC
from peft import get_peft_model
from tqdm import tqdm

from axolotl_plugins.common.console import run
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.__main__ import app as seal
from axolotl_plugins.seal.model_loading import load
from data_gen.__main__ import app as data_gen
from eval.__main__ import app as evaluate

TIMES = (b'"seconds": ',)  # lines of results with durations, which differ between runs


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        work: runs it in the current folder.
        outputs: files and folders that must be equal in every run, bit for bit.
        atomic: whether outputs are never half-written; Axolotl writes adapters in place.
        repeatable: whether the command can be run again when it is done.
    """

    work: Callable[[], object]
    outputs: tuple[str, ...]
    atomic: bool = True
    repeatable: bool = True


def command(app: object, program: str, arguments: str) -> Callable[[], object]:
    return lambda: run(app, f"python -m {program}", arguments.split())


def train() -> None:
    from axolotl.cli.train import do_cli

    do_cli("recipe.yml")


SCORE = f"run --model {TINY} --lengths 260,400 --samples 4 --out r.json"
HEADS = f"probe heads --model {TINY} --lengths 260 --samples 2 --out p.json"
DATA = f"line --tokenizer {TINY} --tokens 1500 --samples 30 --out d.jsonl"
STAGES = {
    "data": Stage(command(data_gen, "data_gen", DATA), ("d.jsonl", "d.jsonl.manifest.json")),
    "merge": Stage(command(seal, "axolotl_plugins.seal", "merge adapter merged"), ("merged",), repeatable=False),
    "score": Stage(command(evaluate, "eval", SCORE), ("r.json", "r.png")),
    "probe": Stage(command(evaluate, "eval", HEADS), ("p.json", "p.png")),
    "report": Stage(command(evaluate, "eval", "report --results results --out report.html"), ("report.html",)),
    "train": Stage(
        train,
        ("data/d.jsonl", "data/d.jsonl.manifest.json", "out/training_data.json", "out/adapter_model.safetensors"),
        atomic=False,
    ),
}


def content(folder: Path, outputs: tuple[str, ...]) -> dict[str, bytes]:
    """Read a command's outputs: relative name -> bytes, without durations."""
    files = {}
    for name in outputs:
        for file in [folder / name, *(folder / name).rglob("*")]:
            if file.is_file():
                lines = file.read_bytes().splitlines(keepends=True)
                files[str(file.relative_to(folder))] = b"".join(
                    line for line in lines if not line.lstrip().startswith(TIMES)
                )
    return files


def attempt(stage: Stage, folder: Path, seconds: float | None = None) -> bool:
    """Run a command in a folder, and kill it after some seconds; return whether it ended before.

    Raises:
        RuntimeError: it failed; the message is the end of its output.
    """
    sys.stdout.flush()
    start, log = time.monotonic(), folder / "log"
    if not (child := os.fork()):
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            # tqdm's lock is shared by all forks: a fork killed while holding it would block the others.
            tqdm.set_lock(threading.RLock())
            stage.work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1 if error.code else 0
            print(error.code, file=sys.stderr)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"exit status {status}: " + log.read_text(errors="replace")[-1500:])
            return True
        if seconds is not None and time.monotonic() - start >= seconds:
            with contextlib.suppress(ProcessLookupError):  # the fork has no process group yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)


def starve(name: str, stage: Stage, inputs: Path, work: Path) -> str:
    """Limit files to half of a command's largest output, like a full disk, and return the command's error.

    Raises:
        RuntimeError: the error has more than one line, or an earlier result was changed.
    """
    undisturbed, folder = work / name / "undisturbed", work / name / "starved"
    shutil.copytree(inputs, folder)
    if stage.repeatable:  # an earlier result of other content
        earlier = (undisturbed / stage.outputs[0]).read_bytes().replace(b'"fingerprint": "', b'"fingerprint": "other ')
        (folder / stage.outputs[0]).write_bytes(earlier + b"\n")
    before, limit = content(folder, stage.outputs), max(map(len, content(undisturbed, stage.outputs).values())) // 2

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        stage.work()

    try:
        attempt(Stage(starved, stage.outputs), folder)
    except RuntimeError:
        lines = (folder / "log").read_text(errors="replace").splitlines()  # of libraries as well
        errors = [line for line in lines if re.match(r"seal: ", line)]
        if len(errors) != 1 or "File too large" not in errors[0] or any("Traceback" in line for line in lines):
            raise
    else:
        raise RuntimeError(f"it succeeded although no file could be larger than {limit} bytes")
    if content(folder, stage.outputs) != before:
        raise RuntimeError("a full disk changed an earlier result, or left a new one")
    return f"{name}: full: {errors[0]}"


def prepare(folder: Path) -> None:
    """Write the inputs of all stages: an adapter, a result, a recipe."""
    loaded = load(TINY)
    model = get_peft_model(loaded.model, SealConfig(granularity="head", base_model_name_or_path=str(TINY)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.linspace(-0.2, 0.2, len(parameter))
    model.save_pretrained(folder / "adapter")
    (folder / "results").mkdir()
    score = {"length": 260, "tokens": 250.0, "count": 1, "score": 0.0, "low": 0.0, "high": 0.8}
    response = {"length": 260, "index": 0, "tokens": 250, "references": ["7"], "response": "8", "score": 0.0}
    result = {"model": "adapter", "base": "tiny", "method": "SEAL-H", "task": "line", "window": 2048, "seed": 0,
              "shots": 0, "contaminated": None, "scores": [score], "depths": [], "mean": score,
              "responses": [response]}  # fmt: skip
    (folder / "results/r.json").write_text(json.dumps(result))
    recipe = yaml.safe_load(TINY_SEALC.read_text())
    recipe |= {"base_model": str(TINY), "sequence_len": 512, "max_steps": 4, "output_dir": "out"}
    recipe["seal"]["data"] |= {"tokens": "300:500", "samples": 8}
    recipe["datasets"][0]["path"] = "data/d.jsonl"
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))


def torment(name: str, stage: Stage, inputs: Path, work: Path, kills: int, until: float, rng: random.Random) -> str:
    """Kill a command at random moments, each time from the start, and return a summary.

    Raises:
        RuntimeError: it did not survive; the message has the reason.
    """
    undisturbed = work / name / "undisturbed"
    shutil.copytree(inputs, undisturbed)
    start = time.monotonic()
    attempt(stage, undisturbed)
    seconds = time.monotonic() - start
    expected = content(undisturbed, stage.outputs)
    if not expected:
        raise RuntimeError("it wrote nothing")
    survived = 0
    for trial in range(kills):
        if time.monotonic() > until:
            break
        folder = work / name / str(trial)
        shutil.copytree(inputs, folder)
        moment = rng.uniform(0, seconds)
        done = attempt(stage, folder, moment)
        files = content(folder, stage.outputs)
        if stage.atomic and any(expected.get(file) != files[file] for file in files):
            raise RuntimeError(f"killed after {moment:.2f} s, it left a half-written file")
        if not done and (stage.repeatable or files != expected):
            attempt(stage, folder)
        if content(folder, stage.outputs) != expected:
            raise RuntimeError(f"killed after {moment:.2f} s, the next run's outputs differ from an undisturbed run's")
        if left := [str(path) for path in folder.rglob("*.partial")]:
            raise RuntimeError(f"killed after {moment:.2f} s, the next run left {left[0]}")
        survived += 1
        shutil.rmtree(folder)
    if not survived:
        raise RuntimeError("no time was left to kill it")
    return f"{name}: {survived}/{survived} survived, {kills} requested, {seconds:.1f} s undisturbed"


def main() -> None:
    """Run the stages of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--kills", type=int, default=50, help="of every stage")
    parser.add_argument("--minutes", type=float, default=20, help="most time for a stage")
    parser.add_argument("--full", action="store_true", help="try a full disk as well")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has one thread
    if "train" in args.stages:
        import axolotl.cli.train  # noqa: F401
    import eval.probe.head_importance
    import eval.report  # noqa: F401

    rng, failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as work:
        inputs = Path(work) / "inputs"
        inputs.mkdir()
        prepare(inputs)
        for name in args.stages:
            until = time.monotonic() + 60 * args.minutes
            try:
                print(torment(name, STAGES[name], inputs, Path(work), args.kills, until, rng), flush=True)
                if args.full and STAGES[name].atomic:
                    print(starve(name, STAGES[name], inputs, Path(work)), flush=True)
            except RuntimeError as error:
                failed = True
                print(f"{name}: LOST: {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
