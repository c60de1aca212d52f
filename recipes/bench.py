"""How fast, and in how much memory, attention scales are tuned, beside IA3 and LoRA in the same run (``make bench``).

Models have real shapes and random weights, so nothing is fetched; a step is forward, backward and AdamW on one sample
whose last 40 tokens are the answer. Methods take turns, so that a slow minute of the machine is every method's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from axolotl_plugins.seal.needed import no_embedding_gradients
from axolotl_plugins.seal.tune import answer_loss
from data_gen.console import quiet_libraries
from data_gen.files import write_text
from recipes.cost import Shape, training_flop
from recipes.machine import machine
from recipes.matrix import peft_config, read_matrix

ANSWER = 40  # tokens with a loss
SMALL = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32_000}  # fmt: skip
METHODS = {
    "SEAL-C": lambda: peft_config("sealc"),
    "SEAL-H": lambda: peft_config("sealh"),
    "IA3": lambda: IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"]),
    "LoRA": lambda: peft_config("seall"),
}


def build(shape: dict[str, Any], method: str, tokens: int, device: str, checkpointing: bool) -> Any:
    """A model with random weights, wrapped by a method, ready to train."""
    settings = dict(shape)
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings, max_position_embeddings=tokens + 1, pad_token_id=0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(model, METHODS[method]())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        no_embedding_gradients(model.get_base_model())
    return model.train()


class Run:
    """One method's model and optimiser, kept between its turns."""

    def __init__(self, shape: dict[str, Any], method: str, tokens: int, device: str, checkpointing: bool) -> None:
        """Build it."""
        self.model = build(shape, method, tokens, device, checkpointing)
        self.device = device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 32_000, (1, tokens), generator=generator).to(device)

    def step(self) -> float:
        """Seconds of one step."""
        synchronize(self.device)
        start = time.perf_counter()
        loss = answer_loss(self.model, self.ids, self.ids.shape[1] - ANSWER)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str) -> float:
    """FLOP per second of this machine's matrix products, in the dtype that models run in."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def measure(
    shape: dict[str, Any], methods: list[str], tokens: int, repeats: int, device: str, checkpointing: bool, rate: float
) -> list[dict[str, Any]]:
    """One row per method.

    Returns:
        ``seconds`` (median), ``range`` of them, ``ratio`` (median over pairs with the first method, and its range),
        ``flop_per_second`` and ``share`` (useful FLOP alone, and as a share of ``rate``), on a GPU ``peak_gib``.
    """
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    peaks: dict[str, float] = {}
    # On a GPU a model has the device to itself, so that its peak is its own.
    together = device == "cpu"
    runs = {method: Run(shape, method, tokens, device, checkpointing) for method in methods} if together else {}
    if together:
        for run in runs.values():
            run.step()
        for _, method in itertools.product(range(repeats), methods):
            seconds[method].append(runs[method].step())
    else:
        for method in methods:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run = Run(shape, method, tokens, device, checkpointing)
            run.step()
            seconds[method] = [run.step() for _ in range(repeats)]
            peaks[method] = torch.cuda.max_memory_allocated() / 2**30
            del run
    useful = training_flop(Shape.of(shape), tokens, answer=ANSWER)
    rows = []
    for method in methods:
        ratios = [own / first for own, first in zip(seconds[method], seconds[methods[0]], strict=True)]
        median = statistics.median(seconds[method])
        rows.append({
            "method": method, "tokens": tokens, "seconds": median,
            "range": [min(seconds[method]), max(seconds[method])],
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)], "flop_per_second": useful / median,
            "share": useful / median / rate, "peak_gib": peaks.get(method),
        })  # fmt: skip
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table that one came for."""
    from rich.console import Console
    from rich.table import Table

    table = Table("tokens", "method", "s/sample (range)", f"ratio to {rows[0]['method']} (range)", "useful TFLOP/s",
                  "share of matmul", "peak GiB")  # fmt: skip
    for row in rows:
        ratio, low, high = row["ratio"]
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        table.add_row(str(row["tokens"]), row["method"],
                      f"{row['seconds']:.3f} ({row['range'][0]:.3f}-{row['range'][1]:.3f})",
                      f"{ratio:.2f} ({low:.2f}-{high:.2f})", f"{row['flop_per_second'] / 1e12:.3f}",
                      f"{row['share']:.0%}", peak)  # fmt: skip
    Console(width=120).print(table)


def main(argv: list[str] | None = None) -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", help="small, or a shape in recipes/matrix.yml such as llama2_7b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations instead of keeping them")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    args = parser.parse_args(argv)
    quiet_libraries()
    shapes = {"small": SMALL, **read_matrix()["shapes"]}
    if args.shape not in shapes:
        sys.exit(f"bench: shape: found {args.shape!r}, expected one of {', '.join(shapes)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: no GPU is here: leave --device out, or name cpu")
    if min(args.tokens) <= ANSWER:
        sys.exit(f"bench: tokens: found {min(args.tokens)}, expected more than the answer's {ANSWER}")
    shape = dict(shapes[args.shape]) | ({"num_hidden_layers": args.layers} if args.layers else {})
    rate = matmul_rate(args.device)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if args.device == "cuda" else machine()
    print(f"{where}, {torch.get_num_threads()} threads, sdpa; matrix products {rate / 1e12:.2f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        try:
            rows += measure(shape, args.methods, tokens, args.repeats, args.device, args.checkpointing, rate)
        except torch.OutOfMemoryError:
            print(f"{tokens} tokens do not fit into this card's memory", file=sys.stderr)
            break
    if not rows:
        sys.exit("bench: nothing fitted: ask for fewer --tokens")
    print_rows(rows)
    write_text(args.out, json.dumps({"machine": where, "shape": shape, "rate": rate,
                                     "checkpointing": args.checkpointing, "rows": rows}, indent=1) + "\n")  # fmt: skip
    print(args.out)


if __name__ == "__main__":
    main()
