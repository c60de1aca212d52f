"""How long all tasks take: ``python -m data_gen.bench``, with the tokenizer of Mistral's first models."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_gen.console import quiet_libraries
from data_gen.niah import prose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = ("line", "niah", "vt", "cwe", "fwe", "longbench")
# Of Mistral-7B-Instruct-v0.2, for one question and its answer.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)


def mistral_tokenizer() -> PreTrainedTokenizerBase:
    """The fast tokenizer with the 32,000 pieces of Mistral-7B-Instruct-v0.2, which mistral_common brings with it."""
    import mistral_common
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(place): place for place in range(len(pieces))}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary), legacy=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_passages(file: Path, tokens: int, rows: int) -> None:
    """Samples in LongBench's form, of generated prose, of about ``tokens`` to twice as many."""
    with file.open("w", encoding="utf-8") as out:
        for row in range(rows):
            sentences = int(tokens / 16 * (1 + row / rows))  # of 16 tokens each
            context = prose(random.Random(row), sentences)
            sample = {"context": context, "input": "Question: What is kept?\nAnswer:", "answers": ["a letter"],
                      "length": len(context.split())}  # fmt: skip
            out.write(json.dumps(sample) + "\n")


def prepare(folder: Path, tokens: int, samples: int) -> None:
    """Write what the tasks need."""
    quiet_libraries()
    mistral_tokenizer().save_pretrained(folder / "tokenizer")
    write_passages(folder / "triviaqa_e.jsonl", tokens, samples)


def measure(command: list[str]) -> tuple[float, float, float]:
    """Run a command.

    Returns:
        Seconds that passed, seconds of the processor, and largest resident memory in MiB.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    passed = time.perf_counter() - start
    if status:
        raise ValueError(f"{' '.join(command)}: failed")
    return passed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    """Write all tasks' samples into a folder that is thrown away, and print what each took as a table."""
    parser = argparse.ArgumentParser(prog="python -m data_gen.bench", description=__doc__)
    parser.add_argument("--tokens", type=int, default=31_000, help="longest sample")
    parser.add_argument("--samples", type=int, default=50, help="of every task")
    options = parser.parse_args(arguments)
    print("| task | seconds | of the processor | peak memory (MiB) |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Elsewhere, because a process begins with the memory of the one that starts it.
        beside = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(folder, options.tokens, options.samples)
        )
        beside.start()
        beside.join()
        for task in TASKS:
            command = [sys.executable, "-m", "data_gen", task, "--tokenizer", str(folder / "tokenizer")]
            command += ["--tokens", str(options.tokens), "--samples", str(options.samples)]
            command += ["--data", str(folder / "triviaqa_e.jsonl")] if task == "longbench" else []
            passed, processor, memory = measure([*command, "--out", str(folder / f"{task}.jsonl")])
            print(f"| `{task}` | {passed:.1f} | {processor:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
