"""Self-Extend against its formula, written out in full: positions, cache, padding, gradients, saved configs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from paths import ROOT
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import axolotl_plugins.self_extend.attention as self_extend
from axolotl_plugins.seal import SealConfig

GROUP, WINDOW = 3, 8
SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "initializer_range": 0.3, "hidden_act": "gelu",
}  # fmt: skip
ROPE = {"rope_type": "self_extend", "rope_theta": 100.0, "group_size": GROUP, "neighbor_window": WINDOW}
FAMILIES = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "Qwen2": {"num_key_value_heads": 4},
    "GPTNeoX": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
}
EXACT = {"rope_parameters": {**ROPE, "exact_offset": True}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(self_extend, "QUERIES", 7)


def build(family: str, **changes: object):
    torch.manual_seed(0)
    settings = copy.deepcopy({"rope_parameters": ROPE, **SHAPE, **FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    return model.eval()


def formula(module, query, key, value, attention_mask, scaling=None, **_):
    """The whole T x T of it: (B, H, T, D) rotated at true positions in, (B, T, H, D) out. No padding, no cache."""
    config = module.config
    tokens, half = query.shape[2], len(self_extend.inverse_frequencies(config))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    place = torch.arange(tokens)

    def at(x, where):
        """Undo the rotation, in complex numbers, and rotate to ``where``."""
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
        turn = (where - place)[:, None] * self_extend.inverse_frequencies(config)
        pairs = pairs * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)

    near = query @ key.transpose(-1, -2)
    exact = config.rope_parameters.get("exact_offset")
    far = at(query, place // GROUP + WINDOW - (WINDOW / GROUP if exact else WINDOW // GROUP)) @ at(
        key, place // GROUP
    ).transpose(-1, -2)
    distance = place[:, None] - place[None, :]
    scores = torch.where(distance < WINDOW, near, far) * (scaling or query.shape[-1] ** -0.5)
    scores = scores.masked_fill(distance < 0, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), ("Llama", EXACT)])
def test_logits_and_gradients_are_the_formulas(family, changes, monkeypatch):
    model = get_peft_model(build(family, **changes), SealConfig(granularity="channel"))
    ids = torch.randint(1, 97, (2, 40))

    def run():
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    ours, gradients = run()
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(functions._global_mapping, "self_extend", formula)
    reference, expected = run()
    torch.testing.assert_close(ours, reference, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(gradients, expected, atol=2e-4, rtol=1e-3)
    model.config.rope_parameters["group_size"] = 1
    plain = build(family, rope_parameters={**model.config.rope_parameters, "rope_type": "default"})
    assert (plain(input_ids=ids).logits - ours).abs().max() > 1e-2  # beyond the window it is another function


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_chunks_and_padding_change_no_token(family):
    model = build(family)
    prompts = [torch.randint(1, 97, (n,)) for n in (21, 37)]
    uncached = []
    for ids in prompts:
        for _ in range(12):
            ids = torch.cat((ids, model(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)))
        uncached.append(ids[-12:].tolist())
    width = max(map(len, prompts))
    batch = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0)) for ids in prompts])
    answers = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": (batch > 0).long()}
    together = model.generate(batch, **answers)[:, width:].tolist()
    in_chunks = model.generate(batch, **answers, prefill_chunk_size=9)[:, width:].tolist()
    assert together == uncached and in_chunks == uncached


def test_the_offset_of_far_keys_is_rounded_down_unless_asked_otherwise():
    ids = torch.randint(1, 97, (1, 40))
    assert self_extend.settings(build("Llama").config)[2] == WINDOW - WINDOW // GROUP
    assert self_extend.settings(build("Llama", **EXACT).config)[2] == pytest.approx(WINDOW - WINDOW / GROUP)
    difference = (build("Llama")(input_ids=ids).logits - build("Llama", **EXACT)(input_ids=ids).logits).abs()
    assert difference[:, :WINDOW].max() == 0 and difference[:, -1].max() > 1e-3


def test_group_and_window_live_in_the_saved_config(tmp_path):
    model = build("Llama")
    model.save_pretrained(tmp_path)
    ids = torch.randint(1, 97, (1, 40))
    for options in ({}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits), options


def test_without_the_plugin_loading_fails(tmp_path):
    build("Llama").save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "self_extend" in done.stderr
    with_it = "import axolotl_plugins.self_extend; " + code
    assert subprocess.run([sys.executable, "-c", with_it], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Llama", {"rope_parameters": {**ROPE, "group_size": 0}}, "group_size: found 0"),
        ("Llama", {"rope_parameters": {**ROPE, "neighbor_window": "1024"}}, "neighbor_window: found '1024'"),
        ("Llama", {"rope_parameters": {**ROPE, "exact_offset": 1}}, "exact_offset: found 1"),
        ("Mistral", {"sliding_window": 64}, "has sliding-window attention"),
    ],
)
def test_settings_without_meaning_are_refused(family, changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        build(family, **changes)


def test_other_layouts_of_rotary_channels_are_refused():
    config = copy.deepcopy(build("Llama").config)
    config.model_type = "cohere"
    with pytest.raises(ValueError, match="found cohere"):
        self_extend.settings(config)


MEASURE = """
import sys, torch
import axolotl_plugins.self_extend
from transformers import AutoConfig, AutoModelForCausalLM
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.tune import answer_loss
from peft import get_peft_model

torch.set_num_threads(1)
tokens = int(sys.argv[1])
config = AutoConfig.from_pretrained("tests/fixtures/tiny", max_position_embeddings=tokens, rope_parameters=dict(
    rope_type="self_extend", rope_theta=5e5, group_size=6, neighbor_window=1024))
model = get_peft_model(AutoModelForCausalLM.from_config(config), SealConfig(granularity="channel")).train()
model.enable_input_require_grads()
model.gradient_checkpointing_enable({"use_reentrant": False})
ids = torch.randint(3, 1000, (1, tokens))

def step(ids):
    answer_loss(model, ids, ids.shape[1] - 20).backward()

read = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
step(ids[:, :300])
open("/proc/self/clear_refs", "w").write("5")  # the highest mark starts anew
before = read("VmRSS")
step(ids)
assert model.base_model.model.model.layers[0].self_attn.o_proj.seal_scale["default"].grad.abs().min() > 0
print((read("VmHWM") - before) / 1024)
"""


@pytest.mark.slow
def test_memory_of_tuning_is_linear_in_tokens():
    """4K, 8K and 16K tokens on the small model: scores of all pairs of 16K tokens alone would be 4 GiB a layer."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    grown = []
    for tokens in (4096, 8192, 16384):
        done = subprocess.run([sys.executable, "-c", MEASURE, str(tokens)], cwd=ROOT, env=environment,
                              capture_output=True, text=True, check=True)  # fmt: skip
        grown.append(float(done.stdout.split()[-1]))
    assert grown[1] < 2.2 * grown[0] and grown[2] < 2.2 * grown[1] and grown[2] < 1024, grown
