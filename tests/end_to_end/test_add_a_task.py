"""The task that docs/add-a-task.md adds works everywhere: data, tuning, scores, reports, command lines."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT, TINY
from peft import get_peft_model

from axolotl_plugins.common.tokenizer import count_tokens
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.tune import tune
from data_gen.dataset import Request, generate
from data_gen.tasks import TASKS
from eval.results import TITLES
from eval.score_by_length import score_by_length
from eval.score_samples import score_samples
from eval.spec import METRICS

CODE = (ROOT / "docs" / "add-a-task.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.fixture
def passkey(tmp_path, monkeypatch):
    """The module of the page, in a package of its own."""
    package = tmp_path / "more_tasks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "passkey.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert "passkey" not in TASKS and "passkey" not in METRICS and "passkey" not in TITLES
    yield importlib.import_module("more_tasks.passkey")
    del TASKS["passkey"]
    for name in ("more_tasks", "more_tasks.passkey"):
        del sys.modules[name]


def test_the_pages_task_is_drawn_tuned_scored_and_reported(passkey):
    loaded = load(TINY)
    samples = {
        split: list(generate(Request("passkey", "400", samples=8, split=split), loaded.tokenizer))
        for split in ("train", "test")
    }
    filler = len(loaded.tokenizer(passkey.FILLER)["input_ids"])
    for rows in samples.values():
        for row in rows:
            assert count_tokens(loaded.tokenizer, row["messages"]) == row["tokens"] <= 400 < row["tokens"] + 2 * filler
            assert row["references"][0] in row["messages"][0]["content"]
            assert METRICS["passkey"](row["answer"], row["references"]) == 1 and not METRICS["passkey"]("12", ["34567"])
    assert not {row["answer"] for row in samples["train"]} & {row["answer"] for row in samples["test"]}

    model = get_peft_model(load(TINY).model, SealConfig(granularity="head"))
    losses = tune(model, [row["messages"] for row in samples["train"][:2]], loaded.tokenizer, lr=1e-2)
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(losses) == 2 and all((scale != 1).any() for scale in scales)

    rows = score_samples(model.eval(), loaded.tokenizer, "passkey", [{**row, "length": 400} for row in samples["test"]])
    assert [row["score"] for row in rows] == [
        passkey.score(row["response"], sample["references"]) for row, sample in zip(rows, samples["test"], strict=True)
    ]
    result = score_by_length(loaded, "passkey", lengths=[400], samples=3)
    assert [row["references"] for row in result.responses] == [row["references"] for row in samples["test"][:3]]
    assert TITLES["passkey"] == "Passkey retrieval" and TITLES["mmlu"] == "MMLU"


def test_a_file_in_the_folder_is_a_task_of_every_command(tmp_path):
    for package in ("axolotl_plugins", "data_gen", "eval", "recipes"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data_gen/tasks/passkey.py").write_text(CODE)

    def command(*arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, timeout=180)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]

    length = ("--samples", "2", "--out")
    command("data_gen", "passkey", "--tokenizer", str(TINY), "--tokens", "300", *length, "d.jsonl")
    assert json.loads((tmp_path / "d.jsonl.manifest.json").read_text())["task"] == "passkey"
    command("eval", "run", "--model", str(TINY), "--task", "passkey", "--lengths", "300", *length, "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["task"] == "passkey" and len(result["responses"]) == 2
    command("eval", "report", "--results", str(tmp_path), "--out", "page.html")
    assert "Passkey retrieval" in (tmp_path / "page.html").read_text()
