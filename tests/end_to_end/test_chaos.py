"""Commands that are killed, disks that are full, and long runs."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from chaos import Stage, torment
from paths import ROOT, TINY

from axolotl_plugins.common.io import check_output
from axolotl_plugins.common.tokenizer import load_tokenizer
from axolotl_plugins.seal.model_loading import load
from data_gen.dataset import Request, write
from eval.lm_eval_model import Responses
from eval.score_by_length import score_by_length


def chaos(*arguments: str, minutes: int = 10) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "chaos.py"), *arguments], env=environment, capture_output=True, text=True,
        timeout=60 * minutes,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_killed_command_ends_the_same_the_next_time_and_a_full_disk_costs_nothing():
    """Once per stage; ``make chaos`` kills 50 times, and training as well."""
    stages = ["data", "merge", "score", "report"]
    said = chaos("--full", "--kills", "1", "--stages", *stages)
    assert re.findall(r"^(\w+): 1/1 survived", said, re.MULTILINE) == stages
    assert re.findall(r"^(\w+): full: .*File too large", said, re.MULTILINE) == stages


STARVED = """
import resource, sys
from pathlib import Path
import eval.probe.head_importance, eval.score_by_length
from axolotl_plugins.common.console import run
from eval.__main__ import app as evaluate

pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
run(evaluate, "it", sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("more", "command"),
    [
        (150, "run --model {tiny} --lengths 1900 --samples 80 --batch-size 80 --out kept"),
        (80, "probe gradient --model {tiny} --lengths 1200,1900 --samples 4 --out kept/gradient.json"),
    ],
)
def test_memory_that_gives_out_is_one_line(more, command, tmp_path):
    """Each has ``more`` MB beyond its libraries, and needs several times as much."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/earlier.json").write_text("{}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", STARVED, str(more << 20), *command.format(tiny=TINY).split()]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if "out of memory" in line] == [done.stderr.splitlines()[-1]]
    # Only what the next run resumes from.
    left = {path.name for path in (tmp_path / "kept").iterdir() if not path.name.endswith(".partial")}
    assert left == {"earlier.json"}


@pytest.mark.slow
def test_killed_training_and_probing_end_the_same_the_next_time():
    said = chaos("--kills", "5", "--stages", "train", "probe", minutes=60)
    assert re.findall(r"^(\w+): 5/5 survived", said, re.MULTILINE) == ["train", "probe"]


def test_a_read_only_place_is_named():
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    if not (child := os.fork()):
        said = ""
        try:
            if os.geteuid() == 0:
                os.setuid(65534)  # to root nothing is read-only
            check_output(folder / "new" / "file.json")
        except ValueError as error:
            said = str(error)
        finally:
            os._exit(0 if said == f"{folder}/new/file.json: cannot be written, for {folder} is not writable: name "
                     "another path" else 1)  # fmt: skip
    assert os.waitpid(child, 0)[1] == 0
    folder.rmdir()


def memory() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
def test_memory_of_a_long_generation_is_bounded(tmp_path):
    request, tokenizer, found = Request("line", "1900", samples=1000), load_tokenizer(str(TINY)), []
    write(request, tokenizer, tmp_path / "d.jsonl", progress=lambda _: found.append(memory()))
    assert len(found) == 1000 and max(found[100:]) - found[100] < 50


@pytest.mark.slow
def test_memory_of_a_long_evaluation_is_bounded(tmp_path, monkeypatch):
    """2,000 samples; interrupted in the middle, the run resumes."""
    loaded, journal, found = load(TINY), tmp_path / "journal", []
    add = Responses.add_partial

    def measured(self, *arguments):
        found.append(memory())
        if len(found) == 1500:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(Responses, "add_partial", measured)
    options = {"lengths": [260], "samples": 2000, "batch_size": 10, "journal": journal}
    with pytest.raises(KeyboardInterrupt):
        score_by_length(loaded, "line", **options)
    assert max(found[200:]) - found[200] < 50
    done = len(journal.read_text().splitlines())
    assert done == 1499
    assert score_by_length(loaded, "line", **options).scores[0].count == 2000
    assert len(found) == 1500 + 2000 - done


def hasty() -> None:
    """Write in place."""
    with open("out", "w", buffering=1) as file:
        for _ in range(5):
            file.write("line\n")
            time.sleep(0.05)


def forgetful() -> None:
    """Resume from another state than that of the earlier run."""
    before = Path("hidden").read_text() if Path("hidden").exists() else ""
    Path("hidden").write_text(before + "x")
    time.sleep(0.2)
    Path("out").write_text(before)


@pytest.mark.parametrize(("work", "message"), [(hasty, "half-written"), (forgetful, "outputs differ")])
def test_the_harness_notices(work, message, tmp_path):
    (tmp_path / "inputs").mkdir()
    with pytest.raises(RuntimeError, match=message):
        torment("it", Stage(work, ("out",)), tmp_path / "inputs", tmp_path, 5, time.monotonic() + 60, random.Random(0))
