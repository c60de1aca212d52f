"""Time one tuning step by method, and by how much of its activations a step recomputes.

Models have real shapes and random weights, so nothing is downloaded; a step is forward, backward and AdamW on one
sample whose last 40 tokens are the answer. On a CPU methods are interleaved, so that a slow minute of the machine
affects all; on a GPU one model at a time is loaded, so that the peak memory is its own, and runs under all settings.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import IA3Config, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from axolotl_plugins.common.console import first_line, out_of_memory, quiet_libraries, stop
from axolotl_plugins.common.io import load_json, write_text
from axolotl_plugins.common.provenance import machine
from axolotl_plugins.seal.tune import answer_loss
from eval.cli_options import parse_numbers
from recipes.tools.estimate import Shape, training_flop
from recipes.tools.methods import peft_config
from recipes.tools.render import read_matrix

ANSWER = 40  # tokens with a loss
SMALL = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32_000}  # fmt: skip
METHODS = {
    "SEAL-C": lambda: peft_config("sealc"),
    "SEAL-H": lambda: peft_config("sealh"),
    "IA3": lambda: IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"]),
    "LoRA": lambda: peft_config("seall"),
}
OFFLOAD = {"offload": "inputs", "offload_all": "all"}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Forward kernels of scaled dot-product attention, whose outputs `selective_checkpointing: true` stores.
ATTENTION = {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in (
    "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")}  # fmt: skip
OUT_OF_MEMORY = "out of memory"
DEFAULT_SHARE = 0.5  # of the matrix products' rate, to predict a step before any was measured


@dataclass(frozen=True)
class Setting:
    """What a step recomputes, and the kernels it uses.

    Attributes:
        recompute: whether activations are recomputed (``gradient_checkpointing: true``, non-reentrant).
        selective: whether attention outputs are stored nevertheless (``selective_checkpointing: true``).
        every: only every N-th layer is recomputed (``gradient_checkpointing_kwargs: every_n_layers``).
        liger: whether Liger's RMSNorm, RoPE and SwiGLU are used.
        offload: what recomputed layers store in host memory, see ``StepConfig``; Axolotl's own code does it.
        backend: of scaled dot-product attention, one of ``BACKENDS``; None leaves the choice to PyTorch.
    """

    recompute: bool = True
    selective: bool = False
    every: int = 1
    liger: bool = False
    offload: str = ""
    backend: str | None = None

    @classmethod
    def of(cls, name: str) -> Setting:
        """Parse a name: parts joined by ``+``, such as ``selective+liger+every2``.

        Raises:
            ValueError: a part is unknown, or parts exclude each other.
        """
        parts = set(name.split("+"))
        every = {int(part[5:]) for part in parts if part.startswith("every") and part[5:].isdecimal()}
        valid = {"full", "none", "selective", "liger", *OFFLOAD, *BACKENDS, *(f"every{n}" for n in every)}
        if unknown := parts - valid:
            raise ValueError(f"settings: found {min(unknown)!r}, expected full, none, selective, everyN, liger, "
                             f"{', '.join([*OFFLOAD, *BACKENDS])} or several joined by +")  # fmt: skip
        backend, offload = ([part for part in names if part in parts] for names in (BACKENDS, OFFLOAD))
        recomputed = bool(parts & {"full", "selective"} or every or offload)
        several = max(len(every), len(backend), len(offload)) > 1
        if several or ("none" in parts and recomputed) or ("full" in parts and every):
            raise ValueError(f"settings: the parts of {name!r} exclude each other")
        if "offload_all" in parts and "selective" not in parts:
            raise ValueError("settings: offload_all stores attention outputs: add +selective, or take offload")
        if 0 in every:
            raise ValueError("settings: found 'every0', expected every1 or more")
        return cls("none" not in parts, "selective" in parts, max(every, default=1), "liger" in parts,
                   OFFLOAD[offload[0]] if offload else "", backend[0] if backend else None)  # fmt: skip

    def check(self, device: str) -> None:
        """Check that its kernels can run.

        Raises:
            ValueError: Liger is not installed, or a kernel needs a GPU.
        """
        if self.liger and find_spec("liger_kernel") is None:
            raise ValueError("settings: liger: liger_kernel is not installed: pip install liger-kernel")
        if self.offload and find_spec("axolotl") is None:
            raise ValueError("settings: offload: axolotl is not installed: pip install --no-deps axolotl==0.19.0")
        if device != "cuda" and (self.liger or self.backend):
            raise ValueError(f"settings: {'liger' if self.liger else self.backend} needs a GPU")


def keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Store attention outputs, recompute the rest."""
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def liger_kernels(base: PreTrainedModel) -> Iterator[None]:
    """Use Liger's RMSNorm, RoPE and SwiGLU in a Llama."""
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    replaced = {name: getattr(modeling_llama, name) for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")}
    try:
        apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, cross_entropy=False,
                                    fused_linear_cross_entropy=False, model=base)  # fmt: skip
        yield
    finally:
        for name, original in replaced.items():
            setattr(modeling_llama, name, original)
        for module in base.modules():
            for method in ("forward", "extra_repr", "_get_name"):
                module.__dict__.pop(method, None)  # Liger binds them to the instance, which hides the class's own


@contextmanager
def applied(model: Any, setting: Setting) -> Iterator[None]:
    """Apply a setting to a model wrapped by PEFT, by the calls that Axolotl makes, and undo it."""
    base = model.get_base_model()
    with ExitStack() as undo:
        if setting.recompute:
            options: dict[str, Any] = {"use_reentrant": False}
            if setting.offload:
                from axolotl.monkeypatch.checkpoint_activation_offload import CheckpointHiddenStatesOffload

                undo.enter_context(CheckpointHiddenStatesOffload())
            if setting.offload == "all":
                from axolotl.monkeypatch.selective_checkpointing_offload import build_sac_offload_context_fn

                options["context_fn"] = build_sac_offload_context_fn()
            elif setting.selective:
                options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
            base.gradient_checkpointing_enable(options, every_n_layers=setting.every)
            base.disable_input_require_grads()  # backprop stops at the lowest scale, as in training
            undo.callback(base.gradient_checkpointing_disable)
        if setting.liger:
            undo.enter_context(liger_kernels(base))
        if setting.backend:
            undo.enter_context(sdpa_kernel(BACKENDS[setting.backend]))
        yield


def build(shape: dict[str, Any], method: str, device: str) -> Any:
    """Build a model with random weights, wrapped by a method, ready to train."""
    settings = dict(shape)
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings, pad_token_id=0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return get_peft_model(model, METHODS[method]()).train()


def sample(tokens: int, vocabulary: int, device: str) -> torch.Tensor:
    """Return random token ids of shape (1, T)."""
    return torch.randint(1, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)


class Run:
    """One method's model and optimizer."""

    def __init__(self, shape: dict[str, Any], method: str, device: str) -> None:
        """Build the model and its optimizer."""
        self.model = build(shape, method, device)
        self.device = device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, weight_decay=0.0)

    def step(self, ids: torch.Tensor) -> float:
        """Run one step on ids of shape (1, T), and return its seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        loss = answer_loss(self.model, ids, ids.shape[1] - ANSWER)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until the GPU is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str) -> float:
    """Measure the FLOP per second of this machine's matrix products, in the dtype that models run in."""
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


def attention_kernel(device: str) -> str:
    """Return autograd's name of the kernel that scaled dot-product attention runs in the models' dtype."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.ones(1, 2, 256, 128, device=device, dtype=dtype, requires_grad=True)
    node = F.scaled_dot_product_attention(q, q, q, is_causal=True).grad_fn
    return node.name().removeprefix("ScaledDotProduct").removesuffix("Backward0") if node else "none"


class Clock:
    """A deadline."""

    def __init__(self, minutes: float | None) -> None:
        """Start the clock; None means no deadline."""
        self.end = time.perf_counter() + 60 * minutes if minutes is not None else float("inf")

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.end - time.perf_counter()


def time_steps(
    runs: list[Run], setting: Setting, ids: torch.Tensor, warmup: int | None, repeats: int, clock: Clock
) -> dict[str, Any]:
    """Time interleaved steps of models after one warm-up step each; at least one round, more while the clock allows.

    Args:
        runs: the models.
        setting: applied to all of them.
        ids: the sample, of shape (1, T).
        warmup: tokens of the warm-up step at most.
        repeats: rounds.
        clock: rounds that would end after its deadline are skipped.

    Returns:
        ``steps``, the seconds of each model's steps, and ``attention``, the kernel; or ``error``, one line.
    """
    try:
        with ExitStack() as undo:
            for run in runs:
                undo.enter_context(applied(run.model, setting))
                run.step(ids[:, -min(warmup or ids.shape[1], ids.shape[1]) :])
            rounds = [[run.step(ids) for run in runs]]
            while len(rounds) < repeats and sum(rounds[-1]) < clock.left():
                rounds.append([run.step(ids) for run in runs])
            steps = [list(seconds) for seconds in zip(*rounds, strict=True)]
            return {"steps": steps, "attention": attention_kernel(runs[0].device)}
    except Exception as error:  # one setting's failure must not lose the others; the command still fails
        return {"error": OUT_OF_MEMORY if out_of_memory(error) else first_line(error)}


def measure(
    runs: dict[str, Run], name: str, ids: torch.Tensor, useful: float, args: argparse.Namespace, clock: Clock
) -> list[dict[str, Any]]:
    """Measure one row per method, without the fields that all rows share.

    Args:
        runs: the models by method.
        name: of the setting.
        ids: the sample, of shape (1, T).
        useful: FLOP of a step, without recomputation.
        args: of the command line.
        clock: deadline of the command.
    """
    gpu = args.device == "cuda"
    gc.collect()  # frees the graph of a step that ran out of memory
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = time_steps(list(runs.values()), Setting.of(name), ids, args.warmup, args.repeats, clock)
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    rows = []
    for index, method in enumerate(runs):
        row = {"method": method, "setting": name, "tokens": ids.shape[1], "peak_gib": peak, "date": str(date.today())}
        if "error" in times:
            row["error"] = times["error"]
        else:
            steps = times["steps"][index]
            median = statistics.median(steps)
            row |= {"seconds": median, "steps": steps, "tflop_per_second": useful / median / 1e12,
                    "attention": times["attention"]}  # fmt: skip
        rows.append(row)
    return rows


KEY = ("device", "torch", "shape", "layers", "method", "setting", "tokens")


def fill(
    rows: list[dict[str, Any]], shape: dict[str, Any], shared: dict[str, Any], args: argparse.Namespace, clock: Clock
) -> None:
    """Measure the missing rows, in the order of the command line; write each as soon as it is measured.

    Args:
        rows: existing rows, of any command; new ones are appended.
        shape: of the model.
        shared: fields of all new rows, such as the ``rate`` of matrix products.
        args: of the command line.
        clock: deadline of the command; rows that would end after it are skipped.
    """
    done = {tuple(row.get(key) for key in KEY) for row in rows}
    # On a GPU one model at a time is loaded.
    groups = [args.methods] if args.device == "cpu" else [[method] for method in args.methods]
    shares = [row["share"] for row in rows if "share" in row and row["device"] == shared["device"]]
    share = shares[-1] if shares else DEFAULT_SHARE
    for group in groups:
        runs: dict[str, Run] = {}
        for tokens in args.tokens:
            ids = sample(tokens, shape["vocab_size"], args.device)
            useful = training_flop(Shape.of(shape), tokens, answer=ANSWER)
            for name in args.settings:
                missing = [{**shared, "method": method, "setting": name, "tokens": tokens} for method in group]
                if all(tuple(row[key] for key in KEY) in done for row in missing):
                    continue
                steps = 1 + min(args.warmup or tokens, tokens) / tokens
                expected = steps * len(group) * useful / (share * shared["rate"])
                if expected > clock.left():
                    print(f"{name}, {tokens} tokens: skipped, it would take about {expected:.0f} s", file=sys.stderr)
                    continue
                runs = runs or {method: Run(shape, method, args.device) for method in group}
                for row in measure(runs, name, ids, useful, args, clock):
                    if "error" not in row:
                        share = row["share"] = row["tflop_per_second"] * 1e12 / shared["rate"]
                    rows.append({**shared, **row})
                    print(f"{row['method']}, {name}, {tokens} tokens:", row.get("error") or f"{row['seconds']:.3f} s")
                write_text(args.out, json.dumps({"rows": rows}, indent=1) + "\n")


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, with ratios to the first row of the same tokens."""
    from rich.console import Console
    from rich.table import Table

    table = Table("tokens", "method", "setting", "s/sample (range)", "ratio to first (range)", "useful TFLOP/s",
                  "share of matmul", "peak GiB")  # fmt: skip
    first: dict[int, list[float]] = {}
    for row in rows:
        start = (str(row["tokens"]), row["method"], row["setting"])
        if "error" in row:
            table.add_row(*start, row["error"])
            continue
        steps = row["steps"]
        ratios = [own / other for own, other in zip(steps, first.setdefault(row["tokens"], steps), strict=False)]
        table.add_row(*start, f"{row['seconds']:.3f} ({min(steps):.3f}-{max(steps):.3f})",
                      f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                      f"{row['tflop_per_second']:.3f}", f"{row['share']:.0%}",
                      "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}")  # fmt: skip
    Console(width=140).print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    names = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(
        prog="python -m recipes.bench", description=__doc__.splitlines()[0],
        epilog="Example: python -m recipes.bench --methods SEAL-C,LoRA --tokens 2048,4096 --settings full,selective",
    )  # fmt: skip
    parser.add_argument("--shape", default="small", help="small, or a shape in recipes/matrix.yml such as llama2_7b")
    parser.add_argument("--layers", type=int, help="default: the shape's own")
    parser.add_argument("--tokens", default="2048,4096", help="lengths of samples")
    parser.add_argument("--methods", type=names, default=list(METHODS), help=f"some of {','.join(METHODS)}")
    parser.add_argument("--settings", type=names, default=["none"],
                        help="the most important first: full, none, selective, everyN, liger, cudnn, flash, or several "
                        "joined by +, such as selective+liger+every2")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, help="tokens of the warm-up step, at most (default: the sample's)")
    parser.add_argument("--minutes", type=float, help="skip rows that would end later")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"),
                        help="file of rows; existing rows are not measured again")  # fmt: skip
    return parser.parse_args(argv)


def check(args: argparse.Namespace, shapes: dict[str, Any]) -> None:
    """Check the command line, and parse its lengths.

    Raises:
        ValueError: an option is invalid.
    """
    args.tokens = parse_numbers(args.tokens, "tokens")
    if unknown := [name for name in args.methods if name not in METHODS]:
        raise ValueError(f"methods: found {unknown[0]!r}, expected some of {', '.join(METHODS)}")
    if args.shape not in shapes:
        raise ValueError(f"shape: found {args.shape!r}, expected one of {', '.join(shapes)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no GPU found: use --device cpu")
    if (shortest := min([*args.tokens, args.warmup or args.tokens[0]])) <= ANSWER:
        raise ValueError(f"tokens: found {shortest}, expected more than the answer's {ANSWER}")
    for name in args.settings:
        setting = Setting.of(name)
        setting.check(args.device)
        if setting.liger and shapes[args.shape]["model_type"] != "llama":
            raise ValueError(f"settings: liger: {args.shape} is not a Llama")


def main(argv: list[str] | None = None) -> None:
    """Measure the rows of the command line, and print them."""
    args = arguments(argv)
    clock = Clock(args.minutes)
    quiet_libraries()
    shapes = {"small": SMALL, **read_matrix()["shapes"]}
    try:
        check(args, shapes)
        rows = load_json(args.out)["rows"] if args.out.exists() else []
    except ValueError as error:
        stop(error)
    shape = dict(shapes[args.shape]) | ({"num_hidden_layers": args.layers} if args.layers else {})
    device = torch.cuda.get_device_name() if args.device == "cuda" else machine()
    shared = {"device": device, "torch": torch.__version__, "shape": args.shape, "layers": shape["num_hidden_layers"],
            "rate": matmul_rate(args.device)}  # fmt: skip
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, sdpa; matrix products "
          f"{shared['rate'] / 1e12:.2f} TFLOP/s")  # fmt: skip
    fill(rows, shape, shared, args, clock)
    device_rows = [row for row in rows if all(row[key] == shared[key] for key in KEY[:4])]
    if all("error" in row for row in device_rows):
        sys.exit("seal: nothing was measured: ask for fewer --tokens or more --minutes")
    print_rows(device_rows)
    print(args.out)
    if failed := [row["setting"] for row in device_rows if row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY]:
        sys.exit(f"seal: failed: {', '.join(failed)}; remove these rows from {args.out} to measure them again")


if __name__ == "__main__":
    main()
