"""Scales of queries, values and the MLP: against PEFT's IA3, attention's own scaling, and merged models."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from axolotl_runs import STEPS, launch, refusal, write_recipe
from miniatures import COMMON, MINIATURES, build, token_ids, train
from paths import TINY
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from axolotl_plugins.seal import SealConfig, SealLayer
from axolotl_plugins.seal.combine import combine
from axolotl_plugins.seal.export import export_ia3
from axolotl_plugins.seal.merge import merge, scale_factors, verify
from axolotl_plugins.seal.model_card import card
from axolotl_plugins.seal.scales import saved_scales, scale_matrix
from eval.controls import shuffle_heads

ALL = ["attention_output", "query", "value", "mlp"]
# name -> model type and settings of models whose queries or values are found in other places
ODD = {
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "olmoe": ("olmoe", {}),
    "deepseek": ("deepseek_v3", {"q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4,
                                 "kv_lora_rank": 16, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "rope_parameters": None}),
    "falcon": ("falcon", {}),
}  # fmt: skip


def miniature(name):
    if name in MINIATURES:
        return build(name)
    model_type, settings = ODD[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**COMMON, **settings})).eval()


def wrap(model, granularity="channel", placements=("query",), **settings):
    return get_peft_model(model, SealConfig(granularity=granularity, placements=list(placements), **settings)).eval()


@torch.no_grad()
def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "seal_scale" in name:
            parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=token_ids(), **options).logits.float()


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SealLayer)}


TARGETS = {"query": "q_proj", "value": "v_proj", "attention_output": "o_proj", "mlp": "down_proj"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("placements", [["query"], ["value"], ["mlp"], ["attention_output", "query"], ALL])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_bias_tied", "qwen2", "gemma"])
def test_channels_train_bit_for_bit_as_ia3_on_the_same_modules(name, placements, dtype):
    ours = wrap(build(name, dtype), placements=placements).train()
    inputs = [TARGETS[p] for p in placements if p in ("attention_output", "mlp")]
    config = IA3Config(target_modules=[TARGETS[p] for p in placements], feedforward_modules=inputs)
    theirs = get_peft_model(build(name, dtype), config).train()
    losses = []
    for model in (ours, theirs):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses.append(train(model, trainable, steps=5))
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-1]
    reference = {n.partition(".ia3_l")[0]: p.flatten() for n, p in theirs.named_parameters() if "ia3_l" in n}
    scales = {n.partition(".seal_scale")[0]: p for n, p in ours.named_parameters() if "seal_scale" in n}
    assert len(scales) == 2 * len(placements) and scales.keys() == reference.keys()
    for module, scale in scales.items():
        assert torch.equal(scale, reference[module].float()) and not torch.equal(scale, torch.ones_like(scale))


@pytest.mark.parametrize("name", ["llama_gqa", "phi3", "gpt_neox"])
def test_a_scale_of_a_heads_queries_is_a_factor_of_its_attention_logits(name):
    model = wrap(build(name), "head")
    with torch.no_grad():
        for layer in layers_of(model).values():
            assert layer.num_heads == 4
            layer.seal_scale["default"].fill_(1.7)
    plain = build(name)
    unchanged = logits(plain)
    for module in plain.modules():
        if hasattr(module, "scaling") and "Attention" in type(module).__name__:
            module.scaling *= 1.7
    assert (logits(plain) - unchanged).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama_mha", "gpt_neox", "gpt2"])
def test_without_shared_values_their_scales_are_those_of_attention_outputs(name):
    values, outputs = (randomise(wrap(build(name), placements=[p])) for p in ("value", "attention_output"))
    assert (logits(outputs) - logits(build(name))).abs().max() > 1e-2
    torch.testing.assert_close(logits(values), logits(outputs), atol=1e-5, rtol=0)


IMPOSSIBLE = {"olmoe": "mlp", "deepseek": "value", "qwen3": "query"}
MERGES = [
    (name, placements, granularity)
    for name in (*MINIATURES, "olmo2", "cohere", "olmoe", "deepseek")
    for placements in (["query"], ["value"], ["mlp"], ["query", "value"], ["attention_output", "query"], ALL)
    for granularity in ("head", "channel")
    if IMPOSSIBLE.get(name) not in placements and not (granularity == "head" and "mlp" in placements)
]


@pytest.mark.parametrize(("name", "placements", "granularity"), MERGES)
def test_merged_weights_have_the_adapters_logits(name, placements, granularity):
    base = miniature(name)
    unchanged = logits(base)
    model = randomise(wrap(copy.deepcopy(base), granularity, placements))
    wanted = logits(model)
    assert (wanted - unchanged).abs().max() > 1e-4
    rows = logits(model, adapter_names=["default", "__base__"])
    torch.testing.assert_close(rows, torch.stack([wanted[0], unchanged[1]]), atol=1e-6, rtol=0)
    plain = copy.deepcopy(base)
    parameters = dict(plain.named_parameters())
    factors = scale_factors(model, "o_proj")
    for key, factor in factors.items():
        parameters[key].data *= factor
    torch.testing.assert_close(logits(plain), wanted, atol=5e-6, rtol=0)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), wanted, atol=5e-6, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.unload().parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "placement", "message"),
    [
        ("qwen3", "query", r"q_norm \(Qwen3RMSNorm\) may undo scales of q_proj's output, and is not known to multiply"),
        ("gemma3", "query", r"q_norm .* remove `query` from placements"),
        ("qwen3_moe", "mlp", "model.layers.0 has no MLP with one output projection"),
        ("falcon", "query", r"cannot find the query projection of .*FalconAttention"),
        ("deepseek", "value", r"cannot find the value projection of .*DeepseekV3Attention"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_training(name, placement, message):
    with pytest.raises(ValueError, match=message):
        wrap(miniature(name), placements=[placement])


@pytest.mark.parametrize("placements", [[], ["key"], "query,value", None, [1]])
def test_unknown_placements_are_refused(placements):
    with pytest.raises(ValueError, match=r"placements: found .* expected a list of attention_output, query"):
        SealConfig(placements=placements)


def test_the_mlp_has_no_heads():
    with pytest.raises(ValueError, match="the MLP has no heads"):
        SealConfig(granularity="head", placements=["mlp"])


def test_a_norm_that_multiplies_by_one_plus_its_gain_takes_no_scales():
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gemma3_text"](
        **{**COMMON, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    )
    with pytest.raises(ValueError, match=r"q_norm \(Gemma3RMSNorm\) may undo scales"):
        wrap(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("placements", "targets"),
    [
        (["query"], ["q_proj", "o_proj"]),
        (["query"], ["q_proj"]),
        (["attention_output", "query"], ["q_proj"]),
        (["mlp"], ["down_proj"]),
        (["query", "value"], r".*self_attn\.(q|v)_proj"),
    ],
)
def test_only_attention_outputs_are_targets_of_other_placements(placements, targets):
    with pytest.raises(ValueError, match=r"target_modules: .* name attention output projections only"):
        wrap(build("llama_mha"), placements=placements, target_modules=targets)


def test_layers_and_names_select_what_is_beside_them():
    assert list(layers_of(wrap(build("llama_mha"), placements=["query", "mlp"], layers_to_transform=[1]))) == [
        "base_model.model.model.layers.1.self_attn.q_proj", "base_model.model.model.layers.1.mlp.down_proj",
    ]  # fmt: skip
    model = wrap(build("llama_mha"), placements=["query"], exclude_modules=["layers.1.self_attn.o_proj"])
    assert list(layers_of(model)) == ["base_model.model.model.layers.0.self_attn.q_proj"]
    model = wrap(
        build("llama_mha"), placements=["query", "value"], exclude_modules=["q_proj", "layers.0.self_attn.v_proj"]
    )
    assert list(layers_of(model)) == ["base_model.model.model.layers.1.self_attn.v_proj"]
    with pytest.raises(ValueError, match=r"exclude_modules: \['q_proj'\] leaves no module to scale"):
        wrap(build("llama_mha"), placements=["query"], exclude_modules=["q_proj"])


def test_adapters_of_one_model_may_scale_different_modules_but_not_different_rows_of_one():
    model = randomise(wrap(build("llama_mha")))
    model.add_adapter("outputs", SealConfig())
    assert len(layers_of(model)) == 4
    model.set_adapter("outputs")
    assert torch.equal(logits(model), logits(build("llama_mha")))
    fused = wrap(build("gpt2"))
    with pytest.raises(ValueError, match="another adapter scales other channels"):
        fused.add_adapter("values", SealConfig(placements=["value"]))


@pytest.mark.parametrize(("name", "size"), [("llama_gqa", 16), ("phi3", 8)])
def test_matrices_hold_one_placement(name, size):
    model = randomise(wrap(build(name), placements=ALL))
    assert {p: {tuple(rows.shape) for rows in scale_matrix(model, p).values()} for p in ALL} == {
        "attention_output": {(4, size)}, "query": {(4, size)}, "value": {(2, size)}, "mlp": {(1, 48)},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama_gqa", "phi3"])
def test_heads_are_shuffled_within_a_placement(name):
    model = wrap(build(name), "head", ["query", "value"])
    with torch.no_grad():
        for layer in layers_of(model).values():
            for index, placement in enumerate(("query", "value")):
                if heads := layer.site.heads_of(placement):
                    layer.seal_scale["default"][heads] = torch.arange(heads.stop - heads.start) + 10.0 * (index + 1)
    before = {p: torch.cat([*scale_matrix(model, p).values()]) for p in ("query", "value")}
    shuffle_heads(model, random.Random(1))
    for placement, rows in before.items():
        after = torch.cat([*scale_matrix(model, placement).values()])
        assert not torch.equal(after, rows) and torch.equal(after.flatten().sort()[0], rows.flatten().sort()[0])


def test_rows_of_a_head_by_head_projection_do_not_depend_on_num_heads():
    whole, halves = (randomise(wrap(build("gpt_neox"), num_heads=heads)) for heads in (4, 2))
    assert torch.equal(logits(whole), logits(halves))


def test_a_model_on_the_meta_device_gets_its_rows_with_its_weights():
    with torch.device("meta"):
        model = wrap(miniature("phi3"))
    model(input_ids=token_ids().to("meta"))
    real = build("phi3")
    model.to_empty(device="cpu")
    loaded = wrap(copy.deepcopy(real))
    model.load_state_dict(loaded.state_dict())
    for name, buffer in loaded.named_buffers():
        model.get_buffer(name).copy_(buffer)
    torch.testing.assert_close(logits(randomise(model)), logits(randomise(loaded)))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of random models with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    folders = {}
    for model_type in ("llama", "phi3", "olmo2"):
        torch.manual_seed(0)
        settings = COMMON | {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 1024,
                             "initializer_range": 0.1}  # fmt: skip
        folder = tmp_path_factory.mktemp(model_type)
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[model_type] = folder
    return folders


def saved(base, folder, placements, granularity="channel"):
    model = wrap(AutoModelForCausalLM.from_pretrained(base), granularity, placements, base_model_name_or_path=str(base))
    randomise(model).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("model_type", "placements", "tensors"),
    [
        ("llama", ["query"], ["q_proj.weight"]),
        ("llama", ALL, ["down_proj.weight", "o_proj.weight", "q_proj.weight", "v_proj.weight"]),
        ("phi3", ["query", "value"], ["qkv_proj.weight"]),
        ("olmo2", ["query"], ["q_norm.weight"]),
    ],
)
def test_merged_folders_are_verified(model_type, placements, tensors, bases, tmp_path):
    model = saved(bases[model_type], tmp_path / "adapter", placements)
    record = merge(tmp_path / "adapter", tmp_path / "merged", report=lambda _: None)
    assert sorted({".".join(name.split(".")[-2:]) for name in record["changed"]}) == tensors
    assert record["method"] == ("SEAL-C (attention_output, query, value, mlp)" if placements == ALL else
                                f"SEAL-C ({', '.join(placements)})")  # fmt: skip
    wanted = logits(model)
    assert (wanted - logits(AutoModelForCausalLM.from_pretrained(bases[model_type]))).abs().max() > 1e-2
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, atol=1e-4, rtol=0
    )
    verify(tmp_path / "merged", report=lambda _: None)


def test_values_take_the_scales_of_both_placements(bases, tmp_path):
    torch.manual_seed(0)
    config = json.loads((bases["llama"] / "config.json").read_text()) | {"num_key_value_heads": 4}
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**config))
    model = randomise(wrap(base, placements=["attention_output", "value"]))
    wanted = logits(model)
    factors = scale_factors(model, "v_proj")
    assert {name.split(".")[-2] for name in factors} == {"v_proj"}
    outputs, values = scale_matrix(model), scale_matrix(model, "value")
    assert torch.equal(factors["model.layers.1.self_attn.v_proj.weight"][:, 0], (outputs[1] * values[1]).flatten())
    plain = model.unload()
    for name, factor in factors.items():
        plain.get_parameter(name).data *= factor
    torch.testing.assert_close(logits(plain), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "placements"), [("llama", ALL), ("phi3", ["query", "value"])])
def test_stock_ia3_loads_an_export_of_any_projection(model_type, placements, bases, tmp_path):
    model = saved(bases[model_type], tmp_path / "adapter", placements)
    export_ia3(tmp_path / "adapter", tmp_path / "ia3")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[model_type]), tmp_path / "ia3")
    assert stock.peft_config["default"].peft_type == "IA3"
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=0)


def test_ia3_has_no_scales_of_norms(bases, tmp_path):
    saved(bases["olmo2"], tmp_path / "adapter", ["query"])
    with pytest.raises(ValueError, match=r"q_norm, a norm, which IA3 does not support: merge it"):
        export_ia3(tmp_path / "adapter", tmp_path / "ia3")
    assert not (tmp_path / "ia3").exists()


def test_a_card_says_what_is_scaled_and_others_are_not_combined(bases, tmp_path):
    saved(bases["phi3"], tmp_path / "query", ["query"])
    saved(bases["phi3"], tmp_path / "value", ["value"])
    assert "64 learned scales of queries (one per channel in 2 layers" in card(tmp_path / "query")
    combine([tmp_path / "query"], [0.5], tmp_path / "half")
    halves, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("half", "query"))
    assert all(torch.allclose(halves[name] - 1, (whole[name] - 1) / 2, atol=1e-6) for name in whole)
    with pytest.raises(ValueError, match=r"value: scales other placements than .*query"):
        combine([tmp_path / "query", tmp_path / "value"], [1, 1], tmp_path / "sum")
    with pytest.raises(ValueError, match="value: scales value, expected scales of attention outputs, or of queries"):
        saved_scales(tmp_path / "value")


@pytest.mark.parametrize(("placements", "module"), [(["query", "attention_output"], "o_proj"), (["query"], "q_proj")])
def test_maps_of_heads_are_of_attention_outputs_or_queries(placements, module, bases, tmp_path):
    model = saved(bases["llama"], tmp_path / "adapter", placements, "head")
    expected = [layer.seal_scale["default"] for name, layer in layers_of(model).items() if name.endswith(module)]
    assert torch.equal(torch.tensor(saved_scales(tmp_path / "adapter"))[..., 0], torch.stack(expected).detach())


def test_a_recipe_trains_placements_and_refuses_to_continue_with_others(tmp_path):
    data = {"task": "line", "tokens": "300:500", "samples": 8}
    seal = {"granularity": "channel", "placements": ["query", "mlp"], "data": data}
    write_recipe(tmp_path, seal=seal, save_strategy="steps", save_steps=STEPS)
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name.split(".")[-2] for name in tensors} == {"q_proj", "down_proj"}
    assert all((tensor != 1).any() for tensor in tensors.values())
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["placements"] == ["query", "mlp"] and config["granularity"] == "channel"
    assert "learned scales of queries, MLP activations" in (tmp_path / "out/README.md").read_text()
    state = json.loads((tmp_path / f"out/checkpoint-{STEPS}/trainer_state.json").read_text())
    step = next(entry for entry in state["log_history"] if "loss" in entry)
    assert step["seal/query/min"] < 1 < step["seal/query/max"] and "seal/mlp/mean" in step and "seal/mean" not in step
    write_recipe(tmp_path, seal=seal | {"placements": ["query"]}, lora_model_dir="out", output_dir="more")
    assert "out: found placements ['query', 'mlp'], the recipe has ['query']: set" in refusal(launch(tmp_path))
