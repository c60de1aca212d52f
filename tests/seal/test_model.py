"""The tuner against PEFT's IA3, a naive reference, and its own promises, over architectures, grains and dtypes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from miniatures import COMMON, MINIATURES, VOCABULARY, build, token_ids, train
from paths import ROOT
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from axolotl_plugins.seal import SealConfig, SealLayer, find_attention_outputs
from axolotl_plugins.seal.args import parse_block
from axolotl_plugins.seal.scales import saved_scales

GRAINS = ("head", "channel")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.15}


@torch.no_grad()
def logits(model):
    return model(input_ids=token_ids()).logits.float()


def scales(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "seal_scale" in name}


def wrap(name="llama_mha", grain="channel", dtype=torch.float32, **kwargs):
    return get_peft_model(build(name, dtype), SealConfig(granularity=grain, **kwargs))


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "seal_scale" in name:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa", "gpt_neox"])
def test_channel_scales_train_exactly_as_ia3_on_the_same_projection(name):
    seal = wrap(name)
    targets = [ending.split(".")[-1] for ending in find_attention_outputs(build(name))]
    if name == "gpt_neox":
        targets = ["attention.dense"]
    ia3 = get_peft_model(build(name), IA3Config(target_modules=targets, feedforward_modules=targets))
    ours = train(seal, [p for p in seal.parameters() if p.requires_grad])
    theirs = train(ia3, [p for p in ia3.parameters() if p.requires_grad])
    assert ours == theirs
    assert ours[0] != ours[-1]
    reference = [p.flatten() for n, p in ia3.named_parameters() if "ia3_l" in n]
    for scale, other in zip(scales(seal).values(), reference, strict=True):
        assert torch.equal(scale, other) and not torch.equal(scale, torch.ones_like(scale))


class NaiveHeadScale(nn.Module):
    """One scalar per head, written as a loop over heads."""

    def __init__(self, projection, heads):
        super().__init__()
        self.projection, self.scale = projection, nn.Parameter(torch.ones(heads))

    def forward(self, x):
        parts = [part * s for part, s in zip(x.chunk(len(self.scale), dim=-1), self.scale, strict=True)]
        return self.projection(torch.cat(parts, dim=-1))


@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa"])
def test_head_scales_train_as_a_loop_over_heads(name):
    seal, naive = wrap(name, "head"), build(name)
    naive.requires_grad_(False)
    for layer in naive.model.layers:
        layer.self_attn.o_proj = NaiveHeadScale(layer.self_attn.o_proj, COMMON["num_attention_heads"])
    ours = train(seal, [p for p in seal.parameters() if p.requires_grad])
    theirs = train(naive, [p for p in naive.parameters() if p.requires_grad])
    assert ours == pytest.approx(theirs, abs=1e-6)
    for layer, scale in zip(naive.model.layers, scales(seal).values(), strict=True):
        assert scale.shape == (4,)
        torch.testing.assert_close(scale, layer.self_attn.o_proj.scale.detach(), atol=1e-5, rtol=0)
        assert not torch.allclose(scale, torch.ones(4), atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", MINIATURES)
def test_life_of_an_adapter(name, grain, dtype, tmp_path):
    """Identity at the start; only scales train; disable, merge, unmerge, save, load all agree."""
    torch_dtype = DTYPES[dtype]
    tolerance = TOLERANCE[torch_dtype]
    base = build(name, torch_dtype)
    before = logits(base)
    model = wrap(name, grain, torch_dtype)
    assert torch.equal(logits(model), before)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("seal_scale" in n and p.dtype == torch.float32 for n, p in trainable.items())
    assert sum(p.numel() for p in trainable.values()) == 2 * (4 if grain == "head" else MINIATURES[name][2])

    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(model, trainable.values(), steps=3, lr=5e-2)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    tuned = logits(model)
    assert (tuned - before).abs().max() > 10 * (tolerance if dtype == "fp32" else 0.002)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)

    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter_model.safetensors").values())
    loaded = PeftModel.from_pretrained(build(name, torch_dtype), tmp_path)
    assert torch.equal(logits(loaded), tuned)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), tuned, atol=tolerance, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(logits(model), tuned)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    merged = loaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), tuned, atol=tolerance, rtol=0)
    assert not any(isinstance(module, SealLayer) for module in merged.modules())
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in base.named_modules()]


def test_gradient_reaches_float32_scales_of_a_bfloat16_base():
    model = wrap("llama_gqa", "channel", torch.bfloat16)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("grain", GRAINS)
def test_several_adapters(grain):
    model = wrap(grain=grain)
    randomise(model)
    first = logits(model)
    model.add_adapter("other", SealConfig(granularity="head" if grain == "channel" else "channel"))
    model.set_adapter("other")
    untouched = logits(model)
    assert (first - untouched).abs().max() > 1e-2
    randomise(model, seed=3)  # randomises both
    other = logits(model)
    assert (other - untouched).abs().max() > 1e-2
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert (both - other).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]


ONE_LAYER = ["base_model.model.model.layers.1.self_attn.o_proj.seal_scale.default"]


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1},
        {"layers": [1]},
        {"target_modules": r".*\.1\.self_attn\.o_proj"},
        {"target_modules": ["layers.1.self_attn.o_proj"]},
        {"exclude_modules": ["layers.0.self_attn.o_proj"]},
        {"target_modules": r".*\.o_proj", "exclude_modules": r".*\.0\..*"},
    ],
)
def test_fields_that_select_one_layer(fields, tmp_path):
    model = wrap(**fields)
    assert list(scales(model)) == ONE_LAYER
    randomise(model)
    tuned = logits(model)
    assert (tuned - logits(build("llama_mha"))).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "layers" not in saved and saved["layers_to_transform"] in ([1], None)
    loaded = PeftModel.from_pretrained(build("llama_mha"), tmp_path)
    assert list(scales(loaded)) == ONE_LAYER and torch.equal(logits(loaded), tuned)


def test_layers_of_a_model_without_a_head_are_selected():
    model = get_peft_model(build("llama_mha").model, SealConfig(layers_to_transform=[1]))
    assert list(scales(model)) == [ONE_LAYER[0].replace("model.model.", "model.")]


@pytest.mark.parametrize("layers", [[1], None])
def test_an_adapter_in_the_former_format_is_loaded(layers, tmp_path):
    """Written as version 0.1 did: ``layers``, and neither ``layers_to_transform`` nor ``exclude_modules``."""
    config = {
        "auto_mapping": None, "base_model_name_or_path": "some/base", "granularity": "head", "inference_mode": True,
        "layers": layers, "num_heads": 4, "peft_type": "SEAL", "peft_version": "0.20.0", "revision": None,
        "target_modules": ["self_attn.o_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    names = [f"base_model.model.model.layers.{index}.self_attn.o_proj.seal_scale" for index in layers or [0, 1]]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: torch.tensor([0.5, 1.5, 0.0, 2.0]) for name in names}, tmp_path / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(build("llama_mha"), tmp_path)
    assert model.peft_config["default"].layers_to_transform == layers
    assert [name.removesuffix(".default") for name in scales(model)] == names
    assert all(scale.tolist() == [0.5, 1.5, 0.0, 2.0] for scale in scales(model).values())
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert again["layers_to_transform"] == layers and "layers" not in again


def test_recipes_in_the_former_format_are_read():
    block = parse_block({"granularity": "head", "layers": [1]})
    assert SealConfig(**block.adapter_settings()).layers_to_transform == [1]
    assert parse_block({"layers_to_transform": 1}).layers_to_transform == [1]
    assert parse_block({"target_modules": ".*o_proj"}).adapter_settings()["target_modules"] == ".*o_proj"


def test_longchat_parameter_counts():
    """Appendix C and Table 8: 1,024 and 131,072 numbers for a 7B model of 32 layers, 32 heads, head_dim 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for grain, expected in (("head", 1_024), ("channel", 131_072)):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())
            model = get_peft_model(model, SealConfig(granularity=grain))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"granularity": "heads"}, "expected 'head'"),
        ({"target_modules": "o_proj"}, "no module matches target_modules o_proj in the model"),  # not the full name
        ({"target_modules": "("}, "target_modules: '\\(' is not a regular expression"),
        ({"exclude_modules": 3}, "exclude_modules: found 3, expected a list"),
        ({"exclude_modules": ["o_proj"]}, r"outside exclude_modules \['o_proj'\] in the model"),
        ({"layers_to_transform": []}, "non-empty list"),
        ({"layers_to_transform": [-1]}, "indices from 0"),
        ({"layers_to_transform": True}, "found True"),
        ({"layers_to_transform": [7]}, "layers 0 to 1"),
        ({"layers": [7]}, r"layers \[7\]"),
        ({"layers": [1], "layers_to_transform": [1]}, "former name of layers_to_transform"),
        ({"layers_to_transform": [1], "target_modules": ".*o_proj"}, "no effect on a regular expression"),
        ({"target_modules": ["self_attn.wo"]}, "attention outputs are \\['self_attn.o_proj'\\]"),
        ({"num_heads": 5}, "not divisible by 5 heads"),
    ],
)
def test_bad_configs_say_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(build("llama_mha"), SealConfig(**config))


def test_unknown_architecture_lists_candidates():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.my_attention = nn.ModuleDict({"mix": nn.Linear(8, 8), "out": nn.Linear(8, 8)})

    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block()])

    with pytest.raises(ValueError, match=r"candidates: my_attention\.mix, my_attention\.out"):
        find_attention_outputs(Strange())


ONLY_DEPENDENCIES = '''
import sys

BLOCKED = {"axolotl", "lm_eval", "matplotlib", "datasets", "typer", "rich", "data_gen", "eval", "recipes", "pydantic"}


class Finder:
    """A finder of sys.meta_path that does not find the blocked packages."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Finder, sys.meta_path)
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_plugins.seal import SealConfig


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4)).eval()


ids = torch.arange(24)[None]
model = get_peft_model(base(), SealConfig(granularity="head"))
before = model(ids).logits
for name, parameter in model.named_parameters():
    if "seal_scale" in name:
        parameter.data.fill_(0.5)
tuned = model(ids).logits
assert not torch.equal(tuned, before)
model.save_pretrained(sys.argv[1])
assert torch.equal(PeftModel.from_pretrained(base(), sys.argv[1])(ids).logits, tuned)
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
try:
    from axolotl_plugins.seal import SealPlugin
except ModuleNotFoundError as error:
    print("missing", error.name)
'''


def test_the_tuner_needs_torch_transformers_peft_and_safetensors_only(tmp_path):
    """Wrap, run, save and load where none of the other dependencies can be imported."""
    command = [sys.executable, "-c", ONLY_DEPENDENCIES, str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["missing", "axolotl"]
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_only_the_text_decoder_of_a_multimodal_model_is_scaled(tmp_path):
    """Gemma 3 with 4 heads for text and 8 for images."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    base = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1))
    names = [f"base_model.model.model.language_model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
    for fields in ({}, {"target_modules": ["o_proj", "out_proj"]}, {"target_modules": r".*(o|out)_proj"}):
        model = get_peft_model(base, SealConfig(granularity="head", **fields))
        assert list(scales(model)) == [f"{name}.seal_scale.default" for name in names]
        assert all(scale.shape == (4,) for scale in scales(model).values())
        model.save_pretrained(tmp_path)
        assert saved_scales(tmp_path).shape == (2, 4, 1)
        base = model.unload()


def test_heads_are_counted_from_the_module_not_from_the_config():
    """Gemma 4 has heads of one size in full and of another in sliding attention; values may differ from keys."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    settings = {**COMMON, "num_key_value_heads": 2, "num_global_key_value_heads": 2, "head_dim": 8,
                "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
                "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    for granularity, sizes in (("head", [4, 4]), ("channel", [32, 64])):
        model = get_peft_model(Gemma4ForCausalLM(Gemma4TextConfig(**settings)), SealConfig(granularity=granularity))
        assert [scale.numel() for scale in scales(model).values()] == sizes
        assert [layer.num_heads for layer in model.modules() if isinstance(layer, SealLayer)] == [4, 4]


@pytest.mark.parametrize("grains", [("head", "channel"), ("channel", "head")])
def test_each_row_of_a_batch_has_the_adapter_named_for_it(grains):
    model = wrap(grain=grains[0]).eval()
    model.add_adapter("b", SealConfig(granularity=grains[1], layers_to_transform=[1]))
    randomise(model)
    ids = token_ids(batch=1)
    wanted = {"__base__": logits_of(model, ids, None), "default": logits_of(model, ids, "default"),
              "b": logits_of(model, ids, "b")}  # fmt: skip
    names = ["b", "__base__", "default", "b"]
    with torch.no_grad():
        mixed = model(input_ids=ids.repeat(4, 1), adapter_names=names).logits
    for row, name in zip(mixed, names, strict=True):
        torch.testing.assert_close(row, wanted[name][0], atol=1e-5, rtol=0)
    assert (wanted["b"] - wanted["default"]).abs().max() > 1e-2
    assert torch.equal(logits_of(model, ids, "b"), wanted["b"])  # afterwards the active adapter is used again
    options = {"num_beams": 2, "max_new_tokens": 4}
    generated = model.generate(input_ids=ids.repeat(2, 1), adapter_names=["default", "b"], **options)
    for row, name in zip(generated, ["default", "b"], strict=True):
        model.set_adapter(name)
        assert row.tolist() == model.generate(input_ids=ids, **options)[0].tolist()


def logits_of(model, ids, name):
    """The logits with one adapter active, or with none."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if name is None:
            stack.enter_context(model.disable_adapter())
        else:
            model.set_adapter(name)
        return model(input_ids=ids).logits


def test_rows_that_cannot_have_their_adapter_are_refused():
    model = wrap().eval()
    call = lambda names: model(input_ids=token_ids(), adapter_names=names)  # noqa: E731
    with pytest.raises(ValueError, match=r"there is no adapter 'c': found \['default'\]"):
        call(["default", "c"])
    with pytest.raises(ValueError, match="found 1 names for 2 rows"):
        call(["default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights of all rows"):
        call(["default", "default"])
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        call(["default", "default"])


@pytest.mark.parametrize("lines", [
    "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as types; import axolotl_plugins.seal",
    "from axolotl_plugins.seal import SealConfig; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as types",
    "import axolotl_plugins.seal.model_loading; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as types",
])  # fmt: skip
def test_imports_register_the_tuner_in_any_order(lines):
    done = subprocess.run([sys.executable, "-c", f"{lines}; print('SEAL' in types)"], capture_output=True, text=True,
                          cwd=ROOT)  # fmt: skip
    assert done.stdout == "True\n", done.stderr[-2000:]
