"""Axolotl's own commands on a recipe, run as a user runs them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from axolotl_runs import STEPS, launch, refusal, run, write_recipe
from paths import ROOT, TINY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.provenance import text_hash


def scales(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with a checkpoint half-way."""
    folder = tmp_path_factory.mktemp("trained")
    write_recipe(folder, save_strategy="steps", save_steps=STEPS // 2)
    done = launch(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout + done.stderr


def test_training_moves_only_scales_and_logs_them(trained):
    folder, output = trained
    tensors = scales(folder / "out")
    layers, channels = 3, 128
    assert {tuple(t.shape) for t in tensors.values()} == {(channels,)} and len(tensors) == layers
    assert all(t.dtype == torch.float32 and (t != 1).all() and (t - 1).abs().max() < 0.5 for t in tensors.values())
    assert f"trainable params: {layers * channels} " in output
    assert re.search(rf"^seal: {STEPS} steps in \d+ s, \d+\.\d\d s each$", output, re.MULTILINE)
    log = json.loads(next((folder / "out").glob("checkpoint-*/trainer_state.json")).read_text())["log_history"]
    step = next(entry for entry in log if "loss" in entry)
    assert {"seal/mean", "seal/min", "seal/max", "seal/raised_layer", "seal/lowered_head"} <= step.keys()
    assert step["seal/min"] < 1 < step["seal/max"]
    card = (folder / "out/README.md").read_text()
    assert "# SEAL-C on" in card and "384 learned scales" in card and "task line, tokens 300:500" in card


def test_adapters_and_checkpoints_say_what_they_were_trained_on(trained):
    folder, _ = trained
    rows = [json.loads(row) for row in (folder / "data/tiny_line.jsonl").read_text().splitlines()]
    for adapter in (folder / "out", folder / "out" / f"checkpoint-{STEPS // 2}"):
        known = load(adapter).trained_on
        assert all(text_hash(message["content"]) in known for row in rows for message in row["messages"])
    manifest = json.loads((folder / "data/tiny_line.jsonl.manifest.json").read_text())
    record = json.loads((folder / "out/training_data.json").read_text())
    assert record["files"][0]["manifest"] == manifest
    tokens = [row["tokens"] for row in rows]
    assert record["tokens"] == [min(tokens), max(tokens)]


def test_resumed_training_ends_with_the_same_bits(trained):
    folder, _ = trained
    resumed = folder / "resumed"
    resumed.mkdir()
    write_recipe(resumed, save_strategy="steps", save_steps=STEPS // 2)
    checkpoint = f"checkpoint-{STEPS // 2}"
    shutil.copytree(folder / "out" / checkpoint, resumed / "out" / checkpoint)
    half, whole = scales(folder / "out" / checkpoint), scales(folder / "out")
    assert not any(torch.equal(half[name], whole[name]) for name in whole)
    done = launch(resumed, f"--resume-from-checkpoint=out/{checkpoint}")
    assert done.returncode == 0, done.stderr[-3000:]
    again = scales(resumed / "out")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_preprocess_makes_data_and_stops(tmp_path):
    write_recipe(tmp_path)
    done = run(tmp_path, "axolotl.cli.preprocess", "recipe.yml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "data/tiny_line.jsonl").exists() and any((tmp_path / "data/prepared").iterdir())


def test_evaluate_applies_the_adapter(trained):
    folder, _ = trained
    losses = {}
    for name, extra in (("base", []), ("tuned", ["--lora-model-dir=out"])):
        out = folder / name
        done = run(folder, "axolotl.cli.evaluate", "recipe.yml", f"--output-dir={out}", "--val-set-size=0.5", *extra)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = (out / "eval_summary.csv").read_text().splitlines()
        losses[name] = next(row for row in rows if row.startswith("loss"))
    assert losses["base"] != losses["tuned"]


def test_inference_applies_the_adapter_or_says_what_is_missing(trained):
    folder, _ = trained
    sample = json.loads((folder / "data/tiny_line.jsonl").read_text().splitlines()[0])
    prompt, answer = (message["content"] for message in sample["messages"])
    done = run(folder, "axolotl.cli.inference", "recipe.yml", "--lora-model-dir=out", stdin=prompt)
    # Axolotl samples at a temperature of 0.9, so the words that every answer begins with are all that is sure.
    begins = "The <REGISTER_CONTENT> in line"
    assert answer.startswith(begins) and begins not in prompt
    assert begins in done.stdout, done.stderr[-3000:]
    missing = run(folder, "axolotl.cli.inference", "recipe.yml", stdin=prompt)
    assert "add --lora-model-dir=FOLDER" in refusal(missing)


def test_axolotls_merge_has_the_adapters_logits(trained):
    folder, _ = trained
    done = run(folder, "axolotl.cli.merge_lora", "recipe.yml", "--lora-model-dir=out")
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(folder / "out/merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "line able-jeans: REGISTER_CONTENT is <6782>\n"}],
        return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(TINY)(ids).logits
        tuned = load(folder / "out").model(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "out/merged")(ids).logits
    assert (base - tuned).abs().max() > 1e-2
    torch.testing.assert_close(merged, tuned, atol=1e-4, rtol=0)


DATA = {"task": "line", "tokens": 400}
RECOMPUTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
ONCE_IN_TWO = RECOMPUTED | {"gradient_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2}}
SELECTIVE = RECOMPUTED | {"selective_checkpointing": True}
OFFLOADED = {"activation_offloading": "hidden_states"}
CCE = "axolotl.integrations.cut_cross_entropy"
LIGER = {"plugins": ["axolotl_plugins.seal.SealPlugin", "axolotl.integrations.liger.LigerPlugin"],
         "liger_rms_norm": True, "liger_rope": True, "liger_glu_activation": True}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "seed: missing"),
        ({"learning_rate": None}, "learning_rate: found None"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan"),
        ({"learning_rate": -0.01}, "learning_rate: found -0.01"),
        ({"learning_rate": "fast"}, "learning_rate: found 'fast'"),
        ({"weight_decay": 0.01}, "weight_decay: found 0.01"),
        ({"excess_length_strategy": None}, "excess_length_strategy: found None"),
        ({"excess_length_strategy": "truncate"}, "excess_length_strategy: found 'truncate'"),
        ({"pad_to_multiple_of": None}, "pad_to_multiple_of"),
        ({"pad_to_sequence_len": True}, "pad_to_sequence_len"),
        ({"sample_packing": True}, "sample_packing"),
        ({"merge_method": None}, "merge_method: legacy"),
        ({"seal": {"granularity": "heads"}}, "seal.granularity: found 'heads'"),
        ({"seal": {"granularty": "head"}}, "seal.granularty: no such setting"),
        ({"seal": {"granularity": "head", "data": {"task": "line", "token": 4}}}, "seal.data.token: no such setting"),
        ({"seal": {"granularity": "head", "data": {"task": "lines", "tokens": 400}}}, "expected one of line"),
        ({"seal": {"granularity": "head", "data": [DATA, DATA | {"tokenz": 4}]}}, "seal.data.1.tokenz: no such"),
        ({"seal": {"granularity": "head", "data": [DATA, DATA]}}, "describes 2 files"),
        ({"seal": None}, "seal.granularity: missing"),
        ({"context_parallel_size": 2}, "set `seal: context_parallel: 2` instead"),
        ({"sequence_parallel_degree": 2, "adapter": "lora"}, "set `seal: context_parallel: 2` instead"),
        ({"seal": {"granularity": "head", "context_parallel": 0}}, "seal.context_parallel: found 0"),
        ({"seal": {"granularity": "head", "context_parallel": 2}, "val_set_size": 0.1}, "val_set_size: found 0.1"),
        ({"fsdp_config": {"reshard_after_forward": True}}, "fsdp_version: found None"),
        ({"fsdp_config": {"reshard_after_forward": True}, "fsdp_version": 2, "bf16": True}, "mixed precision rounds"),
        ({"deepspeed": {"bf16": {"enabled": "auto"}}, "bf16": True}, "bf16.enabled rounds"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "bf16.enabled rounds"),
        (
            {
                "deepspeed": {"zero_optimization": {"stage": 3}},
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
            "set `use_reentrant: true`",
        ),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 0}}, "every_n_layers: found 0, expected 1 or more"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "every_n_layers: nothing is recomputed"),
        ({"selective_checkpointing": True}, "selective_checkpointing: nothing is recomputed"),
        (
            {"selective_checkpointing": True, "gradient_checkpointing": True},
            "needs `gradient_checkpointing_kwargs: use",
        ),
        (
            RECOMPUTED | {"activation_offloading": True, "selective_checkpointing": True},
            "every activation in host memory",
        ),
        (ONCE_IN_TWO | {"activation_offloading": "disk"}, "no effect with `activation_offloading: disk`"),
        (
            ONCE_IN_TWO | {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
            "needs `gradient_checkpointing_kwargs",
        ),
        (
            RECOMPUTED
            | {"selective_checkpointing": True}
            | {"plugins": ["axolotl_plugins.self_extend.SelfExtendPlugin", "axolotl_plugins.seal.SealPlugin"]},
            "no effect on Self-Extend's attention",
        ),
        (SELECTIVE | {"seal": {"granularity": "head", "context_parallel": 2}}, "attention of seal.context_parallel"),
        ({"torch_compile": True}, "a mask of T x T"),
        (
            {"plugins": [*LIGER["plugins"], f"{CCE}.CutCrossEntropyPlugin"]},
            "CutCrossEntropyPlugin: logits are computed",
        ),
    ],
)
def test_recipes_that_would_ruin_a_run_are_refused(changes, message, tmp_path, capsys):
    """The plugin's own entry, called as Axolotl calls it; a launch of one of them is tried below."""
    from axolotl.utils.dict import DictDefault

    from axolotl_plugins.seal import SealPlugin

    write_recipe(tmp_path, **changes)
    with pytest.raises(SystemExit) as refused:
        SealPlugin().register(DictDefault(yaml.safe_load((tmp_path / "recipe.yml").read_text())))
    assert message in str(refused.value) and str(refused.value).startswith("seal: ")
    assert "\n" not in str(refused.value)


def test_the_plugins_readme_has_a_valid_recipe_and_lists_every_setting(tmp_path):
    from axolotl_plugins.seal.args import DataArgs, SealBlock
    from axolotl_plugins.seal.validation import check_keys, check_recipe

    text = (ROOT / "axolotl_plugins/seal/README.md").read_text()
    (tmp_path / "recipe.yml").write_text(text.split("```yaml\n")[1].split("```")[0])
    recipe = yaml.safe_load((tmp_path / "recipe.yml").read_text())
    assert check_recipe(recipe).granularity == "channel" and recipe["adapter"] == "seal"
    check_keys({"axolotl_config_path": tmp_path / "recipe.yml"})
    expected = []
    for prefix, block in (("", SealBlock), ("data.", DataArgs)):
        for name, field in block.model_fields.items():
            default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
            expected.append([f"`{prefix}{name}`", default, field.description])
    table = text.split("|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in table] == expected


def test_launching_a_ruinous_recipe_prints_one_line_and_writes_nothing(tmp_path):
    write_recipe(tmp_path, weight_decay=0.1)
    assert "weight_decay: found 0.1" in refusal(launch(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_ligers_kernels_without_a_gpu_are_refused_in_one_line(tmp_path):
    """And its loss on all tokens anywhere; Axolotl's Liger plugin is listed behind this project's."""
    write_recipe(tmp_path, **LIGER)
    assert "liger_rms_norm, liger_rope, liger_glu_activation: Liger's kernels need a GPU" in refusal(launch(tmp_path))
    write_recipe(tmp_path, **LIGER, liger_fused_linear_cross_entropy=True)
    assert "liger_fused_linear_cross_entropy: logits are computed for answers only" in refusal(launch(tmp_path))


def test_data_that_does_not_match_its_recipe_is_refused(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "data", tmp_path / "data", ignore=shutil.ignore_patterns("prepared"))
    recipe = write_recipe(tmp_path)
    recipe["seal"]["data"]["samples"] = 9
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert "samples 8, but 9 is requested" in refusal(launch(tmp_path))


def test_a_base_that_lacks_tokens_is_refused(tmp_path):
    """Axolotl would give it random embeddings, which no adapter carries."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.resize_token_embeddings(model.config.vocab_size - 8)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    write_recipe(tmp_path, base_model="base")
    assert "has 8215 embeddings, fewer than its tokenizer has tokens" in refusal(launch(tmp_path))
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_sample_longer_than_sequence_len_stops_the_run(tmp_path):
    write_recipe(tmp_path, sequence_len=320)
    done = launch(tmp_path)
    assert done.returncode != 0 and not (tmp_path / "out/adapter_model.safetensors").exists()


def test_an_interrupted_training_leaves_no_adapter(tmp_path):
    """Axolotl would save the scales as they are, and exit as if all were well."""
    write_recipe(tmp_path, max_steps=1000, num_epochs=1000)
    command = [sys.executable, "-m", "axolotl.cli.train", "recipe.yml"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while "seal/mean" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 1
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("seal: interrupted")]
    assert len(said) == 1 and not list((tmp_path / "out").glob("*.safetensors"))


def test_weights_in_16_bits_leave_scales_in_32(tmp_path):
    """What sharded recipes say; Axolotl alone would train in mixed precision, which this machine has none of."""
    write_recipe(tmp_path, bf16=False, bfloat16=True)
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for scale in scales(tmp_path / "out").values():
        assert scale.dtype == torch.float32 and (scale != scale.bfloat16()).any() and (scale != 1).all()


KINDS = {
    "reentrant": {"gradient_checkpointing": True},
    "once": RECOMPUTED,
    "every2": ONCE_IN_TWO,
    "selective": SELECTIVE,
    "selective-every2": SELECTIVE | ONCE_IN_TWO,
    "offload": RECOMPUTED | OFFLOADED,
    "selective-every2-offload": SELECTIVE | ONCE_IN_TWO | OFFLOADED,
    "selective-offload_all": RECOMPUTED | OFFLOADED | {"selective_checkpointing": {"offload": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_checkpointing_learns_the_same_bits(kind, trained, tmp_path):
    """Gradients of the embeddings are computed for one of them alone."""
    folder, _ = trained
    whole = scales(folder / "out")
    write_recipe(tmp_path, **kind)
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("saving `aten::_scaled_dot_product" in done.stdout + done.stderr) == ("selective_checkpointing" in kind)
    again = scales(tmp_path / "out")
    assert all((whole[name] != 1).all() and torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_do_what_two_accumulated_steps_do(tmp_path):
    """Data parallel over gloo: the same scales, bit for bit."""
    folders = {name: tmp_path / name for name in ("accumulated", "parallel")}
    for folder in folders.values():
        folder.mkdir()
    write_recipe(folders["accumulated"], gradient_accumulation_steps=2)
    write_recipe(folders["parallel"])
    done = launch(folders["accumulated"])
    assert done.returncode == 0, done.stderr[-3000:]
    two = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511")
    done = run(folders["parallel"], *two, "-m", "axolotl.cli.train", "recipe.yml", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (scales(folder / "out") for folder in folders.values())
    assert all((ours[name] != 1).all() and torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "changes"), [(2, {}), (4, {"gradient_accumulation_steps": 2})])
def test_two_processes_learn_from_one_sample_what_one_process_learns(processes, changes, tmp_path):
    """Each from a half of the tokens; four learn from two samples, as one does that accumulates two steps."""
    folders = {name: tmp_path / name for name in ("whole", "shared")}
    for folder in folders.values():
        folder.mkdir()
    both = {"gradient_checkpointing": True, "save_strategy": "steps", "save_steps": STEPS, "max_steps": None}
    recipe = write_recipe(folders["whole"], **both, **changes)
    write_recipe(folders["shared"], **both, seal=recipe["seal"] | {"context_parallel": 2})
    done = launch(folders["whole"])
    assert done.returncode == 0, done.stderr[-3000:]
    several = ("torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29513")
    done = run(folders["shared"], *several, "-m", "axolotl.cli.train", "recipe.yml", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    whole, shared = (scales(folder / "out") for folder in folders.values())
    for name, scale in whole.items():
        assert (scale != 1).all()
        # AdamW makes much of the rounding of gradients that are all but zero.
        torch.testing.assert_close(shared[name], scale, rtol=0, atol=1e-4)
    # All samples were learned from: an epoch counts samples, not processes.
    steps = recipe["seal"]["data"]["samples"] // changes.get("gradient_accumulation_steps", 1)
    logs = []
    for folder in folders.values():
        state = json.loads((folder / f"out/checkpoint-{steps}/trainer_state.json").read_text())
        assert state["epoch"] == 1 and state["max_steps"] == steps
        logs.append(state["log_history"])
    for key in ("loss", "grad_norm"):
        ours, theirs = ([entry[key] for entry in log if key in entry] for log in logs)
        assert ours == pytest.approx(theirs, rel=1e-3) and len(ours) == steps


@pytest.mark.slow
@pytest.mark.parametrize(("share", "tolerance"), [(1, 1e-5), (2, 1e-4)])
def test_weights_spread_by_zero3_learn_what_whole_weights_learn(share, tolerance, tmp_path):
    """In two processes over gloo, in float32, which is what DeepSpeed makes of all weights if it has no other dtype.

    Without GPUs Accelerate takes each process for the only one, so both learn from the same samples, or each from a
    half of them.
    """
    pytest.importorskip("deepspeed", reason="needs deepspeed, which `.[gpu]` installs")
    folders = {name: tmp_path / name for name in ("whole", "spread")}
    for folder in folders.values():
        folder.mkdir()
    recipe = write_recipe(folders["whole"])
    zero3 = yaml.safe_load((ROOT / "recipes/longchat13b_line_sealc_zero3.yml").read_text())
    settings = {"deepspeed": zero3["deepspeed"], "gradient_checkpointing": share > 1}
    write_recipe(folders["spread"], **settings, seal=recipe["seal"] | {"context_parallel": share})
    done = launch(folders["whole"])
    assert done.returncode == 0, done.stderr[-3000:]
    two = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29512")
    done = run(folders["spread"], *two, "-m", "axolotl.cli.train", "recipe.yml")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (scales(folder / "out") for folder in folders.values())
    for name, scale in ours.items():
        assert (scale != 1).all() and theirs[name].dtype == torch.float32
        torch.testing.assert_close(theirs[name], scale, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_is_trained_over_and_merged_into_full_precision(bits, tmp_path):
    write_recipe(tmp_path, **{f"load_in_{bits}bit": True})
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((scale != 1).all() for scale in scales(tmp_path / "out").values())
    done = run(tmp_path, "axolotl_plugins.seal", "merge", "out", "merged")
    assert done.returncode == 0, done.stderr[-3000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32
