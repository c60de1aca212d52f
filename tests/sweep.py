"""SEAL's whole life on a miniature of every causal language model in Transformers.

``python tests/sweep.py MODEL_TYPE`` checks one architecture, ``python tests/sweep.py`` checks all and writes
docs/supported-models.md.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from paths import ROOT, TINY
from peft import PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from axolotl_plugins.seal import SealConfig, SealLayer, find_attention_outputs
from axolotl_plugins.seal.export import export_ia3
from axolotl_plugins.seal.merge import merge, verify
from axolotl_plugins.seal.model_loading import LoadedModel, load
from eval.generation import base_model, default_generation, generate_answers

TABLE = ROOT / "docs/supported-models.md"
TIMEOUT = 60  # seconds of CPU time per architecture
WINDOW = 1024  # tokens
LARGEST = 1_000_000  # parameters

# Value in a miniature -> the keys of configs that get it, if the config has them.
SHRUNK_KEYS = {
    32: "hidden_size d_model n_embd dim embedding_size hidden_dim emb_dim dim_model lru_width attention_hidden_size "
    "input_embedding_size output_embedding_size",
    48: "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim moe_intermediate_size "
    "shared_expert_intermediate_size mlp_hidden_size dim_ff ffn_hidden_size intermediate_size_mlp "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "dense_intermediate_size d_inner dff",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads kv_n_heads "
    "num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads mamba_num_heads n_mamba_heads "
    "linear_num_value_heads linear_num_key_heads index_n_heads num_hidden_layers n_layer n_layers num_layers "
    "decoder_layers encoder_layers num_decoder_layers num_encoder_layers num_experts n_routed_experts "
    "num_local_experts moe_num_experts qk_nope_head_dim rotary_dim hidden_size_per_layer_input",
    2: "num_key_value_heads num_kv_heads num_global_key_value_heads swa_num_key_value_heads num_experts_per_tok moe_k "
    "top_k_experts moe_topk eos_token_id",
    8: "head_dim global_head_dim d_kv kv_channels attention_head_dim swa_head_dim swa_v_head_dim attention_head_size "
    "qk_rope_head_dim mamba_d_state ssm_state_size state_size",
    12: "v_head_dim",
    16: "kv_lora_rank q_lora_rank o_lora_rank embedding_rank lora_rank mamba_d_head mamba_head_dim mamba_headdim "
    "linear_key_head_dim linear_value_head_dim index_head_dim",
    1: "n_group topk_group num_expert_group mamba_n_groups n_groups first_k_dense_replace bos_token_id",
    0: "num_nextn_predict_layers num_kv_shared_layers pad_token_id",
    64: "mamba_d_ssm",
    128: "sliding_window attention_window_size window_size",
    WINDOW: "max_position_embeddings n_positions n_ctx max_seq_len seq_length",
}
SHRUNK: dict[str, Any] = {key: value for value, keys in SHRUNK_KEYS.items() for key in keys.split()}
SHRUNK["is_decoder"] = True
# What single architectures need besides: keys that must agree, and layers with attention among the first four.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
              "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
               "attention_head_dim": 16, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


class NotBuilt(Exception):
    """No miniature of an architecture can be built, for the reason in the message."""


def architectures() -> list[str]:
    """Return the model types of all causal language models in Transformers."""
    return sorted(AutoModelForCausalLM._model_mapping._model_mapping)


def shrink(config: Any, vocab_size: int) -> dict[str, Any]:
    """Return the keys of a default config that make it a miniature, nested configs included."""
    keys: dict[str, Any] = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            keys[name] = shrink(value, vocab_size)
        elif name in ("vocab_size", "vocab_size_per_layer_input"):
            keys[name] = vocab_size
        elif name in SHRUNK and not isinstance(value, dict):
            keys[name] = SHRUNK[name]
    if "kv_lora_rank" in keys and "num_key_value_heads" in keys:
        keys["num_key_value_heads"] = keys["num_attention_heads"]
    return keys | OWN.get(config.model_type, {})


def miniature(model_type: str, vocab_size: int) -> PreTrainedModel:
    """Build the random-weight miniature of an architecture from its default config.

    Raises:
        NotBuilt: its config or size does not allow it.
    """
    kind = CONFIG_MAPPING[model_type]
    try:
        config = kind(**shrink(kind(), vocab_size))
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:  # whatever a config raises for keys that it does not know
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    if size > LARGEST:
        raise NotBuilt(f"its smallest miniature has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2 and not name.endswith(("embeddings.weight", "wte.weight")):
                parameter.mul_(3)  # at the usual 0.02 every logit is all but the same
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits in evaluation mode without a cache."""
    return model.eval()(input_ids=ids, use_cache=False).logits


def check(model_type: str, folder: Path) -> tuple[str, str, str]:
    """Wrap, train, save, load, merge, verify, export and decode a miniature, with both kinds of scales.

    Returns:
        The modules that are scaled, those that ``auto`` merges into, and a remark.

    Raises:
        NotBuilt: there is no miniature.
        Exception: any other failure.
    """
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    base = folder / "base"
    model = miniature(model_type, len(tokenizer))
    scaled = find_attention_outputs(model)  # raises if it cannot be wrapped
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    try:
        AutoModelForCausalLM.from_pretrained(base)
    except Exception as error:
        raise NotBuilt(f"AutoModelForCausalLM cannot load what it saved ({type(error).__name__})") from error
    for granularity in ("head", "channel"):
        into, remark = check_adapter(base, folder / granularity, granularity)
    return ", ".join(scaled), into, remark


def check_adapter(base: Path, folder: Path, granularity: str) -> tuple[str, str]:
    """Check one kind of scales; see ``check``."""
    ids = torch.randint(3, 8000, (2, 24), generator=torch.Generator().manual_seed(0))
    plain = load(base, default_window=WINDOW).model
    before = logits(plain, ids)
    model = get_peft_model(plain, SealConfig(granularity=granularity, base_model_name_or_path=str(base)))
    assert torch.equal(logits(model, ids), before), "scales of 1 change logits"
    train_step(model, ids)
    tuned = logits(model, ids)
    assert not torch.equal(tuned, before), "trained scales do not change logits"
    model.save_pretrained(folder / "adapter")
    loaded = load(folder / "adapter", default_window=WINDOW)
    assert torch.equal(logits(loaded.model, ids), tuned), "the adapter is another after saving and loading"
    remark = check_decoding(loaded)
    tolerance = max(1e-4, 4 * rounding(model, ids, tuned))
    export_ia3(folder / "adapter", folder / "ia3")
    ia3 = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "ia3")
    torch.testing.assert_close(logits(ia3, ids), tuned, atol=tolerance, rtol=0)
    modules = ""
    for into in ("auto", "o_proj"):
        try:
            record = merge(folder / "adapter", folder / into, into, report=len)
        except ValueError as error:
            if "share one weight" not in str(error):
                raise
            return "", "is not merged: its layers share one weight"
        verify(folder / into, report=len)
        merged = AutoModelForCausalLM.from_pretrained(folder / into)
        torch.testing.assert_close(logits(merged, ids), tuned, atol=tolerance, rtol=0)
        modules = modules or ", ".join(sorted({name.split(".")[-2] for name in record["changed"]}))
        if modules in ("o_proj", "out_proj", "dense"):
            break  # both do the same
    return modules, remark


def rounding(model: PeftModel, ids: torch.Tensor, tuned: torch.Tensor) -> float:
    """Return by how much float32 rounds the logits of a model, which becomes float64."""
    model.get_base_model().set_experts_implementation("eager")
    try:
        return (logits(model.double(), ids) - tuned).abs().max().item()
    except RuntimeError:  # XGLM's mask does not exist in float64
        return 0.0


def train_step(model: PeftModel, ids: torch.Tensor) -> None:
    """Descend once; scales are the only parameters that train, and each has a gradient."""
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = [name for name, layer in model.named_modules() if isinstance(layer, SealLayer)]
    assert len(scales) == len(wrapped) > 0, "parameters other than scales are trained"
    model.train()
    output = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, scale in zip(wrapped, scales, strict=True):
        assert scale.grad is not None and scale.grad.any(), f"the scales of {name} have no gradient"
        scale.data -= 0.3 * scale.grad / scale.grad.abs().max()


@torch.no_grad()
def check_decoding(loaded: LoadedModel) -> str:
    """Compare the scorer's greedy answers with those of ``generate``; return a remark."""
    prompts = [torch.randint(3, 8000, (length,)).tolist() for length in (40, 33, 40)]
    answers = generate_answers(loaded.model, prompts, max_new_tokens=8, stop=[2])
    settings = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        with default_generation(base_model(loaded.model)):
            output = loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        generated = [token for token in output[0, len(prompt) :].tolist() if token != 2]
        if answer != generated:
            if generated != greedy(loaded.model, prompt, len(generated)):
                return "Transformers' own answers with a cache differ from those without"
            raise AssertionError("the scorer's answers are not those of `generate`")
    return ""


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Decode without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def row(model_type: str) -> str:
    """Check an architecture for at most ``TIMEOUT`` seconds of CPU time and return its row of the table.

    Raises:
        Exception: it has a miniature and can be wrapped, but a check failed.
    """
    cells = ["", "", ""]
    signal.signal(signal.SIGPROF, stop_check)
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cells = list(check(model_type, Path(folder)))
    except NotBuilt as error:
        cells[2] = f"not tried: {' '.join(str(error).split())[:160]}"
    except ValueError as error:
        if "cannot find the attention output projection" not in str(error):
            raise
        cells[2] = "cannot be wrapped: " + str(error).partition("candidates: ")[2]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return f"| {model_type} | {' | '.join(cells)} |"


def stop_check(*_: object) -> None:
    """Raise that an architecture takes too long."""
    raise NotBuilt(f"takes more than {TIMEOUT} s of CPU time")


HEAD = """# Architectures

Generated by `python tests/sweep.py`, which builds a random-weight miniature of every causal language model in
Transformers {version} from its default config. For SEAL-H and SEAL-C it wraps it, trains a step, saves, loads, merges
(into `o_proj` and `auto`), verifies, exports to IA3, loads that in plain PEFT, and compares the scorer's greedy answers
with `generate`. `pytest -m slow tests/seal/test_sweep.py` repeats it against this table.

Merged folders are plain Transformers models. Their config.json has the RoPE keys of Transformers 4 beside those of 5,
and 4.57 computes the same logits from them (`TRANSFORMERS_4=DIR pytest -m slow tests/seal/test_model_files.py`), but
for settings that it ignores in any folder: a scaled RoPE of Nemotron, and a local theta of ModernBERT-decoder that is
not the global one.

| model type | scaled | `merge --into auto` | remark |
|---|---|---|---|
"""


def main(model_types: list[str]) -> None:
    """Print the rows of some architectures, or write the table of all."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for model_type in model_types or architectures():
        try:
            rows.append(row(model_type))
        except Exception as error:
            if os.environ.get("TRACEBACK"):
                raise
            rows.append(f"| {model_type} | | | FAILED: {type(error).__name__} {' '.join(str(error).split())[:300]} |")
        print(rows[-1], flush=True)
    if not model_types:
        TABLE.write_text(HEAD.format(version=transformers.__version__) + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
