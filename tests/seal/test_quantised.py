"""Scales over a quantised base model, with bitsandbytes on the CPU; merging goes into full precision."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from smoke import build_miniature
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.merge import merge
from axolotl_plugins.seal.model_loading import load

pytest.importorskip("bitsandbytes")
BITS = {"8": {"load_in_8bit": True}, "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build_miniature("longchat7b", folder)
    return folder


def gradients(base, **options):
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    model = get_peft_model(model, SealConfig(granularity="head", base_model_name_or_path=str(base)))
    ids = torch.randint(10, 8000, (1, 64), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, loss.detach(), torch.cat([scale.grad for scale in scales])


@pytest.mark.parametrize("bits", BITS)
def test_scales_train_over_a_quantised_projection_and_merge_into_full_precision(base, bits, tmp_path):
    full, loss, wanted = gradients(base)
    model, near, found = gradients(base, quantization_config=BitsAndBytesConfig(**BITS[bits]))
    kind = type(model.base_model.model.model.layers[0].self_attn.o_proj.base_layer).__name__
    assert kind == {"8": "Linear8bitLt", "4": "Linear4bit"}[bits]
    assert (near - loss).abs() / loss < 0.05 and not torch.equal(found, wanted)
    assert torch.cosine_similarity(found, wanted, dim=0) > {"8": 0.98, "4": 0.7}[bits]
    assert all(scale.dtype == torch.float32 for scale in model.parameters() if scale.requires_grad)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with pytest.raises(ValueError, match="quantised projection: merge into the full-precision"):
        model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().config.save_pretrained(tmp_path / "adapter")  # as Axolotl does
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged", "o_proj", report=lambda _: None)
    assert (result["dtype"], len(result["changed"])) == ("float32", 2)
    scales = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    plain, merged = full.get_base_model(), load(tmp_path / "merged").model
    for layer, scale in enumerate(scales.values()):
        old = plain.model.layers[layer].self_attn.o_proj.base_layer.weight
        new = merged.model.layers[layer].self_attn.o_proj.weight
        assert (scale != 1).all()
        torch.testing.assert_close(new, old * scale.repeat_interleave(old.shape[1] // len(scale)))
