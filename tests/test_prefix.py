"""Prompts that begin alike: the same answers as one by one, with less to compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from axolotl_plugins.seal.load import load
from data_gen.generate import Request, generate
from eval.prefix import answer, can_crop, common, new_tokens, saving

TINY = Path(__file__).parent.parent / "recipes" / "tiny"


def grid(tokenizer, lengths=("500", "800", "1100")):
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


@pytest.mark.slow
def test_sharing_pays():
    """Against lm-eval's plain path, in one run: a needle grid and ten questions on one context."""
    import time

    from eval.run import Harness, run

    loaded = load(TINY)
    seconds = {}
    for name, factor in (("shared", 1.2), ("plain", 1e9)):
        import eval.run as module

        module.WORTHWHILE = factor
        start = time.perf_counter()
        result = run(loaded, "niah", lengths=[900, 1300, 1800], samples=10)
        seconds[name] = time.perf_counter() - start
        seconds[f"{name} answers"] = [row["response"] for row in result["responses"]]
    assert isinstance(Harness, type) and seconds["shared answers"] == seconds["plain answers"]
    assert seconds["plain"] / seconds["shared"] > 1.4, seconds
