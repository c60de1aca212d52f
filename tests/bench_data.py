"""Time the generation of every task, with the tokenizer of Mistral's first models (``make bench-data``)."""

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

from axolotl_plugins.common.console import quiet_libraries
from data_gen.tasks import TASKS
from data_gen.tasks.niah import prose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of Mistral-7B-Instruct-v0.2, for one question and its answer.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)


def mistral_tokenizer() -> PreTrainedTokenizerBase:
    """Build the fast tokenizer with the 32,000 pieces of Mistral-7B-Instruct-v0.2, which mistral_common contains."""
    import mistral_common
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(piece): piece for piece in range(len(pieces))}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary), legacy=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_passages(file: Path, tokens: int, rows: int) -> None:
    """Write samples in LongBench's format, of generated prose, of ``tokens`` to twice as many tokens."""
    with file.open("w", encoding="utf-8") as out:
        for row in range(rows):
            sentences = int(tokens / 16 * (1 + row / rows))  # of 16 tokens each
            context = prose(random.Random(row), sentences)
            sample = {"context": context, "input": "Question: What is kept?\nAnswer:", "answers": ["a letter"],
                      "length": len(context.split())}  # fmt: skip
            out.write(json.dumps(sample) + "\n")


def prepare(folder: Path, tokens: int, samples: int) -> None:
    """Write the tokenizer and the passages that the tasks read."""
    quiet_libraries()
    mistral_tokenizer().save_pretrained(folder / "tokenizer")
    write_passages(folder / "triviaqa_e.jsonl", tokens, samples)


def measure(command: list[str]) -> tuple[float, float, float]:
    """Run a command.

    Returns:
        Wall time and CPU time in seconds, and peak resident memory in MiB.

    Raises:
        ValueError: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise ValueError(f"{' '.join(command)}: failed")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    """Write samples of every task into a temporary folder, and print the time and memory of each as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=31_000, help="longest sample")
    parser.add_argument("--samples", type=int, default=50, help="of each task")
    options = parser.parse_args(arguments)
    print("| task | seconds | CPU seconds | peak memory (MiB) |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In another process: the peak memory of a child is at least that of its parent when it forks.
        preparation = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(folder, options.tokens, options.samples)
        )
        preparation.start()
        preparation.join()
        for task in TASKS:
            command = [sys.executable, "-m", "data_gen", task, "--tokenizer", str(folder / "tokenizer")]
            command += ["--tokens", str(options.tokens), "--samples", str(options.samples)]
            command += ["--data", str(folder / "triviaqa_e.jsonl")] if task == "longbench" else []
            wall, processor, memory = measure([*command, "--out", str(folder / f"{task}.jsonl")])
            print(f"| `{task}` | {wall:.1f} | {processor:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
