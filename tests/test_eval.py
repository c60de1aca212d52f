"""Scores: LongEval's parsing, lm-eval as harness, prompts equal to the training text, windows that hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_gen.generate import Request, generate
from eval.run import default_lengths
from eval.score import last_integer, wilson

TINY = Path(__file__).parent.parent / "recipes" / "tiny"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The <REGISTER_CONTENT> in line odd-shrimp is 24819.", 24819),
        ('The <REGISTER_CONTENT> in line verdant-efficiency is "24856".', 24856),
        ("24819 is right, not 5.", 5),
        ("12,345", 345),
        ("-7", 7),
        ("007", 7),
        ("no number", None),
        ("", None),
        ("line 3: 17\n", 17),
    ],
)
def test_last_integer(response, expected):
    assert last_integer(response) == expected


def test_wilson_brackets_the_share_as_in_the_textbook():
    low, high = wilson(5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    for count in (1, 50, 200):
        for correct in (0, count // 2, count):
            low, high = wilson(correct, count)
            assert 0 <= low <= correct / count <= high <= 1 and not math.isclose(low, high)


def test_default_lengths_are_the_papers_shares_of_the_window():
    assert default_lengths(32768) == [9216, 14336, 19456, 23552, 28672, 31744]
    assert max(default_lengths(2048)) <= 2048 - 128


def run_eval(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eval", "run", *arguments], cwd=cwd, capture_output=True, text=True, timeout=600
    )


def test_the_small_model_is_scored_by_the_command(tmp_path):
    done = run_eval(
        "--model", str(TINY), "--lengths", "260,400", "--samples", "6", "--batch-size", "4", "--out", "r.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert result["method"] == "base" and [score["count"] for score in result["scores"]] == [6, 6]
    # Answers come from the model: it knows short records, and each response names the line it was asked for.
    assert result["scores"][0]["accuracy"] >= 0.8
    for row in result["responses"]:
        assert row["correct"] == (last_integer(row["response"]) == last_integer(row["answer"]))
    # The test samples are those of the generator, from the split that training never sees.
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    drawn = [s["answer"] for s in generate(Request("line", "260", samples=6, split="test"), tokenizer)]
    assert [row["answer"] for row in result["responses"] if row["length"] == 260] == drawn


def test_prompt_ids_are_a_prefix_of_the_training_ids():
    from lm_eval.models.huggingface import HFLM

    from axolotl_plugins.seal.load import load
    from eval.run import Harness

    loaded = load(TINY)
    harness = Harness(pretrained=loaded.model, tokenizer=loaded.tokenizer, add_bos_token=False)
    assert isinstance(harness, HFLM)
    sample = next(generate(Request("line", "300", samples=1), loaded.tokenizer))
    text = harness.apply_chat_template(sample["messages"][:1])
    ids, mask = harness.tok_batch_encode([text])
    training = loaded.tokenizer.apply_chat_template(sample["messages"], return_dict=False)
    prompt = ids[0].tolist()
    assert prompt == training[: len(prompt)] and bool(mask.all())
    assert prompt.count(loaded.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model"], "cannot load no/such/model"),
        (["--model", str(TINY), "--task", "lines"], "task: found 'lines', expected one of line"),
        (["--model", str(TINY), "--lengths", "4k"], "lengths: found '4k'"),
        (["--model", str(TINY), "--lengths", "99999"], "99999 tokens do not fit into the model's window"),
        (["--model", str(TINY), "--lengths", "2040", "--samples", "1"], "do not fit into the model's window of 2048"),
        (["--model", str(TINY), "--samples", "0"], "samples: found 0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    done = run_eval(*arguments, cwd=tmp_path)
    lines = [text for text in done.stderr.splitlines() if text.startswith("eval: ")]
    assert done.returncode == 1 and len(lines) == 1 and message in lines[0], done.stderr[-3000:]
    assert not list(tmp_path.iterdir())
