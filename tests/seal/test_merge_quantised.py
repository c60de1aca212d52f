"""Scales merged into quantised weights: no code changes, and dequantised weights are those of the base times scales."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from paths import TINY
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from axolotl_plugins.common.io import file_hash
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.merge import RECORD, merge, verify

functional = pytest.importorskip("bitsandbytes").functional
HEADS, WIDTH, LAYERS = 4, 64, 2  # the input of o_proj has 256 channels
SCALES = {0: [1.5, -0.5, 0.0, 1.1], 1: [0.7, 1.25, -2.0, 1.0]}
O_PROJ = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(LAYERS)]
IDS = torch.arange(3, 67)[None]
FOUR_BITS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4 double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def save_plain(folder, width=WIDTH, heads=HEADS, **settings):
    """A random Llama in bfloat16, with a tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width * heads, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=settings.pop("num_key_value_heads", 2), head_dim=width,
        initializer_range=0.1, max_position_embeddings=1024, **settings,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantise(plain, folder, shard="1GB", **settings):
    """A model's copy that bitsandbytes quantised."""
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    return folder


def save_adapter(base, plain, out, granularity="head", **settings):
    """An adapter of the model in ``base``, whose heads are those of ``plain``, with scales far from 1."""
    config = SealConfig(granularity=granularity, **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(plain), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, scale in enumerate(parameter for parameter in model.parameters() if parameter.requires_grad):
            random = 1 + 0.5 * torch.randn(scale.shape, generator=generator)
            scale.copy_(torch.tensor(SCALES[layer]) if granularity == "head" else random)
    model.save_pretrained(out)
    return out


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def quantisation_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def column_scale(layer):
    return torch.tensor(SCALES[layer]).repeat_interleave(WIDTH)


def relative_error(found, expected):
    """The maximum over weights; where a weight should be zero it must be."""
    assert torch.equal(found == 0, expected == 0)
    return ((found - expected).abs() / expected.abs().clamp_min(1e-30)).max().item()


@torch.no_grad()
def logits(model):
    """Logits in float32, without a kernel that rounds the scales to bfloat16."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def four_bits(plain, tmp_path_factory):
    """Kind -> folder with a base model, an adapter and the merged model."""
    folders = {}
    for kind, settings in FOUR_BITS.items():
        folders[kind] = folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        quantise(plain, folder / "base", "2MB" if "double" in kind else "1GB", load_in_4bit=True, **settings)
        save_adapter(folder / "base", plain, folder / "adapter")
        merge(folder / "adapter", folder / "merged", report=lambda _: None)
    return folders


def four_bit_weights(folder):
    """Dequantised output projections in float32 of a model as Transformers loads it, and the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = []
    for name in O_PROJ:
        weight = model.get_submodule(name).weight
        weight.quant_state.dtype = torch.float32
        weights.append(functional.dequantize_4bit(weight.data, weight.quant_state))
    return weights, model


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_four_bits_keep_their_codes_and_take_the_scales(four_bits, kind):
    folder = four_bits[kind]
    (old, base), (new, merged) = four_bit_weights(folder / "base"), four_bit_weights(folder / "merged")
    for layer in range(LAYERS):
        assert relative_error(new[layer], old[layer] * column_scale(layer)) < 2e-7
    unchanged = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, folder / "adapter"))
    assert (wanted - unchanged).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=0)
    before, after = tensors_of(folder / "base"), tensors_of(folder / "merged")
    beside = {f"{name}.weight.{part}" for name in O_PROJ for part in ("nested_absmax", "nested_quant_map")}
    assert before.keys() - after.keys() == (beside if "double" in kind else set()) and after.keys() <= before.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    parts = ("absmax", "quant_state.bitsandbytes__nf4") if "double" in kind else ("absmax",)
    assert changed == {f"{name}.weight.{part}" for name in O_PROJ for part in parts}
    assert quantisation_of(folder / "base") == quantisation_of(folder / "merged")
    for index in (folder / "merged").glob("*.index.json"):
        assert json.loads(index.read_text())["weight_map"].keys() == after.keys()
    assert ("double" in kind) == bool(list((folder / "merged").glob("*.index.json")))


def forge(folder, name, factor):
    """Multiply a tensor of a merged folder, and make its record state the new file."""
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})
    record = json.loads((folder / RECORD).read_text())
    record["files"][file.name] = file_hash(file)
    (folder / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
def test_verify_of_four_bits(four_bits, kind, tmp_path):
    said = []
    verify(four_bits[kind] / "merged", report=said.append)
    count = len(tensors_of(four_bits[kind] / "base"))
    assert f"{8 if 'double' in kind else 2} of {count} tensors merged, all others equal" in said[0]
    shutil.copytree(four_bits[kind] / "merged", tmp_path / "merged")
    name = f"{O_PROJ[1]}.weight.absmax"
    forge(tmp_path / "merged", name, 1 + 1e-6)
    with pytest.raises(ValueError, match=f"{name} differs from a merge into"):
        verify(tmp_path / "merged", report=lambda _: None)


def test_scales_of_the_wrong_blocks_are_caught(four_bits, tmp_path, monkeypatch):
    def flipped(factor, index, name):
        return torch.tensor(SCALES[int(name.split(".")[2])])[None].flip(1)

    monkeypatch.setattr("axolotl_plugins.seal.merge_quantised.by_block", flipped)
    with pytest.raises(ValueError, match=r"o_proj\.weight differs from the dequantised product"):
        merge(four_bits["nf4"] / "adapter", tmp_path / "merged", report=lambda _: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_value_rows_take_any_scales(granularity, tmp_path):
    """A row of values is whole blocks, so that SEAL-C is exact there too; biases are rounded to bfloat16."""
    plain = save_plain(tmp_path / "plain", num_key_value_heads=HEADS, attention_bias=True)
    quantise(plain, tmp_path / "base", load_in_4bit=True, **FOUR_BITS["nf4 double"])
    save_adapter(tmp_path / "base", plain, tmp_path / "adapter", granularity)
    result = merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    parts = [f"model.layers.{layer}.self_attn.v_proj.{part}" for layer in range(LAYERS) for part in ("bias", "weight")]
    assert (result["changed"], result["dtype"]) == (parts, "float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    unchanged, wanted = logits(base), logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (wanted - unchanged).abs().max() > 0.2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, atol=0.02, rtol=0)


def test_queries_take_any_scales_and_the_mlp_takes_none(tmp_path):
    plain = save_plain(tmp_path / "plain", attention_bias=True)
    quantise(plain, tmp_path / "base", load_in_4bit=True, **FOUR_BITS["nf4"])
    save_adapter(tmp_path / "base", plain, tmp_path / "query", "channel", placements=["query"])
    result = merge(tmp_path / "query", tmp_path / "merged", report=lambda _: None)
    assert {".".join(name.split(".")[-2:]) for name in result["changed"]} == {"q_proj.weight", "q_proj.bias"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    unchanged, wanted = logits(base), logits(PeftModel.from_pretrained(base, tmp_path / "query"))
    assert (wanted - unchanged).abs().max() > 0.2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, atol=0.02, rtol=0)
    save_adapter(tmp_path / "base", plain, tmp_path / "mlp", "channel", placements=["mlp"])
    with pytest.raises(ValueError, match=r"down_proj\.weight\.absmax: a block of quantised weights has several scales"):
        merge(tmp_path / "mlp", tmp_path / "refused", report=lambda _: None)
    assert not (tmp_path / "refused").exists()


def test_the_gain_of_a_norm_in_a_quantised_model_takes_scales(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = Olmo2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=1024,
    )  # fmt: skip
    Olmo2ForCausalLM(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    quantise(tmp_path / "plain", tmp_path / "base", load_in_4bit=True, **FOUR_BITS["nf4"])
    save_adapter(tmp_path / "base", tmp_path / "plain", tmp_path / "adapter", "channel", placements=["query"])
    result = merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    assert result["changed"] == [f"model.layers.{layer}.self_attn.q_norm.weight" for layer in range(LAYERS)]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    unchanged, wanted = logits(base), logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (wanted - unchanged).abs().max() > 0.2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, atol=0.02, rtol=0)


def test_an_adapter_with_a_config_of_its_own_keeps_the_bases_quantisation(four_bits, tmp_path):
    """Axolotl writes a config.json beside the adapter, with what it quantised the base model in."""
    folder = four_bits["nf4"]
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "base/config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "adapter/config.json").write_text(json.dumps(config))
    merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    assert quantisation_of(tmp_path / "merged") == quantisation_of(folder / "base")
    before, after = tensors_of(folder / "merged"), tensors_of(tmp_path / "merged")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())


GROUP = 32
CHANNELS = torch.arange(HEADS * WIDTH)
SHUFFLED = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
GROUPS = CHANNELS // GROUP
G_IDX = {
    "in order": GROUPS,
    "by activation within heads": ((CHANNELS.view(HEADS, WIDTH)[:, SHUFFLED]) // GROUP).flatten(),
    "by activation": torch.randperm(HEADS * WIDTH, generator=torch.Generator().manual_seed(0)) // GROUP,
    "one group": CHANNELS * 0,
}
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble that holds each of eight columns


def save_groups(plain, folder, method, g_idx=GROUPS, **settings):
    """A copy of a model whose projections have random tensors of the shapes of GPTQ or AWQ."""
    shutil.copytree(plain, folder)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    groups = int(g_idx.max()) + 1
    for name in [name for name in tensors if "proj" in name]:
        outputs, inputs = tensors.pop(name).shape
        packed = (inputs // 8, outputs) if method == "gptq" else (inputs, outputs // 8)
        prefix = name.removesuffix("weight")
        for part, shape in {"qweight": packed, "qzeros": (groups, outputs // 8)}.items():
            tensors[prefix + part] = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
        tensors[f"{prefix}scales"] = (0.002 + 0.02 * torch.rand(groups, outputs, generator=generator)).half()
        if method == "gptq":
            tensors[f"{prefix}g_idx"] = g_idx.int()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def unpack(packed, order, axis):
    """Eight numbers of 4 bits of each int32, along an axis."""
    return torch.stack([(packed >> 4 * nibble) & 15 for nibble in order], axis + 1).flatten(axis, axis + 1).float()


def dequantised(tensors, prefix, method):
    """A weight of GPTQ or AWQ, shape (out, in)."""
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    order = range(8) if method == "gptq" else AWQ_ORDER
    codes = unpack(part["qweight"], order, 0 if method == "gptq" else 1)
    zeros = unpack(part["qzeros"], order, 1) + (method == "gptq")
    index = part["g_idx"].long() if method == "gptq" else torch.arange(len(codes)) // GROUP
    return ((codes - zeros[index]) * part["scales"].float()[index]).T


@pytest.mark.parametrize(
    ("method", "order", "settings"),
    [("gptq", "in order", {}), ("gptq", "by activation within heads", {"desc_act": True}),
     ("awq", "in order", {"version": "GEMM"})],
)  # fmt: skip
def test_groups_within_heads_take_the_scales(plain, method, order, settings, tmp_path):
    base = save_groups(plain, tmp_path / "base", method, G_IDX[order], **settings)
    save_adapter(base, plain, tmp_path / "adapter")
    said = []
    result = merge(tmp_path / "adapter", tmp_path / "merged", report=said.append)
    assert (result["dtype"], result["difference"]) == ("float16", None) and "rounded to float16" in said[-1]
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    for layer, name in enumerate(O_PROJ):
        old, new = (dequantised(tensors, f"{name}.", method) for tensors in (before, after))
        assert 0 < relative_error(new, old * column_scale(layer)) <= 2**-11  # scales are rounded to float16
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.scales" for name in O_PROJ}
    verify(tmp_path / "merged", report=said.append)
    assert f"2 of {len(before)} tensors merged" in said[-1] and "no logits compared" in said[-1]
    forge(tmp_path / "merged", f"{O_PROJ[0]}.scales", 1.01)
    with pytest.raises(ValueError, match="scales differs from a merge into"):
        verify(tmp_path / "merged", report=said.append)


@pytest.mark.parametrize(
    ("method", "part", "change"),
    [("gptq", "g_idx", lambda t: t[:-1]), ("gptq", "g_idx", lambda t: t + 100), ("gptq", "g_idx", lambda t: t - 1),
     ("gptq", "scales", lambda t: t.T.contiguous()), ("awq", "scales", lambda t: t.T.contiguous())],
)  # fmt: skip
def test_tensors_that_do_not_match_are_refused(plain, method, part, change, tmp_path):
    base = save_groups(plain, tmp_path / "base", method)
    tensors = load_file(base / "model.safetensors")
    tensors[f"{O_PROJ[0]}.{part}"] = change(tensors[f"{O_PROJ[0]}.{part}"])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter(base, plain, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"do not match the weight|is of 255 columns"):
        merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_value_rows_of_groups_take_any_scales(method, tmp_path):
    plain = save_plain(tmp_path / "plain", num_key_value_heads=HEADS)
    base = save_groups(plain, tmp_path / "base", method, G_IDX["by activation"] if method == "gptq" else GROUPS)
    save_adapter(base, plain, tmp_path / "adapter", "channel")
    merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    scales = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn."
        old, new = (dequantised(tensors_of(folder), f"{name}v_proj.", method) for folder in (base, tmp_path / "merged"))
        scale = scales[f"base_model.model.{name}o_proj.seal_scale"]
        assert (new - old).abs().max() > 0.1
        torch.testing.assert_close(new, old * scale[:, None], rtol=2**-11, atol=16 * 2**-25)  # scales may be subnormal


@pytest.mark.parametrize(
    ("method", "order", "granularity", "settings", "message"),
    [
        ("gptq", "by activation", "head", {}, "scales: a block of quantised weights has several scales"),
        ("gptq", "one group", "head", {}, "scales: a block of quantised weights has several scales"),
        ("awq", "one group", "head", {}, "scales: a block of quantised weights has several scales"),
        ("gptq", "in order", "channel", {}, "scales: a block of quantised weights has several scales"),
        ("gptq", "in order", "head", {"checkpoint_format": "marlin"}, "is quantised .gptq marlin."),
        ("awq", "in order", "head", {"version": "gemv"}, "is quantised .awq gemv."),
        ("hqq", "in order", "head", {}, "is quantised .hqq."),
        ("compressed-tensors", "in order", "head", {"format": "pack-quantized"}, "compressed-tensors pack-quantized"),
    ],
)  # fmt: skip
def test_other_groups_and_layouts_are_refused(plain, method, order, granularity, settings, message, tmp_path):
    base = save_groups(plain, tmp_path / "base", method, G_IDX[order], **settings)
    save_adapter(base, plain, tmp_path / "adapter", granularity)
    with pytest.raises(ValueError, match=f"{message}.*: merge into the full-precision model"):
        merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("width", "heads", "granularity", "settings", "message"),
    [
        (64, 4, "head", {"load_in_8bit": True}, r"is quantised \(bitsandbytes 8-bit\)"),
        (64, 4, "channel", {"load_in_4bit": True}, "absmax: a block of quantised weights has several scales"),
        (32, 4, "head", {"load_in_4bit": True}, "absmax: a block of quantised weights has several scales"),
        (24, 4, "head", {"load_in_4bit": True}, "absmax: a block of quantised weights has several scales"),
    ],
)
def test_other_blocks_of_bitsandbytes_are_refused(width, heads, granularity, settings, message, tmp_path):
    plain = save_plain(tmp_path / "plain", width, heads)
    base = quantise(plain, tmp_path / "base", **settings)
    save_adapter(base, plain, tmp_path / "adapter", granularity)
    with pytest.raises(ValueError, match=f"{message}.*: merge into the full-precision model"):
        merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    assert not (tmp_path / "merged").exists()
