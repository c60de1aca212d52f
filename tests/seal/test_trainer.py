"""What the trainer adds: logits of answers alone, and stops where a run would be worth nothing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from axolotl_runs import launch, refusal, write_recipe
from miniatures import MINIATURES, build, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.answer_logits import answers_only, no_embedding_gradients
from axolotl_plugins.seal.trainer import AnswerTrainer, check_gradients, check_scales, check_trainable


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", MINIATURES)
def test_answers_alone_give_the_same_loss_and_gradients(name):
    model = get_peft_model(build(name), SealConfig(granularity="channel"))
    ids = token_ids(2)
    labels = torch.full_like(ids, -100)
    labels[0, 15:20], labels[1, 18:] = ids[0, 15:20], ids[1, 18:]
    inputs = {"input_ids": ids, "labels": labels}
    cut = answers_only(inputs)
    assert model(**cut).logits.shape[1] == 9 == len(cut["logits_to_keep"])  # positions 14 to 22
    (loss, gradients), (cut_loss, cut_gradients) = (loss_and_gradients(model, one) for one in (inputs, cut))
    assert all(gradient.any() for gradient in gradients)
    torch.testing.assert_close(cut_loss, loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(cut_gradients, gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lowest", [0, 1])
def test_gradients_end_at_the_lowest_scale(lowest):
    """Whoever asked for gradients of the embeddings before; checkpointing is not reentrant."""
    grown, passed = [], []
    for cut in (False, True):
        model = get_peft_model(build("llama_gqa"), SealConfig(granularity="channel", layers=[lowest, 1])).train()
        base = model.get_base_model()
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if cut:
            no_embedding_gradients(base)
        below = [layer.self_attn.q_proj for layer in base.model.layers[: lowest + 1]]
        reached: list[str] = []
        for projection in below:
            projection.register_full_backward_hook(lambda *_, reached=reached: reached.append("q"))
        ids = token_ids(1)
        grown.append(loss_and_gradients(model, {"input_ids": ids, "labels": ids})[1])
        passed.append(len(reached))
    assert passed == [lowest + 1, 0]
    assert all(gradient.any() for gradient in grown[0])
    torch.testing.assert_close(grown[1], grown[0], rtol=0, atol=0)


def test_embeddings_that_are_trained_keep_their_gradients():
    model = get_peft_model(build("llama_gqa"), LoraConfig(target_modules=["q_proj", "embed_tokens"], lora_alpha=4))
    no_embedding_gradients(model.get_base_model())
    ids = token_ids(1)
    model(input_ids=ids, labels=ids).loss.backward()
    assert next(p for name, p in model.named_parameters() if "lora_embedding_A" in name).grad.any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"activation_offloading": "legacy"}, True),
        ({"gradient_checkpointing": True}, True),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, True),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, False),
    ],
)
def test_checkpointing_that_asks_for_gradients_of_embeddings_is_known(settings, expected):
    args = {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None, "activation_offloading": None}
    assert AnswerTrainer.reentrant(SimpleNamespace(args=SimpleNamespace(**args | settings))) is expected


def test_a_sample_without_an_answer_is_refused():
    ids = token_ids(1)
    with pytest.raises(ValueError, match="no token to train on"):
        answers_only({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    # The first token is nothing's prediction, so a label there alone is none either.
    labels = torch.full_like(ids, -100)
    labels[0, 0] = ids[0, 0]
    with pytest.raises(ValueError, match="no token to train on"):
        answers_only({"input_ids": ids, "labels": labels})


def test_only_scales_may_be_trained():
    model = get_peft_model(build("llama_mha"), SealConfig(granularity="head"))
    check_trainable(model)
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters other than scales are trainable, such as .*lm_head"):
        check_trainable(model)
    with pytest.raises(ValueError, match="other than scales"):
        check_trainable(get_peft_model(build("llama_mha"), LoraConfig(target_modules=["q_proj"])))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no scale is trainable"):
        check_trainable(model)


def test_modules_that_never_ran_and_gradients_that_vanish_are_found():
    model = get_peft_model(build("llama_mha"), SealConfig(granularity="head"))
    ids = token_ids(1)
    model(input_ids=ids, labels=ids).loss.backward()
    check_gradients(model)
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for scale in scales:
        scale.grad.zero_()
    with pytest.raises(ValueError, match="gradient of every scale is zero"):
        check_gradients(model)
    scales[1].grad = None
    with pytest.raises(ValueError, match=r"1 of 2 wrapped modules have no gradient, such as .*layers\.1\."):
        check_gradients(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_found(value):
    model = get_peft_model(build("llama_mha"), SealConfig(granularity="head"))
    check_scales(model)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[2] = value
    with pytest.raises(ValueError, match=r"scales of .*o_proj are non-finite: lower the learning rate"):
        check_scales(model)


def test_a_launched_run_that_diverges_writes_no_adapter(tmp_path):
    write_recipe(tmp_path, learning_rate=1e20)
    assert "lower the learning rate" in refusal(launch(tmp_path))
    assert not list(tmp_path.glob("out/**/*.safetensors"))


MEASURE = """
import re, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from peft import get_peft_model
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.answer_logits import answers_only
config = LlamaConfig(vocab_size=32000, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=1, max_position_embeddings=8192)
model = get_peft_model(LlamaForCausalLM(config), SealConfig(granularity="channel"))
ids = torch.randint(0, 32000, (1, 8192))
labels = torch.full_like(ids, -100)
labels[0, -40:] = ids[0, -40:]
inputs = {"input_ids": ids, "labels": labels}
short = {key: value[:, -64:] for key, value in inputs.items()}
model(**answers_only(short)).loss.backward()
gib = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, whatever importing took
before = gib("VmRSS")
model(**(answers_only(inputs) if sys.argv[1] == "answers" else inputs)).loss.backward()
print(gib("VmHWM") - before)
"""


def test_memory_of_answers_alone():
    """8,192 tokens, a vocabulary of 32,000: 1 GiB for every copy of all logits, of which there are several."""

    def grown(what: str) -> float:
        done = subprocess.run([sys.executable, "-c", MEASURE, what], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    assert grown("all") > 2
    assert grown("answers") <= 0.1


def test_scaling_keeps_no_copy_of_its_input():
    """In bfloat16 a product formed in float32 would otherwise leave a float32 copy for the backward pass."""
    model = get_peft_model(build("llama_mha", torch.bfloat16), SealConfig(granularity="channel"))
    layer = next(module for module in model.modules() if type(module).__name__ == "SealLayer")
    layer.base_layer = nn.Identity()
    x = torch.randn(1, 50, 32, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.dtype for t in kept if t.numel() >= x.numel()] == [torch.bfloat16]
    assert all(t.data_ptr() == x.data_ptr() for t in kept if t.numel() >= x.numel())
