"""A model's window and RoPE, in every form in which configs state them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import axolotl_plugins.self_extend  # noqa: F401 - registers its RoPE type
from axolotl_plugins.common.window import condensed, context_window, read_config, ropes, stated_window

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97,
    "intermediate_size": 48,
}  # fmt: skip
ALIBI = {"model_type": "bloom", "hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 97}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97}
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
SELF_EXTEND = {"rope_type": "self_extend", "rope_theta": 1e4, "group_size": 6, "neighbor_window": 1024}


def write(folder: Path, config: dict) -> str:
    """A model folder that holds a config alone."""
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def scaled(window: int, **rope: object) -> dict:
    return {**LLAMA, "max_position_embeddings": window, "rope_scaling": rope}


WINDOWS = {
    # Vicuna-16K's own config, at an eighth of its size: pretrained window, factor, and stretched window.
    "vicuna": (scaled(512, type="linear", factor=4.0) | {"max_sequence_length": 2048}, 2048),
    "longchat 32k": (scaled(2048, type="linear", factor=8.0), 2048),
    "longchat 16k": ({**LLAMA, "max_position_embeddings": 256, "rope_condense_ratio": 8}, 2048),
    "linear with original": (scaled(512, rope_type="linear", factor=4.0, original_max_position_embeddings=512), 2048),
    "dynamic with original": (scaled(512, type="dynamic", factor=4.0, original_max_position_embeddings=512), 2048),
    "yarn": (scaled(512, type="yarn", factor=4.0, original_max_position_embeddings=512), 2048),
    "yarn, stretched": (scaled(2048, rope_type="yarn", factor=4.0, original_max_position_embeddings=512), 2048),
    "yarn without original": (scaled(512, type="yarn", factor=4.0), 2048),
    "llama3": (scaled(2048, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=128), 2048),
    "longrope": (scaled(2048, type="longrope", original_max_position_embeddings=512, **LONGROPE), 2048),
    "self-extend": (scaled(16384, **SELF_EXTEND), 16384),
    "self-extend with original": (scaled(4096, **SELF_EXTEND, original_max_position_embeddings=4096), 19452),
    "unused max_sequence_length": ({**LLAMA, "max_position_embeddings": 512, "max_sequence_length": 2048}, 512),
    "bloom": ({**ALIBI, "seq_length": 2048}, 2048),
    "bloom, stated": ({**ALIBI, "max_position_embeddings": 300}, 300),
    "mpt": ({**MPT, "max_seq_len": 256}, 256),
    "gpt2": ({"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 77}, 77),
    "gemma3": ({"model_type": "gemma3_text", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
                "head_dim": 8, "vocab_size": 97, "max_position_embeddings": 512, "rope_theta": 1e6,
                "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 512),
    "a vision model": ({"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text", "head_dim": 8,
                                                              "max_position_embeddings": 640}}, 640),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_the_window_is_read_in_every_spelling(name, tmp_path):
    config, window = WINDOWS[name]
    loaded = read_config(write(tmp_path, config))
    assert stated_window(loaded) == window == context_window(loaded, "model")
    loaded.save_pretrained(tmp_path)  # in the form of today's Transformers
    assert stated_window(read_config(str(tmp_path))) == window


def test_a_condensed_rope_is_read_as_linear_scaling_once(tmp_path):
    config = read_config(write(tmp_path, {**LLAMA, "max_position_embeddings": 256, "rope_condense_ratio": 8}))
    assert ropes(config) == [{"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}] and not condensed(config)
    config.save_pretrained(tmp_path)
    assert ropes(read_config(str(tmp_path)))[0]["factor"] == 8.0 and read_config(str(tmp_path)).rope_condense_ratio == 8
    plain = read_config(write(tmp_path, {**LLAMA, "max_position_embeddings": 256, "rope_condense_ratio": 1}))
    assert ropes(plain)[0]["rope_type"] == "default"


def test_a_config_without_a_window_names_the_remedies(tmp_path):
    name = write(tmp_path, ALIBI)
    assert stated_window(read_config(name)) is None and context_window(read_config(name), name, 99) == 99
    with pytest.raises(ValueError, match=r"states no context window .*model_config: {max_position_embeddings: N}"):
        context_window(read_config(name), name)
    # Transformers itself drops changes of keys that a config lacks.
    assert stated_window(read_config(name, {"max_position_embeddings": 128})) == 128
    assert stated_window(read_config(name, {"seq_length": 64})) == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [({"model_type": "nothing"}, "cannot load the config of .*nothing"),
     (scaled(512, type="su", **LONGROPE) | {"model_type": "phi3", "pad_token_id": 0}, "cannot load the config of .*"
      "Missing required keys in `rope_parameters` for 'rope_type'='longrope'")],
)  # fmt: skip
def test_a_config_that_cannot_be_read_is_one_line(config, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_config(write(tmp_path, config))
    assert "\n" not in str(error.value)


def test_a_misspelt_key_is_refused_and_another_one_added(tmp_path):
    name = write(tmp_path, LLAMA)
    with pytest.raises(ValueError, match=r"max_position_embedings: .* is max_position_embeddings meant"):
        read_config(name, {"max_position_embedings": 512})
    assert read_config(name, {"rope_condense_ratio": 1}).rope_condense_ratio == 1
    assert read_config(name, {"max_position_embeddings": 512}).max_position_embeddings == 512
