"""A checkpoint whose modelling code lies beside its weights: trained, scored, merged, verified and exported."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
import yaml
from axolotl_runs import launch, write_recipe
from paths import TINY
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_plugins.common.console import run
from axolotl_plugins.seal.__main__ import app as seal
from axolotl_plugins.seal.merge import merge
from axolotl_plugins.seal.model_loading import load
from eval.__main__ import app as evaluate
from recipes.__main__ import app as recipes

CONFIG_CODE = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda module, inputs, output: output.flip(-1))  # not Llama's
"""
CODE = {"configuration_own.py": CONFIG_CODE, "modeling_own.py": MODEL_CODE}
IDS = torch.arange(3, 43)[None]
REFUSED = r"seal: .*code of its own, which only --trust-remote-code"


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the base model and an adapter that Axolotl trained."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(TINY, folder / "base")
    for name, code in CODE.items():
        (folder / "base" / name).write_text(code)
    file = folder / "base/config.json"
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads(file.read_text()) | {"model_type": "own", "auto_map": classes}
    file.write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    write_recipe(folder, base_model="base", trust_remote_code=True)
    done = launch(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_commands_run_a_checkpoints_own_code_only_if_asked(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for app, command in (
        (evaluate, "run --model out --lengths 300 --samples 2"),
        (seal, "merge out merged"),
        (seal, "verify merged"),
        (seal, "export out ia3"),
    ):
        with pytest.raises(SystemExit, match=REFUSED):
            run(app, "it", command.split())
        run(app, "it", [*command.split(), "--trust-remote-code"])
    tuned = logits(load(folder / "out", trust_remote_code=True).model)
    base, merged = (
        AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True) for name in ("base", "merged")
    )
    assert {name: (folder / "merged" / name).read_text() for name in CODE} == CODE
    torch.testing.assert_close(logits(merged), tuned, atol=5e-4, rtol=0)
    assert (logits(base) - tuned).abs().max() > 1e-3
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder / "ia3")), tuned, atol=5e-4, rtol=0)


PROBED = "--lengths 300 --samples 1 --out p.json"


@pytest.mark.parametrize(
    ("command", "end"),
    [
        ("heads --model out " + PROBED, ""),
        ("channels --model out --heads L0H0 " + PROBED, ""),
        ("gradient --model out " + PROBED, ""),
        ("direct --model base --adapter out --length 300 --find 1 --out p.json", "search more with --find"),
        ("transfer --model base --adapter a=out --tasks line --lengths 300,400 --samples 1 --out p.json", ""),
    ],
)
def test_probes_run_a_checkpoints_own_code_only_if_asked(command, end, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=REFUSED):
        run(evaluate, "it", ["probe", *command.split()])
    with pytest.raises(SystemExit, match=end) if end else contextlib.nullcontext():
        run(evaluate, "it", ["probe", *command.split(), "--trust-remote-code"])


def test_a_recipe_runs_a_checkpoints_own_code_only_if_asked(folder, monkeypatch):
    monkeypatch.chdir(folder)
    command = ["new", "base", "--tokens", "300", "--no-gpu", "--out", "new.yml"]
    with pytest.raises(SystemExit, match=REFUSED):
        run(recipes, "it", command)
    run(recipes, "it", [*command, "--trust-remote-code"])
    text = (folder / "new.yml").read_text()
    assert yaml.safe_load(text)["trust_remote_code"] is True
    sweep = ["probe", "sweep", "--rates", "0.01", "--samples", "2", "--validation", "1", "--lengths", "300"]
    run(evaluate, "it", [*sweep, "--recipe", "new.yml", "--out", "s.json"])
    assert json.loads((folder / "s.json").read_text())["cells"]
    (folder / "new.yml").write_text(text.replace("trust_remote_code: true\n", ""))
    with pytest.raises(SystemExit, match=REFUSED):
        run(evaluate, "it", [*sweep, "--recipe", "new.yml", "--out", "t.json"])


def test_a_stretched_window_is_merged_into_the_checkpoints_own_config(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    adapter = shutil.copytree(folder / "out", tmp_path / "adapter")
    config = json.loads((folder / "base/config.json").read_text())
    stretched = config["rope_parameters"] | {"rope_type": "linear", "factor": 4.0}
    (adapter / "config.json").write_text(json.dumps(config | {"rope_parameters": stretched}))
    merge(adapter, tmp_path / "merged", trust_remote_code=True, report=len)
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written["rope_parameters"]["factor"] == 4.0 and written["auto_map"] == config["auto_map"]
