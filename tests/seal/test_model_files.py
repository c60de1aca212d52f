"""Merged folders keep everything of their base models but scaled tensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from miniatures import COMMON
from paths import ROOT, TINY
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl_plugins.common.io import file_hash
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.export import export_ia3
from axolotl_plugins.seal.merge import RECORD, merge, verify

IDS = torch.arange(3, 43)[None]


def save_base(folder, model_type, dtype=torch.float32, **settings):
    """A random-weight miniature with the tiny model's tokenizer; biases are not zero."""
    config = CONFIG_MAPPING[model_type](**{**COMMON, "vocab_size": 8223, "max_position_embeddings": 512, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)


def save_adapter(base, out, granularity="channel"):
    """An adapter of a base model with scales far from 1; returns the wrapped model's logits."""
    config = SealConfig(granularity=granularity, base_model_name_or_path=str(base))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.linspace(-0.5, 0.5, parameter.numel())
    model.save_pretrained(out)
    return logits(model)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


DEEPSEEK = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A bfloat16 DeepSeek-V3 whose router bias is float32, and an adapter."""
    folder = tmp_path_factory.mktemp("deepseek")
    save_base(folder / "base", "deepseek_v3", torch.bfloat16, **DEEPSEEK)
    weights = folder / "base/model.safetensors"
    tensors = load_file(weights)
    assert BIAS in tensors
    tensors[BIAS] = torch.full_like(tensors[BIAS], 0.10333, dtype=torch.float32)
    save_file(tensors, weights, metadata={"format": "pt"})
    save_adapter(folder / "base", folder / "adapter", "head")
    merge(folder / "adapter", folder / "merged", report=lambda _: None)
    return folder


def test_tensors_that_are_not_scaled_keep_bytes_and_dtype(deepseek):
    base, merged = tensors_of(deepseek / "base"), tensors_of(deepseek / "merged")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)}
    assert all(base[name].dtype == merged[name].dtype for name in base)
    assert merged[BIAS].dtype == torch.float32 and torch.equal(merged[BIAS], torch.full_like(merged[BIAS], 0.10333))


@pytest.mark.parametrize("name", [BIAS, "model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_verify_compares_every_tensor_of_the_files(deepseek, name, tmp_path):
    said = []
    verify(deepseek / "merged", report=said.append)
    count = len(tensors_of(deepseek / "base"))
    assert f"2 of {count} tensors merged" in said[0]
    shutil.copytree(deepseek / "merged", tmp_path / "merged")
    weights = tmp_path / "merged/model.safetensors"
    tensors = load_file(weights)
    tensors[name].view(-1)[0] = tensors[name].view(-1)[0].to(torch.bfloat16) + 0.01
    save_file(tensors, weights, metadata={"format": "pt"})
    record = json.loads((tmp_path / "merged" / RECORD).read_text())
    record["files"][weights.name] = file_hash(weights)
    (tmp_path / "merged" / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{name} differs from a merge into"):
        verify(tmp_path / "merged", report=lambda _: None)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "minicpm3"])
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_export_of_values_of_another_size_than_keys(model_type, granularity, tmp_path):
    """Multi-head latent attention: 4 heads of 12 channels, where the config's head_dim is 8."""
    save_base(tmp_path / "base", model_type, **DEEPSEEK)
    tuned = save_adapter(tmp_path / "base", tmp_path / "adapter", granularity)
    export_ia3(tmp_path / "adapter", tmp_path / "ia3")
    assert {tensor.shape for tensor in tensors_of(tmp_path / "ia3").values()} == {(1, 48)}
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ia3")
    torch.testing.assert_close(logits(stock), tuned, atol=1e-5, rtol=0)


GEMMA3 = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
          "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
OLDER = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}


@pytest.mark.parametrize("older", [True, False])
def test_a_merged_config_has_the_rope_keys_of_both_generations(older, tmp_path):
    save_base(tmp_path / "base", "gemma3_text", **GEMMA3, **OLDER)
    file = tmp_path / "base/config.json"
    config = json.loads(file.read_text())
    rope = config["rope_parameters"]
    assert not OLDER.keys() & config.keys() and rope["full_attention"]["factor"] == 8.0
    if older:  # as on the hub
        del config["rope_parameters"]
        file.write_text(json.dumps({**config, **OLDER}))
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    merged = json.loads((tmp_path / "merged/config.json").read_text())
    assert merged == json.loads(file.read_text()) | OLDER
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters == rope


@pytest.mark.parametrize("older", [True, False])
def test_a_window_that_was_stretched_for_the_adapter_is_merged(older, tmp_path):
    save_base(tmp_path / "base", "llama")
    if older:
        file = tmp_path / "base/config.json"
        config = json.loads(file.read_text())
        del config["rope_parameters"]
        file.write_text(json.dumps({**config, "rope_theta": 10000.0, "vendor": {"kept": 1}}))
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    config = AutoConfig.from_pretrained(tmp_path / "base", max_position_embeddings=2048)
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}
    config.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written["rope_theta"] == 20000.0 and written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert written["rope_parameters"] == config.rope_parameters and written["max_position_embeddings"] == 2048
    assert written.get("vendor") == ({"kept": 1} if older else None)


def tiny_copy(folder):
    shutil.copytree(TINY, folder)
    return folder


def test_an_invalid_generation_config_is_copied(tmp_path):
    base = tiny_copy(tmp_path / "base")
    file = base / "generation_config.json"
    file.write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}))
    save_adapter(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def test_without_a_chat_template_random_tokens_prove_a_merge(tmp_path):
    base = tiny_copy(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    tuned = save_adapter(base, tmp_path / "adapter")
    record = merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    assert record["difference"] <= 1e-4
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), tuned, atol=1e-4, rtol=0
    )
    verify(tmp_path / "merged", report=lambda _: None)


def test_files_of_the_base_are_copied_and_other_weights_are_not(tmp_path):
    base = tiny_copy(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="1MB")
    shards = sorted(file.name for file in base.glob("model-*.safetensors"))
    assert len(shards) > 2
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "README.md", ".gitattributes"):
        (base / name).write_text("other")
    for name in ("modeling_own.py", "LICENSE", "tekken.json"):
        (base / name).write_text("{}")
    save_adapter(base, tmp_path / "adapter")
    os.umask(umask := os.umask(0o022))
    merge(tmp_path / "adapter", tmp_path / "merged", "o_proj", report=lambda _: None)
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert files == {*shards, "model.safetensors.index.json", "config.json", "generation_config.json", RECORD,
                     "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_own.py", "LICENSE",
                     "tekken.json"}  # fmt: skip
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "merged").iterdir()} == {0o666 & ~umask}
    scaled = {json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
              for name in json.loads((tmp_path / "merged" / RECORD).read_text())["changed"]}  # fmt: skip
    same = {name for name in files - {RECORD, "config.json"}
            if (base / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()}  # fmt: skip
    assert same == files - {RECORD, "config.json"} - scaled and scaled < set(shards)


def test_the_adapters_tokenizer_replaces_the_bases_only_if_it_differs(tmp_path):
    base = tiny_copy(tmp_path / "base")
    own = json.loads((base / "tokenizer_config.json").read_text()) | {"note": "kept"}
    (base / "tokenizer_config.json").write_text(json.dumps(own))
    save_adapter(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "same", report=lambda _: None)
    assert json.loads((tmp_path / "same/tokenizer_config.json").read_text())["note"] == "kept"
    tokenizer.chat_template += "{# another #}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "template", report=lambda _: None)
    assert json.loads((tmp_path / "template/tokenizer_config.json").read_text())["note"] == "kept"
    assert AutoTokenizer.from_pretrained(tmp_path / "template").chat_template == tokenizer.chat_template
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "other", report=lambda _: None)
    assert AutoTokenizer.from_pretrained(tmp_path / "other").eos_token == "<pad>"


CHANGED_VALUES = {
    "olmo": {"clip_qkv": 0.5},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 512},
    "diffllama": {},
    "bitnet": {},
}


@pytest.mark.parametrize("model_type", CHANGED_VALUES)
def test_auto_avoids_values_that_change_before_attention(model_type, tmp_path):
    save_base(tmp_path / "base", model_type, **{"num_key_value_heads": 4, **CHANGED_VALUES[model_type]})
    tuned = save_adapter(tmp_path / "base", tmp_path / "adapter")
    said = []
    record = merge(tmp_path / "adapter", tmp_path / "merged", report=said.append)
    assert all(name.endswith(("o_proj.weight", "out_proj.weight")) for name in record["changed"])
    assert any("not into values" in line and "Attention may change values" in line for line in said)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), tuned, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="merge into o_proj"):
        merge(tmp_path / "adapter", tmp_path / "values", "v_proj", report=lambda _: None)


def test_a_tensor_that_overflows_is_refused(tmp_path):
    save_base(tmp_path / "base", "llama", torch.float16)
    weights = tmp_path / "base/model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.self_attn.o_proj.weight"][0, -1] = 6e4
    save_file(tensors, weights, metadata={"format": "pt"})
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"o_proj.weight: scaled values overflow torch.float16"):
        merge(tmp_path / "adapter", tmp_path / "merged", "o_proj", report=lambda _: None)
    assert not (tmp_path / "merged").exists()


def test_a_base_named_by_its_hub_id_is_read_from_the_local_snapshot(tmp_path):
    snapshot = tmp_path / "hub/models--someone--tiny/snapshots/0123"
    shutil.copytree(TINY, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123")
    save_adapter(TINY, tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "someone/tiny"}))
    command = [sys.executable, "-m", "axolotl_plugins.seal"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for arguments in (["merge", "adapter", "merged"], ["verify", "merged"]):
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "merged" / RECORD).read_text())["base"] == "someone/tiny"


OLDER_LIBRARY = """
import sys
sys.modules["kernels"] = None  # the tests' own environment has one that needs a newer huggingface_hub
import torch, transformers
from safetensors.torch import save_file
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(3, 203)[None], use_cache=False).logits}, sys.argv[2])
"""
LINEAR = {"rope_type": "linear", "rope_theta": 40889.94, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 40889.94, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "factor": 8.0, "original_max_position_embeddings": 64}  # fmt: skip
BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    "full_attention": {**LINEAR, "rope_theta": 1e6},
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 2}
PARTIAL = {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.75}}
ROPES = {
    "default": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 40889.94}}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "llama3": ("llama", {"rope_parameters": {**LINEAR, "rope_type": "llama3", "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "yarn": ("qwen3", {"head_dim": 8, "num_key_value_heads": 2, "rope_parameters": {**LINEAR, "rope_type": "yarn",
                       "original_max_position_embeddings": 128}}),
    "longrope": ("llama", {"rope_parameters": LONG}),
    "phi3": ("phi3", {"num_key_value_heads": 4, "original_max_position_embeddings": 64, "rope_parameters": LONG}),
    "gemma3": ("gemma3_text", {**SLIDING, "head_dim": 8, "rope_parameters": BY_LAYER}),
    "gemma3n": ("gemma3n_text", {**SLIDING, "head_dim": 8, "rope_parameters": BY_LAYER, "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 8223, "intermediate_size": [48, 48],
                "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8}),
    "olmo3": ("olmo3", {**SLIDING, "rope_parameters": {**BY_LAYER, "sliding_attention": {
              "rope_type": "default", "rope_theta": 1e6}}}),
    "cohere2": ("cohere2", {**SLIDING, "rope_parameters": {"rope_type": "default", "rope_theta": 40889.94}}),
    "neox": ("gpt_neox", PARTIAL), "phi": ("phi", PARTIAL), "persimmon": ("persimmon", PARTIAL),
    "stablelm": ("stablelm", {"num_key_value_heads": 4, **PARTIAL}),
    "glm": ("glm", {"head_dim": 8, "num_key_value_heads": 2, **PARTIAL}),
    "glm4": ("glm4", {"head_dim": 8, "num_key_value_heads": 2, **PARTIAL}),
    "falcon": ("falcon", {"rope_parameters": LINEAR}),
    # Transformers 4 never scales Nemotron's RoPE, and takes ModernBERT's global theta for local layers too.
    "nemotron": ("nemotron", {"num_key_value_heads": 2, "partial_rotary_factor": 0.75, "rope_parameters": {
                 **PARTIAL["rope_parameters"], "rope_type": "default"}}),
    "modernbert": ("modernbert-decoder", {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 32, "layer_types":
                   SLIDING["layer_types"], "rope_parameters": dict.fromkeys(BY_LAYER, LINEAR)}),
    "deepseek": ("deepseek_v3", {**DEEPSEEK, "rope_parameters": {**LINEAR, "rope_type": "yarn", "mscale": 1.0,
                 "mscale_all_dim": 1.0, "original_max_position_embeddings": 128}}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ROPES)
def test_an_older_transformers_reads_a_merged_folders_rope(name, tmp_path):
    """Needs Transformers 4 in a folder of its own: ``pip install --target DIR --no-deps`` of transformers==4.57.6,
    huggingface_hub==0.36.2 and tokenizers==0.22.2, then ``TRANSFORMERS_4=DIR pytest -m slow``."""
    if not (older := os.environ.get("TRANSFORMERS_4")):
        pytest.skip("TRANSFORMERS_4 names no folder with Transformers 4")
    model_type, settings = ROPES[name]
    save_base(tmp_path / "base", model_type, **settings)
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    command = [sys.executable, "-c", OLDER_LIBRARY, str(tmp_path / "merged"), str(tmp_path / "logits")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": older}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "logits")["logits"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(3, 203)[None]).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    config.rope_parameters = type(config)(num_hidden_layers=2).rope_parameters
    plain = type(model)(config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (plain(input_ids=torch.arange(3, 203)[None]).logits - found).abs().max() > 1e-3  # RoPE matters
