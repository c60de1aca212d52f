"""The cost model against the arithmetic it states, and the bench end to end at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from paths import ROOT, TINY_SEALC
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from recipes import bench
from recipes.__main__ import cost_lines
from recipes.cost import Held, Shape, longest_sample, recipe_cost, training_bytes, training_flop
from recipes.matrix import read_matrix


def shape(name: str) -> Shape:
    return Shape.of(read_matrix()["shapes"][name])


def test_the_papers_main_run():
    """LongChat-7B, 50 samples of 31K tokens: 8.4e16 FLOP, 1.17e17 with activations formed again."""
    assert shape("llama2_7b").parameters == pytest.approx(6.74e9, rel=1e-3)
    assert 50 * training_flop(shape("llama2_7b"), 31_000) == pytest.approx(8.4e16, rel=0.01)
    assert 50 * training_flop(shape("llama2_7b"), 31_000, recompute=True) == pytest.approx(1.17e17, rel=0.01)


def test_grouped_heads_and_tied_embeddings_are_counted():
    assert shape("llama31_8b").parameters == pytest.approx(8.03e9, rel=1e-3)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=32, vocab_size=100, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    assert Shape.of(config.to_dict()).parameters == weights


@pytest.mark.parametrize("tokens", [128, 256, 512])
def test_flop_are_those_that_a_step_performs(tokens):
    """Counted by PyTorch, attention written out in full there, which is twice causal attention forward and back."""
    settings = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
                "num_key_value_heads": 4, "vocab_size": 300, "model_type": "llama"}  # fmt: skip
    model = bench.build(settings, "SEAL-C", tokens, "cpu", checkpointing=False)
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 300, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        bench.answer_loss(model, ids, tokens - bench.ANSWER).backward()
    one = Shape.of(settings)
    attention = 2 * tokens**2 * one.attention * one.layers
    # Eager attention multiplies the whole square, 2 x forward and 2 x 2 x backward, where 1 and 2.5 are counted.
    expected = training_flop(one, tokens, answer=bench.ANSWER) + (2 + 4 - 3.5) * attention
    # Nothing goes back below the lowest scale: not through the first layer's attention, queries, keys and values.
    expected -= 4 * attention / one.layers + 2 * one.hidden * (one.attention + 2 * one.shared) * tokens
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_memory_grows_linearly():
    one, two, four = (training_bytes(shape("llama2_7b"), 1000 * n) for n in (10, 20, 40))
    assert four - two == pytest.approx(2 * (two - one))


MEASURE = """
import gc, sys, torch
from recipes import bench
torch.set_num_threads(1)
tokens, checkpointing = int(sys.argv[1]), sys.argv[2] == "True"
run = bench.Run(bench.SMALL, "SEAL-C", tokens, "cpu", checkpointing)
long, run.ids = run.ids, run.ids[:, :256]
run.step()
run.ids = long
read = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the highest mark starts anew
before = read("VmRSS")
run.step()
print((read("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tokens", [2048, 4096, 8192])
def test_memory_of_a_step_is_what_the_formula_says(tokens, checkpointing):
    """In float32 on a CPU, what a step adds to the model."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tokens), str(checkpointing)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    held, small = Held(element=4, recompute=checkpointing), Shape.of(bench.SMALL)
    full, empty = (training_bytes(small, n, held=held) for n in (tokens, 0))
    assert int(done.stdout.split()[-1]) == pytest.approx(full - empty, rel=0.1)


def test_the_longest_sample_fits_and_a_longer_one_does_not():
    for held in (Held(), Held(quantised=0.5, offload=True), Held(devices=8, sharers=8)):
        for gib in (24, 80):
            tokens = longest_sample(shape("llama2_7b"), gib, held)
            assert training_bytes(shape("llama2_7b"), tokens, held=held) <= gib * 2**30
            assert training_bytes(shape("llama2_7b"), tokens + 200, held=held) > gib * 2**30
    assert longest_sample(shape("llama2_13b"), 24, Held()) == 0
    offloaded = {"gradient_checkpointing": True, "activation_offloading": "hidden_states"}
    offloaded |= {"load_in_8bit": True, "bf16": True}
    assert Held.of(offloaded) == Held(quantised=1.0, recompute=True, offload=True)


def test_cost_of_a_recipe():
    lines = cost_lines(ROOT / "recipes" / "longchat7b_line_sealc.yml", "a100")
    assert "6.74 B parameters, 31000 tokens" in lines[0] and "40.9 at the 11%" in lines[2]
    assert "24 GiB 22" in lines[4] and "80 GiB 1" in lines[4]
    names = ("llama31_8b_128k_line_sealc", "llama31_8b_128k_line_sealc_cp8")
    alone, shared = (cost_lines(ROOT / "recipes" / f"{name}.yml", "a100") for name in names)
    assert "time on a100: 103.6 minutes" in alone[2] and "time on 8 x a100: 13.0 minutes" in shared[2]
    assert "memory: about 73 GiB" in alone[3] and "memory of each: about 24 GiB" in shared[3]
    assert cost_lines(TINY_SEALC, "h100")
    with pytest.raises(ValueError, match="gpu: found 'b17'"):
        cost_lines(TINY_SEALC, "b17")
    with pytest.raises(ValueError, match="not a recipe"):
        cost_lines(ROOT / "recipes" / "matrix.yml", "h100")


def test_float32_costs_what_the_card_takes_for_it():
    shape7b, settings = shape("llama2_7b"), yaml.safe_load((ROOT / "recipes" / "longchat7b_line_sealc.yml").read_text())
    bf16 = recipe_cost(settings, shape7b).minutes("a100")[0]
    tf32, float32 = (
        recipe_cost(settings | {"bf16": False, "tf32": tf32}, shape7b).minutes("a100")[0] for tf32 in (True, False)
    )
    assert tf32 == pytest.approx(2 * bf16) and float32 == pytest.approx(16 * bf16)  # 312, 156 and 19.5 TFLOP/s


def test_bench_runs_end_to_end(tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main(["--layers", "1", "--tokens", "64", "96", "--repeats", "2", "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    assert [(row["tokens"], row["method"]) for row in found["rows"]] == [
        (tokens, method) for tokens in (64, 96) for method in bench.METHODS
    ]
    assert all(row["seconds"] > 0 and 0 < row["share"] < 1 and row["ratio"][0] > 0 for row in found["rows"])
    assert "matrix products" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shape", "huge"], "shape: found 'huge'"), (["--tokens", "30"], "expected more than the answer's 40")],
)
def test_bench_refuses(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        bench.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "x.json")])
    assert not list(tmp_path.iterdir())
