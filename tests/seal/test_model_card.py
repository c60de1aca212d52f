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
from axolotl_plugins.seal.provenance import record
from eval.result_tables import score_tables

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


def test_a_card_shows_own_data_with_an_example_and_scores_by_length(adapter, tmp_path):
    file = tmp_path / "train.jsonl"
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "57.5"}]
             for text in ("a ```b``` " + "x" * 4000 + " How warm?", "second")]  # fmt: skip
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = record([{"path": str(file), "type": "chat_template"}])
    (adapter / "training_data.json").write_text(json.dumps({**data, "tokens": [210, 1512]}))
    (tmp_path / "results").mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/seal_merge.json").write_text(json.dumps({"adapter": str(adapter)}))
    scored = {**result(adapter, [256, 512]), "task": "data/test.jsonl", "title": "My test"}
    for name, row in {"own": scored, "merged": {**scored, "model": str(tmp_path / "merged")},
                      "before": {**scored, "model": LONGCHAT, "method": "base"}}.items():  # fmt: skip
        (tmp_path / f"results/{name}.json").write_text(json.dumps(row))
    text = card(adapter, score_tables(tmp_path / "results", str(adapter)))
    assert "- train.jsonl, samples 2 (SHA-256 " in text and "The samples have 210 to 1,512 tokens." in text
    assert "````text\na ```b``` xxx" in text and "x How warm?\n````\n\n```text\n57.5\n```" in text
    assert "\n[... 3,120 characters left out ...]\n" in text and "second" not in text
    assert "| longest prompt (tokens) | score (95 % interval) | base model | samples |\n| ---: |" in text
    for row in ("### My test", "| 256 | 0.90 (0.80-0.95) | 0.90 | 50 |", "| 512 | 0.90 (0.80-0.95) | 0.90 | 50 |"):
        assert text.count(row) == 1  # adapter and merged model have the same scores


def test_a_dry_run_prints_the_card_and_the_files_and_writes_nothing(adapter):
    (adapter / "notes.txt").touch()
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    command = [sys.executable, "-m", "eval", "push", str(adapter), "me/adapter", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("---\nbase_model: "), done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == (
        "me/adapter: would have README.md, adapter_config.json, adapter_model.safetensors, training_data.json"
    )
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before


def test_pushing_without_a_hub_is_one_line(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="someone/adapter: the hub refused"):
        push(adapter, "someone/adapter", private=True)


def test_an_adapter_of_a_local_base_model_is_not_uploaded(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"names its base model by the folder .* set `base_model_name_or_path`"):
        push(adapter, "someone/adapter", private=True)
    assert "learned scales" not in (adapter / "README.md").read_text()  # PEFT's own


def test_the_command_writes_the_card_alone(adapter):
    command = [sys.executable, "-m", "eval", "push", str(adapter), "--results", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (adapter / "README.md").read_text().startswith(f"---\nbase_model: {LONGCHAT}\n")
