"""Train the small base model from nothing: ``make tiny-model``, that is ``python -m recipes.tiny_model``.

A Llama that answers LongEval line questions inside the short window it was trained at, and whose window is then doubled
in its config alone, as LongRoPE does it (Ding et al. 2024, the way of Phi-3's long models):
RoPE frequencies as trained up to the old window, stretched ones beyond. It reads short records well and loses lines of
long ones, which is what SEAL repairs.

Retrieval does not appear by itself at this size. What brings it about is a curriculum: half of the first stage's
batches are random tokens followed by a rotation of themselves (which teaches "find the token after this one"), the
other half tiny records whose value stands directly behind its key. Then one thing at a time is widened whenever the
first digit of nine answers in ten is right.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_gen import line, niah, ruler
from data_gen.files import remove, written_whole
from data_gen.generate import Request, generate
from recipes.demo import LENGTHS, TASK_LENGTHS

# Words with at most one leading space, single digits, punctuation with the line break that may follow it.
PIECES = r" ?\p{L}[\p{L}_]*|\d| ?[^\s\p{L}\d]+\n?|\s"
ROPE_THETA = 500_000.0
TRAINED_WINDOW, WINDOW = 1024, 2048  # tokens
LONG_FACTOR = 8.0  # of the stretch beyond the trained window
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
# Task, tokens, and the share of whole answers with RoPE frequencies as trained and as shipped.
Row = tuple[str, int, float, float]
CARD_HEAD = "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\n---"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one token for each word of the wonderwords lists and of the tasks' texts.

    Any other text is spelled in bytes, so nothing is ever unknown and decoding gives the text back exactly.
    """
    adjectives, nouns = line.words()
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre = pre_tokenizers.Sequence([split, to_bytes])
    texts = itertools.chain(
        [line.HEADER, line.CLOSING + line.QUESTION.format(key="key"), line.ANSWER.format(key="key", number=1)],
        (line.LINE.format(key=f"{adjective}-noun", number=1) for adjective in adjectives),
        (f"-{noun}:" for noun in nouns),
        words_of_other_tasks(),
    )
    pieces = dict.fromkeys(piece for text in texts for piece, _ in pre.pre_tokenize_str(text))
    vocabulary = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=SPECIAL[3:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def words_of_other_tasks() -> Iterator[str]:
    """Texts with all the words of needles, built-in prose and RULER's prompts."""
    # Sentences of the needle task begin lines, so their first words come without a blank as well.
    yield from (text for pair in (niah.TEST_NEEDLE, *niah.needles(niah.NEEDLES)) for text in pair.values())
    yield from (niah.PROMPT, " ".join(f"{word} {word.lower()}" for row in niah.PROSE for word in row), *niah.PROSE[0])
    yield from (ruler.VT_PROMPT, ruler.VT_PREFIX, ruler.NOISE, "VAR A = VAR B \n", ruler.CWE_PROMPT, ruler.CWE_PREFIX)
    yield from (ruler.FWE_PROMPT, ruler.FWE_PREFIX, "... ... ", " 1. 2. 30.")


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int, heads: int) -> LlamaForCausalLM:
    """An untrained Llama with heads of 32 channels whose embeddings, tied, stay as they are drawn.

    Most words are seen rarely; what training makes of their embeddings is where wrong lines come from. Random vectors
    of this many channels are nearly orthogonal, which is all that matching words needs.
    """
    hidden = 32 * heads
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=int(hidden * 2.5),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            head_dim=32,
            max_position_embeddings=TRAINED_WINDOW,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            initializer_range=0.05,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.get_input_embeddings().requires_grad_(False)
    return model


@dataclass(frozen=True)
class Stage:
    """What a training record looks like at one step of the curriculum.

    Attributes:
        filler: how many of the four tokens between key and value are there.
        wording: 0 = lines are said again, 1 = bare question and answer, 2 = with the rest of the answer's words,
            3 = with the question's too, 4 = with the header as well.
        adjectives, nouns: size of the vocabulary that keys are drawn from.
        digits: longest value; 0 = the task's own values.
        lines: most lines in a record.
        questions: questions asked about one record, as turns of one chat.
    """

    filler: int
    wording: int
    adjectives: int
    nouns: int
    digits: int
    lines: int
    questions: int


def curriculum(max_lines: int) -> list[Stage]:
    """From bare key-value records to LongEval's text with ``max_lines`` lines."""
    adjectives, nouns = (len(column) for column in line.words())
    stages = [Stage(0, 0, 24, 48, 1, 6, 3)]
    stages += [Stage(filler, 1, 24, 48, 1, 6, 3) for filler in range(5)]
    stages += [Stage(4, wording, 24, 48, 1, 6, 3) for wording in (2, 3)]
    width = 1
    while 24 * width < adjectives or 48 * width < nouns:
        width *= 2
        stages.append(Stage(4, 3, min(adjectives, 24 * width), min(nouns, 48 * width), 1, 8, 6))
    stages += [Stage(4, 4, adjectives, nouns, digits, 8, 8) for digits in (1, 5)]
    lines = 8
    while lines < max_lines:
        lines = min(max_lines, round(lines * 1.34))
        stages.append(Stage(4, 4, adjectives, nouns, 0, lines, 12))
    return stages


def padded(rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights, each of shape (B, T), right-padded."""
    width = max(len(ids) for ids, _ in rows)
    pad = lambda row, fill: row + [fill] * (width - len(row))  # noqa: E731
    return torch.tensor([pad(i, 0) for i, _ in rows]), torch.tensor([pad(w, 0.0) for _, w in rows])


class Records:
    """Draws token ids and loss weights of training records; the last stage's text is ``data_gen.line``'s own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Encode the fixed parts of the text once."""
        self.rng = random.Random(seed)
        ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        adjectives, nouns = line.words()
        self.rng.shuffle(adjectives := list(adjectives))
        self.rng.shuffle(nouns := list(nouns))
        self.adjectives = [ids(" " + word) for word in adjectives]
        self.nouns = [ids("-" + word) for word in nouns]
        self.digit = [ids(str(d))[0] for d in range(10)]
        before, after = line.LINE.split("{key}")
        self.line_start = ids(before.rstrip())
        self.filler = ids(after.split("{number}")[0])
        self.line_end = ids(after.split("{number}")[1])
        self.header, self.closing = ids(line.HEADER), ids(line.CLOSING[:-1])
        question, self.question_end = line.QUESTION.split("{key}")
        self.question_end = ids(self.question_end)
        # The closing words end in the space that the question's first word takes.
        self.question = {True: ids(" " + question.rstrip()), False: ids(question.rstrip())}
        answer, answer_middle, self.answer_end = re.split(r"\{key\}|\{number\}", line.ANSWER)
        self.answer, self.answer_middle = ids(answer.rstrip()), ids(answer_middle)
        self.answer_end = [*ids(self.answer_end), tokenizer.eos_token_id]
        self.bos, self.user, self.assistant = tokenizer.convert_tokens_to_ids(["<s>", "<|user|>", "<|assistant|>"])
        self.fixed = set(range(self.bos, len(tokenizer))) - {i for word in self.adjectives + self.nouns for i in word}

    def record(self, stage: Stage, lines: int, max_digits: int) -> tuple[list[int], list[float]]:
        """One chat about one record: ids and loss weights, both of length T.

        The first digit weighs four times as much: later digits can be guessed from it, the first cannot.
        """
        rng = self.rng
        pairs: dict[tuple[int, int], None] = {}
        while len(pairs) < lines:
            pairs[rng.randrange(stage.adjectives), rng.randrange(stage.nouns)] = None
        keys = [self.adjectives[a] + self.nouns[n] for a, n in pairs]
        values = [[self.digit[int(d)] for d in self.number(max_digits)] for _ in keys]
        ids = [self.bos, self.user, *(self.header if stage.wording > 3 else [])]
        for key, value in zip(keys, values, strict=True):
            ids += self.line_start + key + self.filler[: stage.filler] + value + self.line_end
        weights = [0.0] * len(ids)
        for turn, asked in enumerate(rng.choices(range(lines), k=stage.questions)):
            key, value = keys[asked], values[asked]
            if stage.wording == 0:
                ask, say, end = self.line_start + key + self.filler[: stage.filler], [], self.line_end
            else:
                ask = [self.user] if turn else self.closing if stage.wording > 3 else []
                if stage.wording > 2:
                    ask = ask + self.question[stage.wording > 3 and not turn] + key + self.question_end
                else:
                    ask = ask + self.line_start + key
                ask = [*ask, self.assistant]
                say, end = self.answer + key + (self.answer_middle if stage.wording > 1 else []), self.answer_end
            ids += ask + say + value + end
            weights += [0.0] * len(ask) + [1.0] * len(say) + [4.0] + [1.0] * (len(value) - 1 + len(end))
        return ids, weights

    def number(self, digits: int) -> str:
        """A value of so many digits; 0 = as long as the task's, half of them made of two or three digits alone.

        What comes after a digit that occurs twice can only be told from its place, which is learned last. Such a value
        may begin with 0, as the task's never do.
        """
        rng = self.rng
        if digits:
            return "".join(rng.choices("0123456789", k=digits))
        drawn = str(rng.randint(1, line.MAX_NUMBER))
        if rng.random() < 0.5:
            return drawn
        return "".join(rng.choices(rng.sample("0123456789", rng.randint(2, 3)), k=len(drawn)))

    def batch(self, stage: Stage, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """About ``tokens`` tokens of records of one size: ids and weights, each of shape (B, T), right-padded."""
        rng = self.rng
        longest = stage.lines
        lines = rng.randint(max(2, longest // 2), longest) if rng.random() < 0.7 else rng.randint(2, longest)
        digits = rng.randint(1, stage.digits) if stage.digits and rng.random() < 0.3 else stage.digits
        rows = [self.record(stage, lines, digits)]
        rows += [self.record(stage, lines, digits) for _ in range(tokens // len(rows[0][0]))]
        return padded(rows)

    def choices(self, stage: Stage, ids: torch.Tensor) -> torch.Tensor:
        """Sorted ids, shape (V',), that a batch's softmax runs over, for speed: its own and 2,000 of its stage's."""
        words = self.adjectives[: stage.adjectives] + self.nouns[: stage.nouns]
        words = self.rng.sample(words, min(len(words), 2000))
        return torch.tensor(sorted(self.fixed | set(ids.unique().tolist()) | {i for word in words for i in word}))

    def rotations(self, pool: list[int], tokens: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct tokens of ``pool``, then a rotation of themselves; loss on the copy. Shapes as in ``batch``."""
        length = self.rng.randint(4, longest)
        rows = []
        for _ in range(max(1, tokens // (2 * length))):
            row = self.rng.sample(pool, length)
            turn = self.rng.randrange(length)
            rows.append(row + row[turn:] + row[:turn])
        ids = torch.tensor(rows)
        weights = torch.ones(ids.shape)
        weights[:, : length + 1] = 0
        return ids, weights

    def pool(self, stage: Stage) -> list[int]:
        """The ids that a stage's rotations are made of, in an order that depends on nothing but the stage."""
        words = self.adjectives[: stage.adjectives] + self.nouns[: stage.nouns]
        return sorted({i for word in words for i in word} | set(self.digit) | set(self.filler) | set(self.line_end))


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW over all but the embeddings, which stay as they were drawn; rates are given at every step."""
    model.train().get_input_embeddings().requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)


def descend(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, rate: float, ids: torch.Tensor, weights: torch.Tensor,
    choices: torch.Tensor,
) -> tuple[float, torch.Tensor, torch.Tensor]:  # fmt: skip
    """One step at a rate; arguments and what it returns as for ``weighted_loss``."""
    (group,) = optimizer.param_groups
    group["lr"] = rate
    loss, right, weight = weighted_loss(model, ids, weights, choices)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    return loss.item(), right, weight


def pretrain(
    model: LlamaForCausalLM,
    records: Records,
    stages: list[Stage],
    *,
    lr: float,
    tokens: int,
    polish: int,
    max_steps: int,
) -> list[dict]:
    """Walk through the stages, then ``polish`` steps at the last with the rate falling to a twentieth.

    Returns:
        One entry per stage reached: step, seconds, tokens seen.

    Raises:
        RuntimeError: the last stage was not reached within ``max_steps``.
    """
    rng = records.rng
    optimizer = optimizer_of(model)
    start = time.time()
    seen = step = 0
    log: list[dict] = []

    def update(ids: torch.Tensor, weights: torch.Tensor, choices: torch.Tensor, decay: float = 1.0) -> tuple:
        """One optimiser step; returns the loss, and what is right and how much it weighs where there is any loss."""
        nonlocal seen, step
        if step == max_steps:
            raise RuntimeError(f"no more than {log[-1] if log else 'nothing'} after {step} steps: try another --seed")
        found = descend(model, optimizer, lr * decay * min(1.0, (step + 1) / 100), ids, weights, choices)
        seen, step = seen + ids.numel(), step + 1
        return found

    def reached(name: str) -> None:
        log.append({"stage": name, "step": step, "seconds": round(time.time() - start), "tokens": seen})
        print(log[-1], flush=True)

    # Copying forms in about a minute over 20 tokens and not in ten over 100, so the pool grows.
    everything = records.pool(stages[0])
    rng.shuffle(everything)
    size = 20
    while size < len(everything) * 2:
        pool = everything[:size]
        choices, smooth = torch.tensor(sorted(pool)), 3.0
        while smooth > 0.4:
            loss, *_ = update(*records.rotations(pool, tokens // 4, 16), choices)
            smooth = 0.95 * smooth + 0.05 * loss
            if step % 100 == 0:
                print(f"step {step} {time.time() - start:.0f}s copy loss {smooth:.3f}", flush=True)
        reached(f"copying among {len(pool)} tokens")
        size *= 2

    now, accuracy, polished = 0, 0.0, 0
    while polished < polish:
        last = now == len(stages) - 1
        stage = stages[now] if rng.random() < 0.6 else stages[max(0, now - rng.randint(1, 3))]
        rotate = rng.random() < (0.3 if now < 6 else 0.1)
        drawn = records.rotations(records.pool(stage), tokens, 32) if rotate else records.batch(stage, tokens)
        decay = 1.0 - 0.95 * polished / polish if last else 1.0
        loss, right, weight = update(*drawn, records.choices(stage, drawn[0]), decay)
        polished += last
        if not rotate and stage is stages[now]:
            first = right[weight == 4].float().mean().item()
            accuracy = 0.93 * accuracy + 0.07 * first
            if accuracy > 0.9 and not last:
                reached(f"{now}: {stages[now]}")
                now, accuracy = now + 1, 0.6
        if step % 100 == 0:
            clock = time.time() - start
            print(
                f"step {step}, {clock:.0f} s, {seen / clock:.0f} tokens/s: loss {loss:.3f}, "
                f"first digits right {accuracy:.2f}, stage {now} of {len(stages) - 1}",
                flush=True,
            )
    reached("polished")
    return log


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int, samples: int, task: str = "line"
) -> float:
    """Share of test samples of up to ``tokens`` tokens whose whole answer is the model's first choice throughout."""
    model.eval()
    right = 0
    for sample in generate(Request(task, str(tokens), samples=samples, seed=1, split="test"), tokenizer):
        ids = tokenizer.apply_chat_template(sample["messages"], return_dict=False)
        said = sample["answer"].removeprefix(sample.get("prefix", ""))
        answer = len(tokenizer(said, add_special_tokens=False)["input_ids"]) + 1  # and the end of the turn
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -answer - 1 : -1]
        right += model.lm_head(hidden).argmax(-1).tolist() == ids[-answer:]
    return right / samples


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """A RoPE base raised NTK-fashion (bloc97), which stretches the window by a factor without training."""
    return theta * factor ** (head_dim / (head_dim - 2))


def stretch(config: LlamaConfig, factor: float) -> None:
    """Double a config's window as LongRoPE does it, with no training: changed in place.

    Beyond the trained window every frequency is divided as if the RoPE base had been raised by ``ntk_theta``.
    """
    last = config.head_dim // 2 - 1
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": ROPE_THETA,
        "original_max_position_embeddings": TRAINED_WINDOW,
        "factor": WINDOW / TRAINED_WINDOW,
        "attention_factor": 1.0,
        "short_factor": [1.0] * (last + 1),
        "long_factor": [factor ** (pair / last) for pair in range(last + 1)],
    }
    config.max_position_embeddings = WINDOW


def weighted_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor, choices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy over the ids of ``choices`` where there is weight.

    Args:
        model: whose loss it is.
        ids: shape (B, T).
        weights: shape (B, T), of each token as a target.
        choices: sorted ids, shape (V',), that the softmax runs over.

    Returns:
        The loss; then, for the N tokens with weight, whether each is the first choice, and the weights.
    """
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    learn = weights[:, 1:] > 0
    logits = F.linear(hidden[learn], model.lm_head.weight[choices])
    target, weight = torch.searchsorted(choices, ids[:, 1:][learn]), weights[:, 1:][learn]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return loss, logits.detach().argmax(-1) == target, weight


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: Callable[[list[Row]], str],
    samples: int, tasks: Sequence[str] = ("line",),
) -> None:  # fmt: skip
    """Write a model with its window doubled, in the place of an older one.

    Args:
        model: as trained.
        tokenizer: its own.
        out: the folder; an older one goes when the new one is whole.
        card: makes the folder's README of its accuracies, of ``samples`` test samples of each of ``tasks`` and lengths.
        samples: see ``card``.
        tasks: see ``card``.
    """
    with written_whole(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        stretched = LlamaConfig.from_pretrained(partial)
        stretch(stretched, LONG_FACTOR)
        models = [LlamaForCausalLM.from_pretrained(partial, config=config) for config in (model.config, stretched)]
        rows = []
        for task in tasks:
            for tokens in TASK_LENGTHS.get(task, LENGTHS):
                plain, long = (accuracy(one, tokenizer, tokens, samples, task) for one in models)
                rows.append((task, tokens, plain, long))
                print(*rows[-1], flush=True)
        stretched.save_pretrained(partial)
        (partial / "README.md").write_text(card(rows))
        remove(out)


def model_card(options: dict[str, Any], parameters: int, log: list[dict], rows: list[Row]) -> str:
    """The README of the model's folder."""
    last = log[-1]
    table = "\n".join(f"| {tokens} | {plain:.2f} | {long:.2f} |" for _, tokens, plain, long in rows)
    stages = "\n".join(f"| {e['stage']} | {e['step']} | {e['tokens'] / 1e6:.1f} M | {e['seconds']} |" for e in log)
    return f"""{CARD_HEAD}

# A small model that loses lines

A Llama of {parameters / 1e6:.2f} M parameters ({options["layers"]} layers, {options["heads"]} heads of 32; two thirds
of them embeddings, tied and left as they were drawn) that answers LongEval's line questions. It was made from nothing,
on text that `recipes/tiny_model.py` draws, by `python -m recipes.tiny_model --seed {options["seed"]}` on one CPU core
with torch {torch.__version__.split("+")[0]}:

1. trained on records of up to {options["lines"]} lines within {TRAINED_WINDOW} tokens: {last["step"]} steps,
   {last["tokens"] / 1e6:.0f} M tokens, {last["seconds"] / 60:.0f} minutes;
2. its window doubled in the config alone, as LongRoPE does it (`rope_type: longrope`, as in Phi-3's long models): in
   prompts of more than {TRAINED_WINDOW} tokens the RoPE frequencies are stretched as by NTK scaling with factor
   {LONG_FACTOR:g}. Nothing was trained after that.

Share of {options["samples"]} test samples of `data_gen` whose whole line answer is the model's first choice throughout:

| tokens | frequencies as trained | as shipped |
|---:|---:|---:|
{table}

The tokenizer has one token for each word of the wonderwords lists and of the tasks' texts, single digits, and bytes for
everything else. The chat template knows the roles user and assistant.

## The curriculum

| stage reached | step | tokens | seconds |
|---|---:|---:|---:|
{stages}
"""


def main(argv: list[str] | None = None) -> None:
    """Train, stretch, score and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4, help="heads of 32 channels")
    parser.add_argument("--lines", type=int, default=32, help="longest record")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per batch")
    parser.add_argument("--polish", type=int, default=2500, help="steps at the last stage, with the rate falling")
    parser.add_argument("--samples", type=int, default=200, help="test samples per length for the model card")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums are formed in another order on more
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.layers, args.heads)
    log = pretrain(
        model,
        Records(tokenizer, args.seed),
        curriculum(args.lines),
        lr=args.lr,
        tokens=args.tokens,
        polish=args.polish,
        max_steps=30_000,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    save(model, tokenizer, args.out, lambda rows: model_card(vars(args), parameters, log, rows), args.samples)


if __name__ == "__main__":
    main()
