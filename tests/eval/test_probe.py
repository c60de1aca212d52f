"""Probes: exact where they claim to be, and equal to their definitions."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from miniatures import MINIATURES, build, token_ids
from paths import ROOT, TINY
from peft import get_peft_model
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.pytorch_utils import Conv1D

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.scales import saved_scales
from data_gen.dataset import samples_by_length
from data_gen.tasks import TASKS
from eval.generation import generate_answers
from eval.probe import head_importance
from eval.probe.ablation import HeadAblator
from eval.probe.captions import CAPTION
from eval.probe.head_importance import MapRun
from eval.probe.hooks import decoder_blocks, scaled_input, wrap
from eval.probe.logit_attribution import decompose, effects
from eval.probe.probe_plots import DRAW
from eval.probe.quadrants import quadrant_scales, save_scales
from eval.probe.sweep import (
    controls,
    load_untuned,
    read_recipe,
    reset_scales,
    seal_layers,
    shuffle_heads,
    sweep,
    training_data,
    wrong_answers,
    wrong_facts,
)
from eval.probe.transfer import transferability
from eval.report import write_report
from eval.resume import fingerprint
from eval.score_by_length import score_by_length
from eval.score_samples import prompt_ids

STOP = 5  # a token that random models write now and then


def naive(model, prompt, budget, stop):
    """Greedy decoding without a cache."""
    ids = list(prompt)
    for _ in range(budget):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MINIATURES)
def test_a_removed_head_is_a_zero_scale_is_removed_columns(name):
    model = wrap(build(name))
    ids = token_ids()
    for block in decoder_blocks(model):
        head = block.heads - 1
        with torch.no_grad():
            plain = model(ids).logits
            with scaled_input(block.projection, block.without_head(head)):
                probed = model(ids).logits
            scale = block.projection.seal_scale["default"]
            scale[head] = 0
            scaled = model(ids).logits
            scale[head] = 1
            base = block.projection.get_base_layer()
            weight = base.weight.data.clone()
            size = block.channels // block.heads
            columns = slice(head * size, (head + 1) * size)
            (base.weight.data.T if isinstance(base, Conv1D) else base.weight.data)[:, columns] = 0
            cut = model(ids).logits
            base.weight.data = weight
        assert (probed - plain).abs().max() > 1e-3
        torch.testing.assert_close(probed, scaled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(probed, cut, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize("reference", [0, 4])
def test_reused_hidden_states_give_the_answers_of_full_runs(name, reference):
    """Reference answers that the model generates in part, or not at all, do not change its answers."""
    model = wrap(build(name))
    seen = set()
    for seed in range(3):
        prompt = token_ids(1, 20, seed)[0].tolist()
        draft = [*naive(model, prompt, 8, STOP)[:reference], STOP] if reference else []
        ablator = HeadAblator(model, {STOP}, 8, batch=3)
        trace = ablator.prefill(prompt, draft)
        assert trace.answer.ids == naive(model, prompt, 8, STOP)
        for layer, block in enumerate(decoder_blocks(model)):
            scales = torch.stack([block.without_head(head) for head in range(block.heads)])
            answers = ablator.ablate(trace, layer, scales)
            for scale, answer in zip(scales, answers, strict=True):
                with scaled_input(block.projection, scale):
                    assert answer.ids == naive(model, prompt, 8, STOP), (layer, seed)
                seen.add(tuple(answer.ids))
                if draft and ablator.drafts:
                    ids = torch.tensor([prompt + draft])
                    with scaled_input(block.projection, scale), torch.no_grad():
                        logits = model(ids).logits[0, len(prompt) - 1 : -1]
                    expected = -torch.nn.functional.cross_entropy(logits, torch.tensor(draft)).item()
                    assert answer.logprob == pytest.approx(expected, abs=1e-3)
    assert len(seen) > 1


def test_probes_leave_the_model_as_it_was():
    model = wrap(build("llama_gqa"))
    before = model(token_ids()).logits
    ablator = HeadAblator(model, {STOP}, 4)
    trace = ablator.prefill(token_ids(1, 20)[0].tolist(), [STOP])
    ablator.ablate(trace, 1, decoder_blocks(model)[1].without_head(0)[None])
    assert torch.equal(model(token_ids()).logits, before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_model_spread_over_devices_gives_the_same_map():
    """Accelerate replaces the forward methods of its modules, which probes must leave in place."""
    plain = head_importance.ablation_map(MapRun(load(TINY), "line", [200], samples=1))
    loaded = load(TINY)
    model = dispatch_model(loaded.model, {"": "cpu"}, force_hooks=True)
    forwards = {
        name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__
    }
    spread = head_importance.ablation_map(MapRun(replace(loaded, model=model), "line", [200], samples=1))
    assert spread["change"] == plain["change"]
    now = dict(model.named_modules())
    kept = [name for name, forward in forwards.items() if name in now and now[name].__dict__.get("forward") is forward]
    assert any("self_attn" in name for name in kept) and any(name.endswith("layers.0") for name in kept)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_models_are_loaded_onto_an_accelerator():
    loaded = load(TINY)
    assert loaded.model.device.type == torch.accelerator.current_accelerator().type
    assert load(TINY, on_cpu=True).model.device.type == "cpu"
    on_cpu = score_by_length(load(TINY, on_cpu=True), "line", lengths=[200], samples=4)
    assert score_by_length(loaded, "line", lengths=[200], samples=4).mean.score == on_cpu.mean.score


def test_an_adapter_stays_applied_and_partial_ones_are_refused():
    model = get_peft_model(build("llama_mha"), SealConfig(granularity="channel"))
    with torch.no_grad():
        for layer in seal_layers(model):
            layer.seal_scale["default"].normal_(1, 0.3)
    prompt = token_ids(1, 20)[0].tolist()
    ablator = HeadAblator(wrap(model), {STOP}, 8)
    block = ablator.blocks[0]
    answer = ablator.ablate(ablator.prefill(prompt, []), 0, block.without_head(1)[None])[0]
    with scaled_input(block.projection, block.without_head(1)):
        assert answer.ids == naive(model, prompt, 8, STOP)
    partial = get_peft_model(build("llama_mha"), SealConfig(granularity="head", layers=[1]))
    with pytest.raises(ValueError, match="every decoder layer"):
        decoder_blocks(partial)


@pytest.mark.slow
def test_reuse_is_faster_than_full_runs_by_almost_what_the_arithmetic_allows():
    """12 layers: every head by a full run with a cache, against reuse, in one run, with the same answers."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=640, num_hidden_layers=12,
                         num_attention_heads=4, max_position_embeddings=2048, eos_token_id=2)  # fmt: skip
    model = wrap(LlamaForCausalLM(config).eval())
    prompt = torch.randint(3, 512, (1500,)).tolist()
    blocks = decoder_blocks(model)

    def reuse():
        ablator = HeadAblator(model, {2}, 4, batch=1)
        trace = ablator.prefill(prompt, [])
        return [
            ablator.ablate(trace, layer, torch.stack([block.without_head(h) for h in range(4)]))
            for layer, block in enumerate(blocks)
        ]

    @torch.inference_mode()
    def full():
        answers = []
        for block in blocks:
            for head in range(4):
                with scaled_input(block.projection, block.without_head(head)):
                    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
                answers.append(out[0, len(prompt) :].tolist())
        return answers

    seconds = []
    for method in (reuse, full):
        start = time.perf_counter()
        answers = method()
        seconds.append(time.perf_counter() - start)
        if method is reuse:
            reused = [answer.ids for layer in answers for answer in layer]
    assert reused == [ids[: ids.index(2)] if 2 in ids else ids for ids in answers]
    assert seconds[1] / seconds[0] >= 1.8, seconds


@pytest.mark.parametrize("name", MINIATURES)
def test_direct_effects_add_up_to_the_logits(name):
    model = wrap(build(name))
    ids, tokens = token_ids(1), [3, 17, 60]
    folded = effects(model, decompose(model, ids), tokens, normalised=True)
    total = np.array(folded["embedding"]) + np.array(folded["heads"]).sum((1, 2)) + np.array(folded["mlps"]).sum(1)
    logits = np.array(folded["logits"])
    np.testing.assert_allclose(total + folded["bias"], logits, atol=1e-4 * max(1, abs(logits).max()))
    # Without the norm, as in the paper: the head's output times the unembedding, nothing else.
    plain = effects(model, decompose(model, ids), tokens, normalised=False)
    block = decoder_blocks(model)[0]
    read = []
    handle = block.projection.register_forward_pre_hook(lambda module, args: read.append(args[0][0, -1]))
    with torch.no_grad():
        model(ids)
        handle.remove()
        base = block.projection.get_base_layer()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        size = block.channels // block.heads
        by_hand = model.get_output_embeddings().weight[tokens] @ (weight[:, :size] @ read[0][:size])
    np.testing.assert_allclose(np.array(plain["heads"])[:, 0, 0], by_hand.numpy(), atol=1e-4)


def test_direct_effects_are_refused_where_layers_add_other_things():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
    with pytest.raises(ValueError, match="something else than its attention and its MLP"):
        decompose(wrap(Gemma2ForCausalLM(config).eval()), token_ids(1))


def test_a_matrix_has_a_dash_where_the_transferability_is_not_defined():
    result = {
        "kind": "transfer",
        "model": "m",
        "samples": 2,
        "transferability": {"line": {"line": 2.0, "niah": None}, "niah": {"line": None, "niah": None}},
    }
    texts = [text.get_text() for text in DRAW["transfer"](result).axes[0].texts]
    assert texts == ["2.00", "–", "–", "–"]
    assert "line +2.00." in CAPTION["transfer"](result)


def test_transferability_is_equation_2():
    base = {1000: 0.9, 2000: 0.6, 3000: 0.4}
    assert transferability(base, {1000: 1.0, 2000: 0.9, 3000: 0.8}) == pytest.approx((0.1 + 0.3 + 0.4) / 0.5)
    assert transferability(base, base) == 0
    with pytest.raises(ValueError, match="at every length"):
        transferability({1: 0.5, 2: 0.5}, {1: 0.6, 2: 0.6})
    with pytest.raises(ValueError, match="score both at the same"):
        transferability(base, {1000: 1.0})


def test_gradient_is_the_slope_of_the_answers_log_probability():
    loaded = load(TINY)
    result = head_importance.gradient_map(MapRun(loaded, "line", [256], samples=2))
    prompt = head_importance.probe_prompts(loaded, TASKS["line"], [256], 1, head_importance.PROBE_SEED)[0]
    only = head_importance.gradient_map(MapRun(loaded, "line", [256], samples=1))
    block = decoder_blocks(loaded.model)[1]
    values = []
    for value in (0.99, 1.01):
        scale = torch.ones(block.heads, block.channels // block.heads)
        scale[2] = value
        ablator = HeadAblator(loaded.model, {loaded.tokenizer.eos_token_id}, 1)
        with scaled_input(block.projection, scale.flatten()):
            values.append(ablator.prefill(prompt.ids, prompt.reference).answer.logprob)
    slope = (values[1] - values[0]) / 0.02
    assert head_importance.changes(only, 256)[1, 2] == pytest.approx(-slope, rel=0.05, abs=1e-4)
    assert np.array(result["change"]["logprob"]["256"]).shape == (len(decoder_blocks(loaded.model)), block.heads)
    slopes = head_importance.changes(only, 256, "logprob")
    assert head_importance.changes(only, 256, "importance") == pytest.approx(-np.abs(slopes))  # of a single prompt
    spearman = head_importance.agreement(only, only)
    assert spearman["logprob"]["logprob"]["256"] == spearman["importance"]["importance"]["256"] == pytest.approx(1)
    assert spearman["importance"]["logprob"]["256"] == pytest.approx(
        spearmanr(-np.abs(slopes).ravel(), slopes.ravel()).statistic
    )


def test_path_integrals_of_one_head_at_a_time_are_the_exact_map():
    """By the fundamental theorem of calculus; L0H1, whose effect is steep near a scale of 0, needs more points."""
    loaded = load(TINY)
    probe = MapRun(loaded, "line", [200], samples=1)
    exact = head_importance.changes(head_importance.ablation_map(probe, score=False), 200)
    points = tuple((i + 0.5) / 16 for i in range(16))
    integrated, first = (
        head_importance.changes(head_importance.gradient_map(MapRun(loaded, "line", [200], samples=1), **options), 200)
        for options in ({"points": points, "groups": exact.size}, {})
    )
    error = np.abs(integrated - exact)
    assert np.delete(error, 1).max() < 0.02 * np.abs(exact).max()
    assert np.abs(first - exact)[1, 2] > 0.5 * np.abs(exact).max()
    with pytest.raises(ValueError, match=f"groups: found 99, expected at most {exact.size}"):
        head_importance.gradient_map(MapRun(loaded, "line", [200], samples=1), groups=99)


def test_probes_answer_the_prompts_that_are_scored():
    """With the answer's prefix in the prompt, and responses truncated at the task's stop texts."""
    loaded = load(TINY)
    (row,) = samples_by_length(TASKS["vt"], loaded.tokenizer, [900], 1, seed=head_importance.PROBE_SEED)
    prompt = head_importance.probe_prompts(loaded, TASKS["vt"], [900], 1, head_importance.PROBE_SEED)[0]
    assert prompt.ids == prompt_ids(loaded.tokenizer, row)
    text = loaded.tokenizer.decode(prompt.reference, skip_special_tokens=True)
    assert row["answer"] == f"{row['prefix']} {text.strip()}" and row["prefix"]
    task = replace(TASKS["line"], stop=("The",))
    stopped = head_importance.ablation_map(MapRun(loaded, task, [200], samples=2))
    assert set(stopped["base"]["score"].values()) == {0.0}
    assert score_by_length(loaded, task, lengths=[200], samples=2).scores[0].score == 0


@pytest.mark.parametrize("stop", [{STOP}, set()])
def test_ablated_answers_are_no_longer_than_the_budget(stop):
    loaded = load(TINY)
    prompt = head_importance.probe_prompts(loaded, TASKS["line"], [200], 1, head_importance.PROBE_SEED)[0]
    model = wrap(loaded.model)
    ablator = HeadAblator(model, stop, 4)
    trace = ablator.prefill(prompt.ids, prompt.reference)
    for layer, block in enumerate(decoder_blocks(model)):
        scales = torch.stack([block.without_head(head) for head in range(block.heads)])
        for answer, scale in zip(ablator.ablate(trace, layer, scales), scales, strict=True):
            with scaled_input(block.projection, scale):
                assert [answer.ids] == generate_answers(model, [prompt.ids], max_new_tokens=4, stop=stop)


def test_maps_without_scores_have_the_same_log_probabilities():
    loaded = load(TINY)
    scored = head_importance.ablation_map(MapRun(loaded, "line", [200], samples=1))
    plain = head_importance.ablation_map(MapRun(loaded, "line", [200], samples=1), score=False)
    assert plain["change"] == {"logprob": scored["change"]["logprob"]} and plain["base"].keys() == {"logprob"}
    assert np.abs(head_importance.changes(plain, 200)).max() > 0
    assert f"{plain['base']['logprob']['200']:.2f} at 200" in CAPTION["ablation"](plain)
    with pytest.raises(ValueError, match="sliding window decodes"):
        HeadAblator(wrap(build("mistral")), {STOP}, 0)


def test_channels_of_a_sliding_window_model_are_shown_by_their_score():
    """It decodes its answers, so that no reference is prefilled whose log-probability would be known."""
    loaded = load(TINY)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=len(loaded.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
    ))  # fmt: skip
    loaded = replace(loaded, model=model)
    assert not HeadAblator(wrap(model), {STOP}, 4).drafts
    result = head_importance.ablation_map(MapRun(loaded, "line", [200], samples=1), heads=[(0, 0)])
    assert result["change"].keys() == result["base"].keys() == {"score"}
    assert "Score: in L0H0" in CAPTION["ablation"](result) and "nan" not in CAPTION["ablation"](result)
    assert DRAW["ablation"](result).axes[0].get_ylabel() == "score"


def test_maps_are_compared_with_exact_ones_of_the_same_samples():
    exact = {"kind": "ablation", "task": "line", "lengths": [256, 512], "samples": 8}
    head_importance.check_comparable(exact, TASKS["line"], [256, 512], 8)
    for other, message in [
        ({"kind": "gradient"}, "map of gradients"), ({"task": "vt"}, "task: found vt"),
        ({"lengths": [256]}, "lengths: found .256."), ({"samples": 50}, "samples: found 50"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            head_importance.check_comparable(exact | other, TASKS["line"], [256, 512], 8)
    equal = {"unit": "head", "lengths": [1, 2], "change": {"score": {"1": [[0, 0]], "2": [[1, 2]]}}}
    assert head_importance.agreement(equal, equal) == {"score": {"score": {"2": pytest.approx(1)}}}


def test_ablation_map_goes_on_where_it_was_and_quadrants_make_an_adapter(tmp_path):
    loaded, journal = load(TINY), tmp_path / "j"
    complete = head_importance.ablation_map(MapRun(loaded, "line", [200, 256], samples=2, journal=journal))
    rows = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(rows[: len(rows) // 2]) + rows[len(rows) // 2][:9])
    again = head_importance.ablation_map(MapRun(loaded, "line", [200, 256], samples=2, journal=journal))
    assert complete["change"] == again["change"] and complete["base"] == again["base"]
    assert again["seconds"] > 0.5 * complete["seconds"]  # includes the interrupted run
    timed = lambda row: '"seconds"' in row  # noqa: E731
    resumed = journal.read_text().splitlines(keepends=True)
    assert [row for row in resumed if not timed(row)] == [row for row in rows if not timed(row)]
    # No head helps on samples this easy, but some hurt.
    where = head_importance.head_quadrants(complete)
    assert (where == 3).any() and np.abs(head_importance.changes(complete, 256)).max() > 0.4
    scales = quadrant_scales(complete, "Q3 up", 0.9, 1.1)
    assert set(np.unique(scales)) == {1.0, 1.1} and (scales == 1.1).sum() == (where == 3).sum()
    save_scales(load(TINY), scales, tmp_path / "adapter")
    np.testing.assert_allclose(saved_scales(tmp_path / "adapter")[..., 0], scales, rtol=1e-6)
    tuned = load(tmp_path / "adapter")
    assert tuned.method == "SEAL-H"
    ids = torch.tensor([[5, 300, 301, 302]])
    assert not torch.allclose(tuned.model(ids).logits, load(TINY).model(ids).logits)
    with pytest.raises(ValueError, match="exists already"):
        save_scales(load(TINY), scales, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is a SEAL-H adapter, whose scales would be replaced: name the base model"):
        save_scales(tuned, scales, tmp_path / "other")
    if not (where == 1).any():
        with pytest.raises(ValueError, match="no head lies in quadrant 1"):
            quadrant_scales(complete, "Q1 down", 0.9, 1.1)


def test_quadrants_are_the_papers():
    short = [[0.1, -0.1, -0.1], [0.1, 0.0, 0.2]]
    long = [[0.2, 0.2, -0.3], [-0.1, 0.5, 0.1]]
    head_map = {"unit": "head", "lengths": [1, 2], "change": {"score": {"1": short, "2": long}}}
    assert head_importance.head_quadrants(head_map).tolist() == [[1, 2, 3], [4, 0, 1]]
    assert quadrant_scales(head_map, "Q1 down, Q3 up", 0.9, 1.1).tolist() == [[0.9, 1.0, 1.1], [1.0, 1.0, 0.9]]
    controls = [quadrant_scales(head_map, "Q1 down, Q3 up", 0.9, 1.1, seed).ravel().tolist() for seed in (0, 0, 1, 2)]
    assert controls[0] == controls[1] and len({*map(tuple, controls)}) > 1
    assert {tuple(sorted(scales)) for scales in controls} == {(0.9, 0.9, 1.0, 1.0, 1.0, 1.1)}


RECIPE = """
base_model: {tiny}
adapter: seal
seal: {{granularity: head, data: {{task: line, tokens: 200, samples: 4, seed: 0}}}}
learning_rate: 0.02
num_epochs: 1
seed: 1
"""


def test_sweep_and_controls_tune_for_real_and_resume(tmp_path, monkeypatch):
    file = tmp_path / "r.yml"
    file.write_text(RECIPE.format(tiny=TINY))
    recipe = read_recipe(file)
    settings = {"rates": [1e-2, 0.5], "samples": [2, 4], "epochs": [1], "seeds": [1], "lengths": [200], "validation": 3}
    result = sweep(recipe, **settings, journal=tmp_path / "s")
    assert len(result["cells"]) == 4 and result["best"]["mean"] == max(cell["mean"] for cell in result["cells"])
    # A rate of 0.5 breaks the scales, so not all cells can be equal.
    assert len({cell["mean"] for cell in result["cells"]}) > 1
    monkeypatch.setattr("eval.probe.sweep.tune", lambda *a, **k: pytest.fail("tuned again"))
    assert sweep(recipe, **settings, journal=tmp_path / "s") == result
    monkeypatch.undo()
    options = {"lengths": [200], "samples": 3, "seed": head_importance.PROBE_SEED, "split": "train"}
    assert result["base"] == {"200": score_by_length(load(TINY), "line", **options).mean.score}
    assert all(0.9 < cell["scales"][0] <= 1 <= cell["scales"][1] < 1.1 and not cell["unsound"]
               for cell in result["cells"] if cell["rate"] == 1e-2)  # fmt: skip
    assert all(cell["scales"][0] < 0.9 for cell in result["cells"] if cell["rate"] == 0.5)
    shown = controls(recipe, seeds=[1], lengths=[200], validation=2)
    assert {name: len(runs) for name, runs in shown["scores"].items()} == {
        "base": 1, "tuned": 1, "shuffled": 1, "wrong facts": 1, "wrong answers": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="not a recipe"):
        read_recipe(ROOT / "recipes/matrix.yml")


def test_sweep_loads_the_model_as_the_recipe_trains_it(tmp_path):
    """Its samples must be rendered with the recipe's template and its arguments."""
    template = "{% for m in messages %}{{ tone if m.role == 'user' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    file = tmp_path / "r.yml"
    file.write_text(
        RECIPE.format(tiny=TINY) + f"chat_template_jinja: {tmp_path}/t.jinja\nchat_template_kwargs: {{tone: calm}}\n"
    )
    loaded = load_untuned(read_recipe(file) | {"dtype": "bfloat16"})
    chat = [{"role": "user", "content": "q"}]
    assert loaded.tokenizer.apply_chat_template(chat, tokenize=False) == "calmq</s>"
    assert loaded.dtype == "bfloat16"


def test_controls_change_what_they_say(tmp_path):
    file = tmp_path / "r.yml"
    file.write_text(RECIPE.format(tiny=TINY))
    loaded = load_untuned(read_recipe(file))
    with torch.no_grad():
        for place, layer in enumerate(seal_layers(loaded.model)):
            layer.seal_scale["default"].copy_(torch.arange(4) + 10.0 * place)
    before = torch.cat([layer.seal_scale["default"] for layer in seal_layers(loaded.model)])
    shuffle_heads(loaded.model, random.Random(0))
    after = torch.cat([layer.seal_scale["default"] for layer in seal_layers(loaded.model)])
    assert not torch.equal(before, after) and torch.equal(before.sort().values, after.sort().values)
    reset_scales(loaded.model)
    assert all(bool((layer.seal_scale["default"] == 1).all()) for layer in seal_layers(loaded.model))
    chats = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": f"is {n}."}] for n in (11, 22, 33)]
    chats[0][1]["content"] = "was 11."
    facts = wrong_facts(chats, ["11", "22", "33"], random.Random(0))
    answers = wrong_answers(chats, random.Random(0))
    for mixed in (facts, answers):
        assert all(a[1] != b[1] and a[0] == b[0] for a, b in zip(chats, mixed, strict=True))
    assert facts[0][1]["content"] in ("was 22.", "was 33.") and answers[0][1] in (chats[1][1], chats[2][1])
    with pytest.raises(ValueError, match=r"answer 'was 11\.' does not contain its first reference, 'eleven'"):
        wrong_facts(chats, ["eleven", "22", "33"], random.Random(0))


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "eval", "probe", *arguments], cwd=cwd, capture_output=True, text=True, timeout=600
    )


def test_commands_write_results_with_pictures(tmp_path):
    tiny, short = ("--model", str(TINY)), ("--lengths", "200")
    folder = tmp_path / "probes"
    folder.mkdir()
    for arguments in (
        ("heads", *tiny, "--lengths", "200,256", "--samples", "2", "--out", "h.json"),
        ("gradient", *tiny, "--lengths", "200,256", "--samples", "2", "--compare", "h.json", "--out", "g.json"),
        ("channels", *tiny, "--heads", "L0H0", *short, "--samples", "1", "--dtype", "bfloat16", "--out", "c.json"),
        ("quadrants", *tiny, "--from", "h.json", *short, "--samples", "2", "--out", "q.json"),
        ("inspect", "--adapter", "Q3 up", "--map", "h.json", "--out", "i.json"),
        ("quadrants", *tiny, "--from", "h.json", "--up", "1.9", "--random", "2", *short, "--samples", "2", "--out",
         "u.json"),
    ):  # fmt: skip
        if "Q3 up" in arguments:
            made = json.loads((folder / "q.json").read_text())["adapters"]
            arguments = [made.get(part, part) for part in arguments]
        done = command(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        out = folder / arguments[-1]
        assert json.loads(out.read_text())["kind"] and out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert not list(folder.glob(".*.partial")), arguments
    assert set(json.loads((folder / "g.json").read_text())["spearman"]["importance"]["score"]) == {"200", "256"}
    controlled = json.loads((folder / "u.json").read_text())
    assert {"random 0", "random 1"} <= controlled["scores"].keys() & controlled["adapters"].keys()
    raised = json.loads((folder / "i.json").read_text())["spearman"]  # the heads that hurt when ablated
    assert set(raised) == {"200", "256"} and max(raised.values()) < 0
    channels = json.loads((folder / "c.json").read_text())
    assert len(channels["change"]["score"]["200"]["L0H0"]) == 32
    assert channels["dtype"] == "bfloat16" and "--heads L0H0" in channels["command"] and channels["machine"]
    assert write_report(tmp_path, tmp_path / "report.html") == 6  # captions and pictures know every kind of result


def test_the_caption_of_random_heads_states_mean_and_range():
    scores = {"base": {"256": 0.1}, "random 0": {"256": 0.2}, "random 1": {"256": 0.4}}
    result = {"model": "m", "task": "line", "samples": 5, "down": 0.9, "up": 1.1, "scores": scores}
    caption = CAPTION["quadrants"](result)
    assert "random heads, mean and range of 2 draws: 0.30 (0.20-0.40) at 256" in caption and "random 0" not in caption


def test_the_journal_of_a_run_is_that_of_its_model(tmp_path):
    """A second run over other weights must not reuse the first one's answers."""
    from eval.resume import journal_file

    first, second = tmp_path / "a", tmp_path / "b"
    for folder, text in ((first, "1"), (second, "22")):
        folder.mkdir()
        (folder / "model.safetensors").write_text(text)
    out, before = tmp_path / "r.json", journal_file(tmp_path / "r.json", str(first))
    (first / "config.json").write_text("{}")  # as where only the config changes RoPE
    assert journal_file(out, str(first)) != before
    assert journal_file(out, str(first)) != journal_file(out, str(second)) != journal_file(out, str(second), "other")


def test_a_result_is_that_of_every_file_it_depends_on(tmp_path):
    """Of an adapter's base, the tokenizer and its template, code, and files that options name; not of a model card."""
    base, adapter, cases = tmp_path / "base", tmp_path / "adapter", tmp_path / "cases"
    for folder in (base, adapter, cases):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    template = tmp_path / "t.jinja"
    files = [base / "model.safetensors", base / "modeling_own.py", adapter / "chat_template.jinja",
             adapter / "adapter_model.safetensors", cases / "20_lines.jsonl", template]  # fmt: skip
    for file in files:
        file.write_text("1")
    state = lambda: fingerprint(str(adapter), {"cases": str(cases)}, ("hf", {"chat_template": str(template)}))  # noqa: E731
    before = state()
    (adapter / "README.md").write_text("card")
    assert state() == before
    for file in files:
        file.write_text("22")
        assert state() != before, file
        before = state()


def test_samples_that_a_mixture_cannot_share_are_refused(tmp_path):
    file = tmp_path / "r.yml"
    file.write_text(RECIPE.format(tiny=TINY))
    recipe = read_recipe(file)
    recipe = recipe | {"requests": [replace(recipe["requests"][0], samples=2)] * 2}
    with pytest.raises(ValueError, match="samples: 3 cannot be shared in the recipe's proportions of 2 tasks"):
        training_data(recipe, load(TINY).tokenizer, 3, 0)
    assert len(training_data(recipe, load(TINY).tokenizer, 2, 0)[0]) == 2


@pytest.mark.slow
def test_transfer_scores_adapters_on_tasks(tmp_path):
    scales = np.ones((3, 4))
    scales[0] = 0.3
    save_scales(load(TINY), scales, tmp_path / "adapter")
    base = score_by_length(load(TINY), "line", lengths=[256, 1960], samples=10)
    assert base.scores[0].score != base.scores[1].score
    done = command("transfer", "--model", str(TINY), "--adapter", "line=adapter", "--tasks", "line", "--lengths",
                   "256,1960", "--samples", "10", "--out", "t.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "t.json").read_text())["transferability"]["line"]["line"] < 0
