"""Teach the small model needles and chains of variables: ``python -m recipes.tiny_tasks``.

The model of ``recipes/tiny`` is trained on within its short window, on its own lines, on needles in built-in prose and
on RULER's variable tracking, and its window is doubled as before. The needles are made of random words, two fifths of
them in the frame of the task's test needle ("The best thing to do in ... is ..."). The task's own sentences, those of
training and that of the test, are never among them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_gen import niah, ruler
from recipes.demo import BASE, TASKS_BASE
from recipes.tiny_model import (
    CARD_HEAD,
    LONG_FACTOR,
    ROPE_THETA,
    TRAINED_WINDOW,
    Records,
    Row,
    curriculum,
    descend,
    optimizer_of,
    padded,
    save,
)

Chat = tuple[list[int], list[float]]  # ids and loss weights
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids, weights and choices, see ``weighted_loss``

LINES = 32  # longest record
SENTENCES = 62  # longest haystack
NOISES = (5, 20)  # lines of noise around a chain; with the worked example that is most of the trained window
SHARES = {"line": 0.3, "niah": 0.3, "vt": 0.4}  # of batches
# Words that a sentence repeats: what follows one of these can only be told from its place.
SMALL_WORDS = ("a", "the", "in", "on", "of", "and", "to", "for", "with", "is", "at", "by")


class Draws:
    """Batches of every task, of about so many tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int) -> None:
        """Find the words that are tokens of their own."""
        self.tokenizer, self.tokens = tokenizer, tokens
        self.rng = random.Random(seed)
        self.records, self.stage = Records(tokenizer, seed), curriculum(LINES)[-1]
        blank = "\u0120"  # how a byte-level vocabulary writes a leading blank
        pieces = (piece[1:] for piece in tokenizer.get_vocab() if piece.startswith(blank))
        self.words = sorted(piece for piece in pieces if piece.isalpha() and len(piece) > 1)

    def batch(self, task: str) -> Batch:
        """Chats of one task, right-padded."""
        if task == "line":
            ids, weights = self.records.batch(self.stage, self.tokens)
            return ids, weights, self.records.choices(self.stage, ids)
        draw = {"niah": self.needles, "vt": self.chains}[task]()
        rows = [next(draw)]
        while sum(len(ids) for ids, _ in rows) < self.tokens:
            rows.append(next(draw))
        return *padded(rows), torch.arange(len(self.tokenizer))

    def row(self, prompt: str, said: str, learned: str) -> Chat:
        """One chat, with loss on what the assistant says after ``said``."""
        question = [{"role": "user", "content": prompt}]
        before = self.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        before = before + self.tokenizer(said, add_special_tokens=False)["input_ids"]
        answer = self.tokenizer(learned, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return before + answer, [0.0] * len(before) + [1.0] * len(answer)

    def phrase(self, shortest: int, longest: int) -> str:
        """Random words."""
        rng = self.rng
        count = rng.randint(shortest, longest)
        return " ".join(rng.choice(SMALL_WORDS if rng.random() < 0.35 else self.words) for _ in range(count))

    def needle(self) -> dict[str, str]:
        """A sentence and the question that it answers."""
        if self.rng.random() < 0.4:
            place, answer = self.phrase(1, 2), self.phrase(4, 14)
            return {
                "needle": f"The best thing to do in {place} is {answer}.",
                "question": f"What is the best thing to do in {place}?",
            }
        what, answer = self.phrase(2, 6), self.phrase(4, 14)
        return {"needle": f"The {what} is {answer}.", "question": f"What is the {what}?"}

    def longest(self, most: int) -> int:
        """How long the texts of a batch are: mostly at least half of the most."""
        rng = self.rng
        return rng.randint(most // 2, most) if rng.random() < 0.5 else rng.randint(2, most)

    def needles(self) -> Iterator[Chat]:
        """Needles in prose of one length, without end."""
        sentences = self.longest(SENTENCES)
        while True:
            pair = self.needle()
            context = niah.insert(niah.prose(self.rng, sentences).strip(), pair["needle"], self.rng.randint(0, 100))
            yield self.row(niah.PROMPT.format(context=context, question=pair["question"]), "", pair["needle"])

    def chains(self) -> Iterator[Chat]:
        """Chains of variables after a worked example, without end."""
        rng = self.rng
        noises = rng.randint(*NOISES)
        places = lambda count: sorted(rng.sample(range(count), ruler.HOPS + 1))  # noqa: E731
        while True:
            (value, names), (shown, others) = (
                (str(rng.randrange(10_000, 99_999)), ruler.draw_names(ruler.HOPS + 1, letters, rng))
                for letters in (5, 3)
            )
            text, prefix = ruler.vt_input(names, value, places(noises), noises)
            example = ruler.vt_example(others, shown, places(12), 12)
            yield self.row(f"{example}\n{text}", prefix.strip(), " " + " ".join(names))


def teach(model: LlamaForCausalLM, draws: Draws, *, steps: int, lr: float) -> None:
    """Train on all tasks by turns that ``SHARES`` weigh, in the second half of the steps with a falling rate."""
    rng, optimizer, start = random.Random(draws.rng.random()), optimizer_of(model), time.time()
    right: dict[str, float] = {}
    for step in range(steps):
        (task,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
        rate = lr * min(1.0, (step + 1) / 50, max(0.05, 2 * (steps - step) / steps))
        _, correct, _ = descend(model, optimizer, rate, *draws.batch(task))
        now = correct.float().mean().item()
        right[task] = 0.93 * right.get(task, now) + 0.07 * now
        if (step + 1) % 50 == 0:
            shares = ", ".join(f"{task} {share:.3f}" for task, share in sorted(right.items()))
            print(f"step {step + 1}, {time.time() - start:.0f} s: tokens right: {shares}", flush=True)


def model_card(base: Path, steps: int, rows: list[Row], samples: int) -> str:
    """The README of the model's folder."""
    table = "\n".join(f"| {task} | {tokens} | {plain:.2f} | {long:.2f} |" for task, tokens, plain, long in rows)
    return f"""{CARD_HEAD}

# A small model of three tasks

[recipes/{base.name}](../{base.name}/README.md), trained for {steps} further steps within its window of {TRAINED_WINDOW}
tokens: on its own lines, on needles of random words in built-in prose (two fifths of them in the test needle's frame,
"The best thing to do in ... is ..."; its own sentence is none of them), and on RULER's variable tracking
(`python -m recipes.tiny_tasks`, one core). Its window was then doubled in the config alone, as LongRoPE does it: beyond
{TRAINED_WINDOW} tokens RoPE frequencies are stretched as by NTK scaling with factor {LONG_FACTOR:g}.

Share of {samples} test samples of `data_gen` whose whole answer is the model's first choice throughout:

| task | tokens | frequencies as trained | as shipped |
|---|---:|---:|---:|
{table}
"""


def main(argv: list[str] | None = None) -> None:
    """Train, stretch, score and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=BASE, help="the model to begin with")
    parser.add_argument("--out", type=Path, default=TASKS_BASE, help="folder to write")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per batch")
    parser.add_argument("--samples", type=int, default=100, help="test samples per length for the model card")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums are formed in another order on more
    tokenizer, config = AutoTokenizer.from_pretrained(args.base), LlamaConfig.from_pretrained(args.base)
    config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    config.max_position_embeddings = TRAINED_WINDOW
    model = LlamaForCausalLM.from_pretrained(args.base, config=config)
    teach(model, Draws(tokenizer, args.seed, args.tokens), steps=args.steps, lr=args.lr)
    card = lambda rows: model_card(args.base, args.steps, rows, args.samples)  # noqa: E731
    save(model, tokenizer, args.out, card, args.samples, tuple(SHARES))


if __name__ == "__main__":
    main()
