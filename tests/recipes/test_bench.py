"""The cost model against the arithmetic it states, and the bench end to end at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from miniatures import build, token_ids
from paths import ROOT, TINY_SEALC
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_plugins.seal import SealConfig
from recipes import bench
from recipes.tools.cost import (
    CARD_SHARE,
    CARDS,
    Shape,
    StepConfig,
    choices,
    fastest,
    host_bytes,
    layer_bytes,
    longest_sample,
    recipe_cost,
    step_seconds,
    training_bytes,
    training_flop,
)
from recipes.tools.cost_report import cost_lines
from recipes.tools.render import device_name, measured_steps, read_matrix


def shape(name: str) -> Shape:
    return Shape.of(read_matrix()["shapes"][name])


def test_the_papers_main_run():
    """LongChat-7B, 50 samples of 31K tokens: 8.4e16 FLOP, 1.17e17 with recomputed activations."""
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
    model = bench.build(settings, "SEAL-C", "cpu")
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


def step_of(row: dict) -> StepConfig:
    return replace(StepConfig.named(row["setting"]), low_rank=row["method"] == "LoRA")


@pytest.mark.parametrize("row", measured_steps(), ids=lambda row: f"{row['method']}-{row['setting']}-{row['tokens']}")
def test_the_estimate_reproduces_every_measured_step(row):
    """Seconds within 5 %, memory within 10 %."""
    gpu = device_name(row).lower()
    seconds = step_seconds(shape(row["shape"]), row["tokens"], step_of(row), gpu)
    assert seconds == pytest.approx(row["seconds"], rel=0.05)
    gib = training_bytes(shape(row["shape"]), row["tokens"], step=step_of(row)) / 2**30
    assert gib == pytest.approx(row["peak_gib"], rel=0.1)


def test_every_goal_was_measured():
    """50 samples of 31,000 tokens in 170 s at 65 % of the matrix products' rate, and 131,000 tokens in 40 s."""
    rows = measured_steps()
    assert any(row["tokens"] == 31000 and 50 * row["seconds"] <= 170 and row["share"] >= 0.65 for row in rows)
    assert any(row["tokens"] == 131000 and row["seconds"] <= 40 for row in rows)


def test_the_fastest_setting_that_fits_is_chosen():
    """No choice that fits is faster; less memory is never faster."""
    liger, seven, eight = StepConfig(liger=True), shape("llama2_7b"), shape("llama31_8b")
    names = {card: fastest(seven, 31000, card, liger, gpu).name for card, gpu in CARDS.items()}
    assert names == {24: "selective+liger+offload_all", 48: "selective+liger", 80: "selective+liger+every2",
                     141: "none+liger"}  # fmt: skip
    assert fastest(eight, 131000, 80, liger, "h100").name == "selective+liger+offload"
    for card, gpu in CARDS.items():
        best = fastest(seven, 31000, card, liger, gpu)
        for choice in choices(liger):
            if training_bytes(seven, 31000, step=choice) <= CARD_SHARE * card * 2**30:
                assert step_seconds(seven, 31000, best, gpu) <= step_seconds(seven, 31000, choice, gpu)
    assert fastest(seven, 31000, 141, StepConfig(low_rank=True, liger=True)).name == "selective+liger"


def test_the_base_is_quantised_only_if_nothing_fits_otherwise():
    assert fastest(shape("llama2_13b"), 16000, 24, StepConfig(liger=True)).quantised == 1.0
    assert fastest(shape("llama2_13b"), 16000, 48, StepConfig(liger=True)).quantised is None
    with pytest.raises(ValueError, match="card: a sample of 131000 tokens takes at least 31 GiB even with"):
        fastest(shape("llama31_8b"), 131000, 24, StepConfig(liger=True))


def test_settings_of_a_recipe_are_read():
    settings = {"bf16": True, "gradient_checkpointing": True, "liger_glu_activation": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 3},
                "selective_checkpointing": {"offload": True}, "activation_offloading": "hidden_states"}  # fmt: skip
    step = StepConfig(selective=True, every=3, liger=True, offload="all")
    assert StepConfig.of(settings) == step and step.name == "selective+liger+every3+offload_all"
    assert StepConfig.of(settings | {"selective_checkpointing": True}).offload == "inputs"
    assert host_bytes(shape("llama2_7b"), 1000, step) == 1000 * 2 * 2 * 4096 * 11  # layers 0, 3, ... 30
    assert StepConfig.named(step.name) == StepConfig(selective=True, every=3, liger=True, offload="all")


def stored_bytes(placements: list[str]) -> int:
    """What autograd stores for a backward pass through all layers of a miniature, each storage once."""
    model = get_peft_model(build("llama_gqa"), SealConfig(placements=placements)).train()
    model.enable_input_require_grads()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model(input_ids=token_ids(1, 32)).logits.sum()
    scales = {parameter.data_ptr() for parameter in model.parameters()}
    return sum(tensor.nbytes for pointer, tensor in kept.items() if pointer not in scales)


@pytest.mark.parametrize("placement", ["query", "value", "mlp"])
def test_a_step_stores_what_is_scaled(placement):
    settings = {"seal": {"placements": ["attention_output", placement]}}
    config = build("llama_gqa").config.to_dict()
    of = Shape.of(config)
    expected = layer_bytes(of, StepConfig.of(settings), False) - layer_bytes(of, StepConfig(element=4), False)
    assert StepConfig.of({"seal": {"placements": placement}}).placements == (placement,)  # as a recipe may write it
    width = {"query": of.attention, "value": of.shared, "mlp": of.mlp}[placement]
    assert expected == 4 * width
    measured = stored_bytes(["attention_output", placement]) - stored_bytes(["attention_output"])
    assert measured == 32 * of.layers * expected


MEASURE = """
import gc, sys, torch
from axolotl_plugins.seal import SealConfig
from recipes import bench
torch.set_num_threads(1)
tokens, checkpointing = int(sys.argv[1]), sys.argv[2] == "True"
run = bench.Run(bench.SMALL, "SEAL-C", "cpu")
ids = bench.sample(tokens, 32_000, "cpu")
setting = bench.applied(run.model, bench.StepConfig(recompute=checkpointing))
setting.__enter__()
run.step(ids[:, :256])
read = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the highest mark starts anew
before = read("VmRSS")
run.step(ids)
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
    step, small = StepConfig(element=4, recompute=checkpointing), Shape.of(bench.SMALL)
    full, empty = (training_bytes(small, n, step=step) for n in (tokens, 0))
    assert int(done.stdout.split()[-1]) == pytest.approx(full - empty, rel=0.1)


def test_the_longest_sample_fits_and_a_longer_one_does_not():
    for step in (
        StepConfig(),
        StepConfig(quantised=0.5, offload="inputs"),
        StepConfig(devices=8, context_parallel_size=8),
    ):
        for gib in (24, 80):
            tokens = longest_sample(shape("llama2_7b"), gib, step)
            assert training_bytes(shape("llama2_7b"), tokens, step=step) <= gib * 2**30
            assert training_bytes(shape("llama2_7b"), tokens + 200, step=step) > gib * 2**30
    assert longest_sample(shape("llama2_13b"), 24, StepConfig()) == 0
    offloaded = {"gradient_checkpointing": True, "activation_offloading": "hidden_states"}
    offloaded |= {"load_in_8bit": True, "bf16": True}
    assert StepConfig.of(offloaded) == StepConfig(quantised=1.0, recompute=True, offload="inputs")


def test_cost_of_a_recipe():
    lines = cost_lines(ROOT / "recipes" / "longchat7b_line_sealc.yml", "a100")
    assert "6.74 B parameters, 31000 tokens" in lines[0] and lines[1].endswith("setting: selective+liger+every2")
    assert lines[2] == "time on a100: 8.3 minutes, 9.9 s a sample" and "80 GiB 35" in lines[4]
    assert lines[6:8] == ["  24 GiB (rtx4090): selective+liger+offload_all, 18 GiB, 21.6 s a sample",
                          "  48 GiB (l40s): selective+liger, 32 GiB, 10.4 s a sample"]  # fmt: skip
    names = ("llama31_8b_128k_line_sealc", "llama31_8b_128k_line_sealc_cp8")
    alone, shared = (cost_lines(ROOT / "recipes" / f"{name}.yml", "a100") for name in names)
    assert "time on a100: 99 minutes, 118.5 s a sample" in alone[2] and "time on 8 x a100: 15 minutes" in shared[2]
    assert "memory: about 70 GiB" in alone[3] and "memory of each: about 24 GiB" in shared[3]
    assert cost_lines(TINY_SEALC, "h100")
    with pytest.raises(ValueError, match="gpu: found 'b17'"):
        cost_lines(TINY_SEALC, "b17")
    with pytest.raises(ValueError, match="not a recipe"):
        cost_lines(ROOT / "recipes" / "matrix.yml", "h100")


def test_float32_costs_what_the_card_takes_for_it():
    shape7b, settings = shape("llama2_7b"), yaml.safe_load((ROOT / "recipes" / "longchat7b_line_sealc.yml").read_text())
    bf16 = recipe_cost(settings, shape7b).seconds("a100")
    tf32, float32 = (
        recipe_cost(settings | {"bf16": False, "tf32": tf32}, shape7b).seconds("a100") for tf32 in (True, False)
    )
    assert tf32 == pytest.approx(2 * bf16)  # 312 and 156 TFLOP/s, and twice the bytes
    assert 13 * bf16 < float32 < 16 * bf16  # 19.5 TFLOP/s, but no more bytes than with TF32


SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 300, "model_type": "llama"}  # fmt: skip


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    bench.answer_loss(model, ids, ids.shape[1] - bench.ANSWER).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["SEAL-C", "LoRA"])
def test_every_setting_gives_the_same_gradients(method):
    """Those of ``full`` to the bit, and nothing of a setting is left when the next is applied."""
    model, ids = bench.build(SHAPE, method, "cpu"), bench.sample(96, 300, "cpu")
    with bench.applied(model, StepConfig.named("full")):
        expected = gradients(model, ids)
    assert len(expected) == sum(p.requires_grad for p in model.parameters())
    assert all(g.any() for key, g in expected.items() if "lora_A" not in key)  # those are 0 at first, as B is
    for name in ("selective", "every2", "selective+every2", "every4", "offload", "selective+every2+offload_all", "none",
                 "flash", "full"):  # fmt: skip
        with bench.applied(model, StepConfig.named(name)):
            assert all(torch.equal(g, expected[key]) for key, g in gradients(model, ids).items()), name
        assert not model.get_base_model().is_gradient_checkpointing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a GPU")
@pytest.mark.parametrize("name", ["liger", "selective+liger+every2", "selective+liger+offload_all"])
def test_ligers_kernels_give_the_same_gradients(name):
    """Within the rounding of bfloat16."""
    pytest.importorskip("liger_kernel")
    if "offload" in name:
        pytest.importorskip("axolotl")
    model, ids = bench.build(SHAPE, "SEAL-C", "cuda"), bench.sample(96, 300, "cuda")
    with bench.applied(model, StepConfig.named("full")):
        expected = torch.cat([g.flatten() for g in gradients(model, ids).values()])
    with bench.applied(model, StepConfig.named(name)):
        result = torch.cat([g.flatten() for g in gradients(model, ids).values()])
    assert (result - expected).norm() < 0.05 * expected.norm()


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """Calls of attention forward and of matrix products."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attention += func in bench.ATTENTION
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_settings_recompute_what_they_say():
    """Five layers of seven projections: attention and products of a step by setting, beside those that are kept."""
    model, ids = bench.build(SHAPE, "SEAL-C", "cpu"), bench.sample(96, 300, "cpu")
    counts = {}
    for name in ("none", "full", "every2", "every4", "selective", "selective+every2"):
        with bench.applied(model, StepConfig.named(name)), Count() as count:
            gradients(model, ids)
        counts[name] = (count.attention, count.products)
    attention, products = counts["none"]
    layers = {name: round((n - products) / 6) for name, (_, n) in counts.items()}  # the down projection is not needed
    assert layers == {"none": 0, "full": 5, "every2": 3, "every4": 2, "selective": 5, "selective+every2": 3}
    again = {name: n - attention for name, (n, _) in counts.items()}
    assert again == {"none": 0, "full": 5, "every2": 3, "every4": 2, "selective": 0, "selective+every2": 0}


def test_embeddings_have_no_gradients_under_recomputing():
    model = bench.build(SHAPE, "SEAL-C", "cpu")
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    for name in ("full", "selective", "none"):
        with bench.applied(model, StepConfig.named(name)):
            gradients(model, bench.sample(96, 300, "cpu"))
    assert seen == [False] * 3


def test_names_of_settings():
    assert StepConfig.named("liger") == StepConfig.named("full+liger") == StepConfig(liger=True)
    assert StepConfig.named("selective+liger+every2") == StepConfig(selective=True, liger=True, every=2)
    assert StepConfig.named("none+liger") == StepConfig(recompute=False, liger=True)
    assert StepConfig.named("full+cudnn") == StepConfig(backend="cudnn")


def bench_rows(out, *options: str) -> list[dict]:
    bench.main(["--layers", "2", "--repeats", "2", "--device", "cpu", "--out", str(out), *options])
    return json.loads(out.read_text())["rows"]


def test_bench_runs_end_to_end(tmp_path, capsys):
    rows = bench_rows(tmp_path / "bench.json", "--tokens", "64,96")
    assert [(row["tokens"], row["method"]) for row in rows] == [
        (tokens, method) for tokens in (64, 96) for method in bench.METHODS
    ]
    assert all(row["seconds"] > 0 and 0 < row["share"] < 1 and len(row["steps"]) == 2 for row in rows)
    assert "matrix products" in capsys.readouterr().out


def test_bench_keeps_the_rows_it_has(tmp_path, capsys):
    out, one = tmp_path / "bench.json", ["--methods", "SEAL-C", "--tokens", "64"]
    first = bench_rows(out, *one, "--settings", "full,selective")
    assert [row["setting"] for row in first] == ["full", "selective"]
    assert {"device", "torch", "date", "rate", "tflop_per_second", "peak_gib"} < set(first[0])
    assert first[0]["attention"] == "FlashAttentionForCpu"
    more = bench_rows(out, *one, "--settings", "full,selective,every2", "--warmup", "48")
    assert more[:2] == first and [row["setting"] for row in more[2:]] == ["every2"]
    with pytest.raises(SystemExit, match="nothing was measured"):
        bench_rows(tmp_path / "late.json", *one, "--settings", "full", "--minutes", "0")
    assert bench_rows(out, *one, "--settings", "every2,none", "--minutes", "0") == more
    assert "none, 64 tokens: skipped" in capsys.readouterr().err


SHORT_OF_MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from axolotl_plugins.seal import SealConfig
from recipes import bench
bench.main(["--device", "cpu", "--methods", "SEAL-C", "--tokens", "64", "--settings", "full", "--out", sys.argv[1]])
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 1000 * 2**20,) * 2)
bench.main(["--device", "cpu", "--methods", "SEAL-C", "--tokens", "8192", "--settings", "none,full", "--repeats", "1",
            "--warmup", "64", "--out", sys.argv[1]])
"""


@pytest.mark.slow
def test_bench_goes_on_when_memory_runs_out(tmp_path):
    """At 8,192 tokens a step takes 1,934 MiB beside the model, or 487 where it recomputes."""
    out = tmp_path / "bench.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, out], cwd=ROOT, env=environment, check=True)
    none, full = json.loads(out.read_text())["rows"][1:]
    assert none["error"] == "out of memory" and full["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "huge"], "shape: found 'huge'"),
        (["--tokens", "30"], "expected more than the answer's 40"),
        (["--settings", "full,half"], "settings: found 'half', expected full, none"),
        (["--settings", "none+selective"], "the parts of 'none.selective' exclude each other"),
        (["--settings", "none+offload"], "the parts of 'none.offload' exclude each other"),
        (["--settings", "offload_all"], "offload_all stores attention outputs: add .selective"),
        (["--settings", "selective+liger+every2"], "liger needs a GPU"),
        (["--settings", "full+cudnn"], "cudnn needs a GPU"),
    ],
)
def test_bench_refuses(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    with pytest.raises(SystemExit, match=message):
        bench.main([*options, "--device", "cpu", "--out", str(tmp_path / "x.json")])
    assert not list(tmp_path.iterdir())


def test_bench_says_that_liger_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(SystemExit, match="settings: liger: liger_kernel is not installed"):
        bench.main(["--settings", "full,liger", "--device", "cpu", "--out", str(tmp_path / "x.json")])
