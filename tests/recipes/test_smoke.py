"""Recipes on random-weight miniatures of their models: every method on every family, through Axolotl's own program.

One process trains them one after the other, which takes a second each; ``make recipes-smoke`` launches each recipe of
the matrix in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from safetensors.torch import load_file
from smoke import LAYERS, model_of, prepare, train_all, trained

from recipes.tools.render import read_matrix

# The head of a recipe, ``accelerate launch -m axolotl.cli.train``, without the launch; plugins start anew each time.
TRAIN = """
import sys
from axolotl.cli.train import do_cli
from axolotl.integrations.base import PluginManager
files, sys.argv = sys.argv[1:], sys.argv[:1]
for file in files:
    PluginManager._instance = None
    do_cli(file)
"""
MODELS = ("longchat7b", "mistral7b", "longchat13b")  # Llama, grouped queries without a sliding window, 40 heads
# LoRA comes last: for it Axolotl exchanges Llama's attention, for good.
NAMES = [
    *(f"{model}_line_{method}" for model in MODELS for method in ("sealh", "sealc")),
    "llama31_8b_vt_sealh",
    "llama31_8b_fwe_sealc",
    "llama2_7b_ntk_niah_sealc",
    "llama2_7b_selfextend_line_sealh",
    "longchat7b_longbench_sealc",
    "smollm2_multi_sealh",
    *(f"{model}_line_{method}" for model in MODELS for method in ("seall", "seald")),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    files = prepare(NAMES, folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    command = [sys.executable, "-c", TRAIN, *map(str, files.values())]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_what_its_method_says(name, work):
    shape = read_matrix()["shapes"][read_matrix()["models"][model_of(name)]["shape"]]
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    width, shared = 8 * heads, 8 * groups
    # LoRA of rank 4 on q, k, v and o: rows and columns of each; DoRA adds one number for each row.
    lora = 4 * (2 * (width + width) + 2 * (width + shared))
    per_layer = {"sealh": heads, "sealc": width, "seall": lora, "seald": lora + 2 * width + 2 * shared}
    assert trained(work / name) == LAYERS * per_layer[name.rsplit("_", 1)[1]]


def test_adapters_carry_their_template_and_the_stretch_of_their_window(work):
    vicuna = (ROOT / "recipes/templates/vicuna_v1.1.jinja").read_text().strip()
    assert (work / "longchat7b_line_sealc/chat_template.jinja").read_text().strip() == vicuna
    assert (work / "mistral7b_line_sealc/chat_template.jinja").read_text() != vicuna
    for name, kind in (("llama2_7b_ntk_niah_sealc", "default"), ("llama2_7b_selfextend_line_sealh", "self_extend")):
        rope = yaml.safe_load((work / name / "config.json").read_text())["rope_parameters"]
        wanted = read_matrix()["models"][model_of(name)]["model_config"]["rope_parameters"]
        assert wanted["rope_type"] == kind and wanted.items() <= rope.items()


def test_what_did_not_train_is_told(work, tmp_path: Path):
    from safetensors.torch import save_file

    tensors = load_file(work / "longchat7b_line_sealc/adapter_model.safetensors")
    for value, message in ((1.0, "was not trained"), (float("nan"), "is not finite")):
        save_file({**tensors, min(tensors): tensors[min(tensors)] * 0 + value}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            trained(tmp_path)
    with pytest.raises(ValueError, match=r"not a recipe of matrix\.yml"):
        model_of("qwen_line_sealc")


def test_recipes_that_were_trained_are_not_trained_again(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "adapter_model.safetensors").touch()
    (tmp_path / "good.seconds").write_text("1.5")
    missing = tmp_path / "missing.yml"
    assert train_all({"good": missing}, tmp_path, 1) == {"good": 1.5}
    with pytest.raises(RuntimeError, match=r"(?s)bad: failed with exit status 1; .*missing\.yml"):
        train_all({"good": missing, "bad": missing}, tmp_path, 2)
    assert not (tmp_path / "bad.seconds").exists()


@pytest.mark.slow
def test_the_command_launches_recipes_and_prints_a_table():
    command = [sys.executable, "tests/smoke.py", "longchat13b_line_seald", "llama31_8b_cwe_sealc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "longchat13b_line_seald" in done.stdout and "llama31_8b_cwe_sealc" in done.stdout
