"""Merged folders against unmerged models."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from miniatures import COMMON, MINIATURES, build, token_ids
from paths import TINY
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from axolotl_plugins.common.io import file_hash
from axolotl_plugins.seal import SealConfig, provenance
from axolotl_plugins.seal.export import export_ia3
from axolotl_plugins.seal.merge import RECORD, merge, scale_factors, verify
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.provenance import seen_texts


def tuned(name, grain, dtype=torch.float32):
    """A wrapped miniature whose scales are far from 1."""
    model = get_peft_model(build(name, dtype), SealConfig(granularity=grain))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "seal_scale" in key:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=token_ids()).logits.float()


MHA = ["llama_mha", "llama_bias_tied", "qwen2", "gpt_neox", "gpt2"]


@pytest.mark.parametrize("grain", ["head", "channel"])
@pytest.mark.parametrize("name", MHA)
def test_value_rows_do_what_output_columns_do(name, grain):
    model = tuned(name, grain)
    wanted = logits(model)
    base = build(name)
    assert (wanted - logits(base)).abs().max() > 1e-2
    for into in ("v_proj", "o_proj"):
        plain = build(name)
        parameters = dict(plain.named_parameters())
        factors = scale_factors(model, into)
        for key, factor in factors.items():
            parameters[key].data *= factor
        torch.testing.assert_close(logits(plain), wanted, atol=5e-5, rtol=0)
        different = {key for key, p in base.named_parameters() if not torch.equal(p, parameters[key])}
        assert different == set(factors)


@pytest.mark.parametrize("name", sorted(set(MINIATURES) - set(MHA)))
def test_grouped_queries_refuse_value_rows(name):
    with pytest.raises(ValueError, match="one value row serves several query heads"):
        scale_factors(tuned(name, "channel"), "v_proj")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A random Llama with a RoPE stretch, a tokenizer and a chat template, in float32 and bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    folders = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, initializer_range=0.1, max_position_embeddings=1024,
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}, dtype=dtype,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(str(dtype).removeprefix("torch."))
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[dtype] = folder
    return folders


@pytest.mark.parametrize("into", ["o_proj", "v_proj", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_folder_is_a_plain_model_with_the_adapters_logits(base_folder, dtype, into, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder[dtype])
    model = get_peft_model(base, SealConfig(granularity="channel", base_model_name_or_path=str(base_folder[dtype])))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "seal_scale" in key:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged", into, report=lambda _: None)
    assert result["difference"] <= 1e-4
    changed = "v_proj" if into == "auto" else into
    assert len(result["changed"]) == 2 and all(f".{changed}." in name for name in result["changed"])
    assert (result["rounded_difference"] > 1e-4) == (dtype == torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wanted, unchanged = logits(model), logits(AutoModelForCausalLM.from_pretrained(base_folder[dtype]))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (wanted - unchanged).abs().max() > 5 * tolerance
    torch.testing.assert_close(logits(merged), wanted, atol=tolerance, rtol=0)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 20000.0
    assert config["rope_scaling"] == {"factor": 4.0, "rope_type": "linear"}
    assert (tmp_path / "merged/chat_template.jinja").exists()
    with pytest.raises(ValueError, match="exists already"):
        merge(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("options", [{"granularity": "head"}, {"granularity": "channel", "layers": [1]}])
def test_exported_to_stock_ia3_it_does_the_same(base_folder, options, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder[torch.float32])
    unchanged = logits(base)
    config = SealConfig(**options, base_model_name_or_path=str(base_folder[torch.float32]))
    model = get_peft_model(base, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "seal_scale" in key:
                parameter += torch.linspace(-0.5, 0.5, parameter.numel())
    model.save_pretrained(tmp_path / "adapter")
    export_ia3(tmp_path / "adapter", tmp_path / "ia3")
    # A process of its own, which never hears of SEAL, would do: nothing but PEFT's own classes is left in the folder.
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder[torch.float32]), tmp_path / "ia3"
    )
    assert stock.peft_config["default"].peft_type == "IA3"
    assert (logits(model) - unchanged).abs().max() > 1e-2
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="exists already"):
        export_ia3(tmp_path / "adapter", tmp_path / "ia3")
    with pytest.raises(ValueError, match="found a IA3 adapter"):
        export_ia3(tmp_path / "ia3", tmp_path / "again")


def multiplied(number):
    """``scale_factors`` with wrong factors."""
    return lambda *args: {name: factor * number for name, factor in scale_factors(*args).items()}


def test_a_merge_that_cannot_be_proved_leaves_nothing(base_folder, tmp_path, monkeypatch):
    """A wrong merge, here one whose scales were disturbed between measuring and merging, is caught."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder[torch.float32]),
        SealConfig(granularity="head", base_model_name_or_path=str(base_folder[torch.float32])),
    )
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("axolotl_plugins.seal.merge.scale_factors", multiplied(1.5))
    with pytest.raises(ValueError, match="would change logits"):
        merge(tmp_path / "adapter", tmp_path / "merged", "o_proj", report=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def save_adapter(base, out):
    """A SEAL-H adapter of the model in a folder, with scales far from 1."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), SealConfig(granularity="head", base_model_name_or_path=str(base))
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "seal_scale" in key:
                parameter += torch.tensor([0.5, -0.5, 0.25, 0.1])
    model.save_pretrained(out)


@pytest.mark.parametrize("experts", [0, 4])
def test_what_float32_rounds_is_told_from_a_wrong_merge(base_folder, experts, tmp_path, monkeypatch):
    """Logits so large that float32 keeps no four decimals of them; also with experts, whose kernels lack float64."""
    base = AutoModelForCausalLM.from_pretrained(base_folder[torch.float32])
    if experts:
        settings = {key: value for key, value in base.config.to_dict().items() if key in COMMON}
        config = CONFIG_MAPPING["mixtral"](
            **settings, num_key_value_heads=4, num_local_experts=experts, initializer_range=0.1
        )
        base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        base.lm_head.weight *= 1e6
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_folder[torch.float32]).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    found = merge(tmp_path / "adapter", tmp_path / "merged", "o_proj", report=lambda _: None)
    assert found["difference"] > 1e-4
    monkeypatch.setattr("axolotl_plugins.seal.merge.scale_factors", multiplied(1 + 1e-5))
    with pytest.raises(ValueError, match="in float64, more than 1e-04"):
        merge(tmp_path / "adapter", tmp_path / "again", "o_proj", report=lambda _: None)


@pytest.fixture(scope="module")
def merged_once(base_folder, tmp_path_factory):
    """A folder with a base model, an adapter and the merged model, all in bfloat16."""
    folder = tmp_path_factory.mktemp("once")
    shutil.copytree(base_folder[torch.bfloat16], folder / "base")
    save_adapter(folder / "base", folder / "adapter")
    provenance.save({"files": [], "unread": [], "texts": ["0123456789abcdef"]}, folder / "adapter")
    merge(folder / "adapter", folder / "merged", report=lambda _: None)
    return folder


def change_weights(file, name, factor=2.0):
    tensors = load_file(file)
    tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})


def test_verify_repeats_the_proof(merged_once):
    said = []
    verify(merged_once / "merged", report=said.append)
    assert "2 of 21 tensors merged, all others equal the base model's" in said[0]
    assert seen_texts(merged_once / "merged") == {"0123456789abcdef"}


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
def test_verify_finds_a_changed_tensor(merged_once, tmp_path, name, forged):
    shutil.copytree(merged_once / "merged", tmp_path / "merged")
    weights = tmp_path / "merged/model.safetensors"
    change_weights(weights, name)
    message = r"model\.safetensors: differs from the file that was written"
    if forged:  # the record as well
        record = json.loads((tmp_path / "merged" / RECORD).read_text())
        record["files"][weights.name] = file_hash(weights)
        (tmp_path / "merged" / RECORD).write_text(json.dumps(record))
        message = f"{re.escape(name)} differs from a merge into"
    with pytest.raises(ValueError, match=message):
        verify(tmp_path / "merged", report=lambda _: None)


def test_a_merged_folder_is_scored_as_its_method_on_its_base(merged_once, tmp_path):
    loaded = load(merged_once / "merged")
    assert (loaded.method, loaded.base) == ("SEAL-H", str(merged_once / "base"))
    shutil.copytree(merged_once / "merged", tmp_path / "merged")
    (tmp_path / "merged" / RECORD).write_text("{}")
    with pytest.raises(ValueError, match="must record base and method"):
        load(tmp_path / "merged")


def test_verify_knows_what_was_merged(merged_once, tmp_path):
    shutil.copytree(merged_once / "merged", tmp_path / "merged")
    shutil.copytree(merged_once / "adapter", tmp_path / "adapter")
    verify(tmp_path / "merged", tmp_path / "adapter", report=lambda _: None)
    change_weights(
        tmp_path / "adapter/adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.o_proj.seal_scale"
    )
    with pytest.raises(ValueError, match=r"adapter: its weights are missing or changed since the merge"):
        verify(tmp_path / "merged", tmp_path / "adapter")
    (tmp_path / "merged/generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"generation_config\.json: differs from the file that was written"):
        verify(tmp_path / "merged")
    for content in (None, "{", "[]"):
        (tmp_path / "merged" / RECORD).unlink(missing_ok=True)
        if content:
            (tmp_path / "merged" / RECORD).write_text(content)
        with pytest.raises(ValueError, match=r"has no valid seal_merge\.json as `merge` writes it"):
            verify(tmp_path / "merged")


def test_not_an_adapter(base_folder, tmp_path):
    with pytest.raises(ValueError, match="not an adapter folder"):
        merge(base_folder[torch.float32], tmp_path / "merged")


def test_layers_that_share_one_weight_are_not_merged(tmp_path):
    """Zamba's attention layers share weights, but not scales."""
    from sweep import miniature

    miniature("zamba", 8223).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
                           SealConfig(granularity="head", base_model_name_or_path=str(tmp_path / "base")))  # fmt: skip
    first, second = (parameter for parameter in model.parameters() if parameter.requires_grad)
    second.data += 0.5
    with pytest.raises(ValueError, match="share one weight, which cannot be merged"):
        model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="share one weight but have different scales"):
        merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    first.data += 0.5
    model.save_pretrained(tmp_path / "adapter")
    assert len(merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)["changed"]) == 1
