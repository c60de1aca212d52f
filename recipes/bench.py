"""Time one tuning step by method, and by how much of its activations a step recomputes.

Models have real shapes and random weights, so nothing is downloaded; a step is forward, backward and AdamW on one
sample whose last 40 tokens are the answer. On a CPU methods are interleaved, so that a slow minute of the machine
affects all; on a GPU one model at a time is loaded, so that the peak memory is its own, and runs under all settings.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import typer
from peft import IA3Config, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from axolotl_plugins.common.console import first_line, out_of_memory
from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.environment import machine
from axolotl_plugins.common.io import load_json, write_text
from axolotl_plugins.seal.tune import answer_loss
from eval.cli_options import parse_names, parse_numbers, split_names
from recipes.tools.cost import BACKENDS, Shape, StepConfig, training_flop
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
# Forward kernels of scaled dot-product attention, whose outputs `selective_checkpointing: true` stores.
ATTENTION = {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in (
    "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")}  # fmt: skip
OUT_OF_MEMORY = "out of memory"
DEFAULT_SHARE = 0.5  # of the matrix products' rate, to predict a step before any was measured


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
def applied(model: Any, setting: StepConfig) -> Iterator[None]:
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
            undo.enter_context(sdpa_kernel(getattr(SDPBackend, f"{setting.backend.upper()}_ATTENTION")))
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


class Timing(NamedTuple):
    """How steps are timed.

    Attributes:
        warmup: tokens of the warm-up step at most; None takes the sample's.
        repeats: timed steps.
        deadline: of ``time.perf_counter``; what would end after it is skipped.
    """

    warmup: int | None
    repeats: int
    deadline: float

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.perf_counter()


def time_steps(
    runs: list[Run], setting: StepConfig, ids: torch.Tensor, timing: Timing
) -> tuple[list[list[float]], str]:
    """Time interleaved steps of models on ids of shape (1, T), after one warm-up step each.

    Returns:
        The seconds of each model's steps, and the attention kernel.
    """
    with ExitStack() as undo:
        for run in runs:
            undo.enter_context(applied(run.model, setting))
            run.step(ids[:, -min(timing.warmup or ids.shape[1], ids.shape[1]) :])
        rounds = [[run.step(ids) for run in runs]]
        while len(rounds) < timing.repeats and sum(rounds[-1]) < timing.left():
            rounds.append([run.step(ids) for run in runs])
        return [list(seconds) for seconds in zip(*rounds, strict=True)], attention_kernel(ids.device.type)


def measure(runs: dict[str, Run], name: str, ids: torch.Tensor, timing: Timing) -> list[dict[str, Any]]:
    """Measure a row per method, on ids of shape (1, T), under the setting of a name.

    Returns:
        Rows with ``peak_gib``, and ``steps``, ``seconds`` and ``attention``, or ``error``, one line.
    """
    device, attention, error = ids.device.type, "", ""
    steps: list[list[float]] = [[] for _ in runs]
    gc.collect()  # frees the graph of a step that ran out of memory
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        steps, attention = time_steps(list(runs.values()), StepConfig.named(name), ids, timing)
    except Exception as failure:  # one setting's failure must not lose the others; the command still fails
        error = OUT_OF_MEMORY if out_of_memory(failure) else first_line(failure)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    shared = {"setting": name, "tokens": ids.shape[1], "peak_gib": peak, "date": str(date.today())}
    return [
        {"method": method, **shared}
        | ({"error": error} if error else {"seconds": statistics.median(own), "steps": own, "attention": attention})
        for method, own in zip(runs, steps, strict=True)
    ]


KEY = ("device", "torch", "shape", "layers", "method", "setting", "tokens")


def fill(
    rows: list[dict[str, Any]], shape: dict[str, Any], shared: dict[str, Any], device: str, methods: list[str],
    lengths: list[int], settings: list[str], timing: Timing, out: Path,
) -> None:  # fmt: skip
    """Measure the missing rows, in the order of the command line; write each as soon as it is measured.

    Args:
        rows: existing rows, of any command; new ones are appended.
        shape: entry of ``shapes`` in ``matrix.yml``.
        shared: fields of all new rows, such as the ``rate`` of matrix products.
        device: ``cpu`` or ``cuda``.
        methods: keys of ``METHODS``.
        lengths: of samples, in tokens.
        settings: names, see ``StepConfig.named``.
        timing: of the steps.
        out: file of rows.
    """
    done = {tuple(row.get(key) for key in KEY) for row in rows}
    # On a GPU one model at a time is loaded.
    groups = [methods] if device == "cpu" else [[method] for method in methods]
    shares = [row["share"] for row in rows if "share" in row and row["device"] == shared["device"]]
    share = shares[-1] if shares else DEFAULT_SHARE
    for group in groups:
        runs: dict[str, Run] = {}
        for tokens, name in product(lengths, settings):
            missing = [{**shared, "method": method, "setting": name, "tokens": tokens} for method in group]
            if all(tuple(row[key] for key in KEY) in done for row in missing):
                continue
            useful = training_flop(Shape.of(shape), tokens, answer=ANSWER)
            steps = 1 + min(timing.warmup or tokens, tokens) / tokens
            expected = steps * len(group) * useful / (share * shared["rate"])
            if expected > timing.left():
                print(f"{name}, {tokens} tokens: skipped, it would take about {expected:.0f} s", file=sys.stderr)
                continue
            runs = runs or {method: Run(shape, method, device) for method in group}
            for row in measure(runs, name, sample(tokens, shape["vocab_size"], device), timing):
                if "error" not in row:
                    row["tflop_per_second"] = useful / row["seconds"] / 1e12
                    share = row["share"] = row["tflop_per_second"] * 1e12 / shared["rate"]
                rows.append({**shared, **row})
                print(f"{row['method']}, {name}, {tokens} tokens:", row.get("error") or f"{row['seconds']:.3f} s")
            write_text(out, json.dumps({"rows": rows}, indent=1) + "\n")


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


def check_settings(settings: list[str], device: str, model_type: str) -> None:
    """Raise ValueError if a setting is unknown, its package not installed, or its kernel needs a GPU or a Llama."""
    for setting in map(StepConfig.named, settings):
        if setting.liger and find_spec("liger_kernel") is None:
            raise ValueError("settings: liger: liger_kernel is not installed: pip install liger-kernel")
        if setting.offload and find_spec("axolotl") is None:
            raise ValueError("settings: offload: axolotl is not installed: pip install --no-deps axolotl==0.19.0")
        if device != "cuda" and (setting.liger or setting.backend):
            raise ValueError(f"settings: {'liger' if setting.liger else setting.backend} needs a GPU")
        if setting.liger and model_type != "llama":
            raise ValueError("settings: liger: the shape is not a Llama's")


app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: python -m recipes.bench --methods SEAL-C,LoRA --tokens 2048,4096 --settings full,selective"
)
def bench(
    shape: Annotated[str, typer.Option(help="small, or a shape in recipes/matrix.yml such as llama2_7b.")] = "small",
    layers: Annotated[int | None, typer.Option(help="Number of layers; default: the shape's own.")] = None,
    tokens: Annotated[str, typer.Option(help="Lengths of samples.")] = "2048,4096",
    methods: Annotated[str, typer.Option(help=f"Some of {','.join(METHODS)}; default: all.")] = "",
    settings: Annotated[
        str,
        typer.Option(
            help="The most important first: full, none, selective, everyN, liger, offload, offload_all, "
            f"{', '.join(BACKENDS)}, or several joined by +, such as selective+liger+every2."
        ),
    ] = "none",
    repeats: Annotated[int, typer.Option(help="Timed steps.")] = 5,
    warmup: Annotated[
        int | None, typer.Option(help="Tokens of the warm-up step, at most; default: the sample's.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Skip rows that would end later.")] = float("inf"),
    device: Annotated[Literal["cpu", "cuda", "auto"], typer.Option(help="Where to run.")] = "auto",
    out: Annotated[Path, typer.Option(help="File of rows; existing rows are not measured again.")] = Path(
        "results/bench.json"
    ),
) -> None:
    """Time one tuning step by method, and by how much of its activations a step recomputes."""
    timing = Timing(warmup, repeats, time.perf_counter() + 60 * minutes)
    lengths, chosen = parse_numbers(tokens, "tokens"), parse_names(methods, METHODS, "methods")
    shapes = {"small": SMALL, **read_matrix()["shapes"]}
    if shape not in shapes:
        raise ValueError(f"shape: found {shape!r}, expected one of {', '.join(shapes)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no GPU found: use --device cpu")
    if (shortest := min([*lengths, warmup or lengths[0]])) <= ANSWER:
        raise ValueError(f"tokens: found {shortest}, expected more than the answer's {ANSWER}")
    sizes = shapes[shape] | ({"num_hidden_layers": layers} if layers else {})
    check_settings(split_names(settings), device, sizes["model_type"])
    rows = load_json(out)["rows"] if out.exists() else []
    name = torch.cuda.get_device_name() if device == "cuda" else machine()
    shared = {"device": name, "torch": torch.__version__, "shape": shape, "layers": sizes["num_hidden_layers"],
              "rate": matmul_rate(device)}  # fmt: skip
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, sdpa; matrix products "
          f"{shared['rate'] / 1e12:.2f} TFLOP/s")  # fmt: skip
    fill(rows, sizes, shared, device, chosen, lengths, split_names(settings), timing, out)
    device_rows = [row for row in rows if all(row[key] == shared[key] for key in KEY[:4])]
    if all("error" in row for row in device_rows):
        raise ValueError("nothing was measured: ask for fewer --tokens or more --minutes")
    print_rows(device_rows)
    print(out)
    if failed := [row["setting"] for row in device_rows if row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY]:
        raise ValueError(f"failed: {', '.join(failed)}; remove these rows from {out} to measure them again")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this process, or another."""
    run_app(app, "python -m recipes.bench", arguments)


if __name__ == "__main__":
    main()
