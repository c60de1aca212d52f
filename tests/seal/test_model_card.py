"""What a model card says, from an adapter's folder and results."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from miniatures import build
from peft import get_peft_model

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.model_card import card, push
from eval.table import score_tables

LONGCHAT = "lmsys/longchat-7b-v1.5-32k"


@pytest.fixture
def adapter(tmp_path):
    model = get_peft_model(build("llama_mha"), SealConfig(granularity="head"))
    model.peft_config["default"].base_model_name_or_path = LONGCHAT
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "seal_scale" in name:
                parameter += torch.linspace(-0.25, 0.25, parameter.numel())
    model.save_pretrained(tmp_path / "adapter")
    manifest = {"task": "line", "tokens": "31000", "samples": 50, "seed": 0}
    data = {"files": [{"path": "data/x.jsonl", "sha256": "ab12", "manifest": manifest}]}
    (tmp_path / "adapter/training_data.json").write_text(json.dumps(data))
    return tmp_path / "adapter"


def result(model, lengths):
    scores = [{"length": n, "tokens": n, "count": 50, "score": 0.9, "low": 0.8, "high": 0.95} for n in lengths]
    return {"model": str(model), "base": LONGCHAT, "method": "SEAL-H", "task": "line", "window": 32768,
            "scores": scores, "mean": scores[0], "responses": []}  # fmt: skip


def test_a_card_has_method_data_and_scores_beside_the_papers(adapter, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "a.json").write_text(json.dumps(result(f"{adapter}/", [9000, 31000, 33000])))
    (results / "b.json").write_text(json.dumps(result("another", [14000])))
    text = card(adapter, score_tables(results, str(adapter)))
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == LONGCHAT and front["library_name"] == "peft"
    assert "8 learned scales of attention outputs (one per head in 2 layers; from 0.750 to 1.250, mean 1.000)" in text
    assert "- task line, tokens 31000, samples 50, seed 0 (SHA-256 ab12)" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "0.90" in line]
    assert [row.split("|")[1].strip() for row in rows] == ["9,000", "31,000", "33,000"]
    assert [row.split("|")[4].strip() for row in rows] == ["1.00", "0.80", ""]  # Table 1


def test_pushing_without_a_hub_is_one_line(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="someone/adapter: the hub refused"):
        push(adapter, "someone/adapter", private=True)


def test_the_command_writes_the_card_alone(adapter):
    command = [sys.executable, "-m", "eval", "push", str(adapter), "--results", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (adapter / "README.md").read_text().startswith(f"---\nbase_model: {LONGCHAT}\n")
