"""Prompts that begin alike: the same answers as one by one, with less to compute."""

from __future__ import annotations

import random
import time

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from paths import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_plugins.seal.load import Loaded, load
from data_gen import line
from data_gen.generate import Request, generate
from eval.prefix import answer, can_crop, common, new_tokens, saving
from eval.run import harness_for


def grid(tokenizer, lengths=("400", "600", "800")):
    """5 depths x 3 lengths in one haystack."""
    prompts = []
    for tokens in lengths:
        for sample in list(generate(Request("niah", tokens, samples=10, split="test"), tokenizer))[::2]:
            prompts.append(
                tokenizer.apply_chat_template(sample["messages"][:1], add_generation_prompt=True, return_dict=False)
            )
    return prompts


def plain(model, prompts, count, stop):
    """Greedy decoding without any cache."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == stop:
                break
            ids.append(token)
        answers.append(ids[len(prompt) :])
    return answers


def test_answers_are_those_of_one_prompt_at_a_time():
    loaded = load(TINY)
    prompts = grid(loaded.tokenizer)[::2]
    stop = loaded.tokenizer.eos_token_id
    prompts.append(prompts[0])  # the same once more
    seen = []
    found = answer(loaded.model, prompts, 6, {stop}, lambda index, ids: seen.append(index))
    assert found == plain(loaded.model, prompts, 6, stop)
    assert sorted(seen) == list(range(len(prompts))) and len({tuple(ids) for ids in found}) > 1


def test_every_edge_of_the_prefix_tree_is_computed_once():
    assert new_tokens([[1, 2, 3], [1, 2, 4], [1, 5]]) == 3 + 1 + 1
    assert new_tokens([[1, 2], [1, 2]]) == 2 + 1  # the last token's logits are needed again
    assert new_tokens([[1, 2, 3, 4], [1, 2]]) == 2 + 2
    assert common([1, 2, 3], [1, 2]) == 2 and common([], [1]) == 0
    loaded = load(TINY)
    counted = []
    forward = loaded.model.forward

    def count(*args, input_ids=None, **kwargs):
        counted.append(input_ids.shape[1])
        return forward(*args, input_ids=input_ids, **kwargs)

    loaded.model.forward = count
    prompts = grid(loaded.tokenizer)
    answer(loaded.model, prompts, 1, set())
    assert sum(counted) == new_tokens(prompts)
    # Depths 0, 22, 44, 67 and 89 per cent at three lengths in one haystack.
    assert saving(prompts) > 1.4


def test_models_that_forget_are_left_to_the_plain_path():
    from transformers import MistralConfig, MistralForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 64}  # fmt: skip
    assert not can_crop(MistralForCausalLM(MistralConfig(sliding_window=8, **small)))
    assert can_crop(MistralForCausalLM(MistralConfig(sliding_window=None, **small)))


def test_answers_end_where_they_are_told_to(monkeypatch):
    """At a text that ends an answer, which goes, as in lm-eval's own path; here at whatever the model says second."""
    loaded = load(TINY)
    texts = ["<s><|user|>A B C D E F", "<s><|user|>A B C D E G"]
    texts = [instance(text, {"max_gen_toks": 6, "until": [], "do_sample": False}) for text in texts]
    whole = harness_for(loaded, 1, None).generate_until(texts)
    second = whole[0][len(whole[0]) // 2]
    ends = {"max_gen_toks": 6, "until": [second], "do_sample": False}
    cut = [instance(text.args[0], ends) for text in texts]
    shared = harness_for(loaded, 1, None).generate_until(cut)
    monkeypatch.setattr("eval.run.WORTHWHILE", 1e9)
    assert shared == harness_for(loaded, 1, None).generate_until(cut)
    assert shared == [text.split(second)[0] for text in whole] and shared != whole


def rope_model(tokenizer, **rope) -> Loaded:
    """A random model whose answers depend on what is asked, with a window of 256 tokens and some RoPE."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=2, initializer_range=0.2, max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    return Loaded("random", LlamaForCausalLM(config).eval(), tokenizer, "random", "base", 256)


def test_prompts_on_either_side_of_a_longrope_window_share_nothing():
    """LongRoPE turns the keys of a long prompt otherwise than those of a short one that begins alike."""
    loaded = rope_model(
        load(TINY).tokenizer, rope_type="longrope", original_max_position_embeddings=64, factor=4.0,
        short_factor=[1.0] * 16, long_factor=[4.0] * 16,
    )  # fmt: skip
    assert loaded.short_window == 64
    words, _ = line.words()
    texts = ["<s><|user|> " + " ".join(words[:count]) for count in (30, 32, 34, 90, 92, 94)]
    harness = harness_for(loaded, 1, None)
    prompts = [harness.tok_encode(text) for text in texts]
    assert max(map(len, prompts[:3])) + 8 <= 64 < min(map(len, prompts[3:])) and saving(prompts) > 2
    found = harness.generate_until([instance(text, {"max_gen_toks": 8, "until": [], "do_sample": False})
                                    for text in texts], disable_tqdm=True)  # fmt: skip
    alone = plain(loaded.model, prompts, 8, 2)
    assert found == [harness.tok_decode(ids) for ids in alone]
    assert answer(loaded.model, prompts, 8, {2}) != alone  # what sharing them all would give
    across = instance(texts[0], {"max_gen_toks": 60, "until": [], "do_sample": False})
    with pytest.raises(ValueError, match=r"both sides of 64 tokens.*at most 4, or at least 124"):
        harness.generate_until([across])


def test_frequencies_that_depend_on_the_texts_before_are_refused():
    loaded = rope_model(load(TINY).tokenizer, rope_type="dynamic", factor=4.0)
    with pytest.raises(ValueError, match="depend on their order: give it fixed ones"):
        loaded.check_room(10, 10)
    assert rope_model(load(TINY).tokenizer, rope_type="default").short_window is None


def instance(text: str, settings: dict) -> Instance:
    return Instance("generate_until", {}, (text, settings), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "least"), [("5 depths x 3 lengths of needles", 1.4), ("ten questions on one record", 4.0)]
)
def test_sharing_pays(what, least, tmp_path):
    """Against lm-eval's plain path, in one run, on a random model in which, as at 7B, prompts are what costs."""
    tokenizer = load(TINY).tokenizer
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192, eos_token_id=2, **shape)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)  # so that answers depend on what is asked
    loaded = Loaded("random", model, tokenizer, "random", "base", 8192)
    if what.startswith("ten"):
        lines = line.Record(random.Random(0)).first(180)
        chats = [[{"role": "user", "content": line.render(lines, 18 * place)["prompt"]}] for place in range(10)]
    else:
        rows = (generate(Request("niah", n, samples=10, split="test"), tokenizer) for n in ("1000", "1500", "2000"))
        chats = [sample["messages"][:1] for row in rows for sample in list(row)[::2]]
    harness = harness_for(loaded, 1, tmp_path / "journal")
    settings = {"max_gen_toks": 8, "until": [], "do_sample": False}
    requests = [instance(harness.apply_chat_template(chat), settings) for chat in chats]
    seconds, answers = {}, {}
    plain = HFLM(pretrained=loaded.model, tokenizer=tokenizer, max_length=8192, batch_size=1, add_bos_token=False)
    for name, one in (("shared", harness), ("plain", plain)):
        start = time.perf_counter()
        answers[name] = one.generate_until(requests, disable_tqdm=True)
        seconds[name] = time.perf_counter() - start
    most = saving([harness.tok_encode(request.args[0]) for request in requests])
    print(f"{what}: {seconds['plain']:.1f} s plain, {seconds['shared']:.1f} s shared; tokens allow {most:.2f} times")
    assert answers["shared"] == answers["plain"] and len(set(answers["plain"])) > 1
    assert seconds["plain"] / seconds["shared"] >= least, seconds
