"""Estimate the seconds and memory of tuning from a model's shape, and choose what a step recomputes on a given card.

docs/performance.md derives the formulas and compares them with measurements.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from axolotl_plugins.seal import Placement
from axolotl_plugins.seal.args import parse_block
from data_gen.dataset import Request


class Gpu(NamedTuple):
    """A card, from its maker's data sheet.

    Attributes:
        bfloat16: dense FLOP per second; TF32 runs at half of it on all of these.
        float32: FLOP per second without TF32.
        bandwidth: bytes per second of its memory.
        host: bytes per second to host memory, of PCIe 5.0 or 4.0 in practice.
        gib: its memory.
    """

    bfloat16: float
    float32: float
    bandwidth: float
    host: float
    gib: int


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 2.0e12, 25e9, 80), "h100": Gpu(989e12, 67e12, 3.35e12, 50e9, 80),
    "h200": Gpu(989e12, 67e12, 4.8e12, 50e9, 141), "rtx4090": Gpu(165e12, 82.6e12, 1.01e12, 25e9, 24),
    "l40s": Gpu(362e12, 91.6e12, 0.864e12, 25e9, 48),
}  # fmt: skip
# A card of each usual size in GiB, and the share that a step may take: the rest is lost to the driver and to
# fragmentation.
CARDS, CARD_SHARE = {24: "rtx4090", 48: "l40s", 80: "h100", 141: "h200"}, 0.92
# Shares of the data sheet's rates that a step reaches, fitted to steps on an H200 (results/bench_gpu*.json): of matrix
# products, of attention forward and backward, and of reads and writes of elementwise operations.
LINEAR, FORWARD, BACKWARD, BANDWIDTH = 0.74, 0.605, 0.523, 0.56
# FLOP per second of tuning in float32 on two idle CPU cores with AVX-512: 50 samples of 1,024 tokens, 5.7e11 FLOP each,
# in 5.3 minutes on SmolLM2-135M (November 2026).
CPU_FLOPS = 8.9e10
# GiB of a process on a CPU: the memory that recipes for CPUs must fit into, that of the libraries, and what glibc's
# fragmented heap takes per byte of tensors. SmolLM2-135M took 3.6, 6.1 and 11.0 GiB with 2,048, 4,096 and 7,680 tokens
# where `training_bytes` has 2.2, 3.9 and 7.0; with MALLOC_MMAP_THRESHOLD_=200000, 2.8 and 4.6 with the first two.
CPU_GIB, CPU_LIBRARIES, CPU_HEAP = 16, 0.6, 1.5
# Parts of a setting's name: what recomputed layers store in host memory, and kernels of attention.
OFFLOAD, BACKENDS = {"offload": "inputs", "offload_all": "all"}, ("cudnn", "flash")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that costs depend on.

    Attributes:
        layers: L.
        hidden: d, channels of the residual stream.
        attention: C, channels of all query heads.
        shared: K, channels of all key heads.
        mlp: m, channels between the MLP's projections.
        vocabulary: V.
        tied: whether input and output embeddings share weights.
    """

    layers: int
    hidden: int
    attention: int
    shared: int
    mlp: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Read the shape from a Llama-like ``config.json``."""
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            attention=heads * size,
            shared=(config.get("num_key_value_heads") or heads) * size,
            mlp=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )

    def scaled(self, placements: Iterable[Placement]) -> int:
        """Return the channels of a layer that scales of these placements multiply."""
        width = {"attention_output": self.attention, "query": self.attention, "value": self.shared, "mlp": self.mlp}
        return sum(width[placement] for placement in placements)

    @property
    def linear(self) -> int:
        """Weights of the layers' projections: q and o, k and v, three of the MLP."""
        return self.layers * self.hidden * (2 * self.attention + 2 * self.shared + 3 * self.mlp)

    @property
    def parameters(self) -> int:
        """All weights except those of the norms."""
        return self.linear + self.vocabulary * self.hidden * (1 if self.tied else 2)


def training_flop(shape: Shape, tokens: float, *, answer: int = 40, recompute: bool = False) -> float:
    """Compute the FLOP of one step on one sample of T tokens.

    A projection costs 2 per weight and token forward and as much for the gradient of its input; frozen weights need no
    gradient. Causal attention costs 2 T C per token and layer forward, and 2.5 times that backward, where scores are
    recomputed. Logits are those of the answer.

    Args:
        shape: of the model.
        tokens: T.
        answer: tokens with a loss.
        recompute: whether the backward pass recomputes activations (gradient checkpointing).
    """
    linear = 2 * shape.linear * tokens
    attention = 2 * tokens**2 * shape.attention * shape.layers
    logits = 2 * shape.vocabulary * shape.hidden * answer
    useful = 2 * linear + 3.5 * attention + 2 * logits
    return useful + (linear + attention if recompute else 0)


@dataclass(frozen=True)
class StepConfig:
    """Settings that the seconds and the memory of a step depend on.

    Attributes:
        element: bytes of a number: 2 in bfloat16, 4 in float32.
        tf32: whether float32 is multiplied as TF32.
        quantised: bytes of a weight of the layers' projections; None if they are not quantised.
        recompute: whether activations are recomputed (gradient checkpointing) rather than stored.
        selective: whether recomputed layers store their attention outputs (``selective_checkpointing``).
        every: only every N-th layer is recomputed (``gradient_checkpointing_kwargs: every_n_layers``).
        liger: whether norms, RoPE and SwiGLU are Liger's.
        offload: what recomputed layers store in host memory: nothing, their ``inputs`` (``activation_offloading:
            hidden_states``), or ``all``, the attention outputs as well (``selective_checkpointing: {offload: true}``).
        low_rank: whether LoRA is trained instead of scales.
        placements: what is scaled (``seal: placements``).
        devices: that weights are sharded across (ZeRO-3 or FSDP2).
        context_parallel_size: devices that a sample's tokens are sharded across (``seal: context_parallel``).
        backend: kernel of scaled dot-product attention, one of ``BACKENDS``; None leaves the choice to PyTorch.
    """

    element: int = 2
    tf32: bool = False
    quantised: float | None = None
    recompute: bool = True
    selective: bool = False
    every: int = 1
    liger: bool = False
    offload: str = ""
    low_rank: bool = False
    placements: tuple[Placement, ...] = ("attention_output",)
    devices: int = 1
    context_parallel_size: int = 1
    backend: str | None = None

    @classmethod
    def named(cls, name: str) -> StepConfig:
        """Parse a name: parts joined by ``+``, such as ``selective+liger+every2``; the inverse of ``name``.

        Raises:
            ValueError: a part is unknown, or parts exclude each other.
        """
        parts = set(name.split("+"))
        every = {int(part[5:]) for part in parts if re.fullmatch(r"every[1-9]\d*", part)}
        valid = {"full", "none", "selective", "liger", *OFFLOAD, *BACKENDS, *(f"every{n}" for n in every)}
        if unknown := parts - valid:
            raise ValueError(f"settings: found {min(unknown)!r}, expected full, none, selective, everyN, liger, "
                             f"{', '.join([*OFFLOAD, *BACKENDS])} or several joined by +")  # fmt: skip
        offload, backend = ([part for part in names if part in parts] for names in (OFFLOAD, BACKENDS))
        recomputed = bool(parts & {"full", "selective"} or every or offload)
        several = max(len(every), len(backend), len(offload)) > 1
        if several or ("none" in parts and recomputed) or ("full" in parts and every):
            raise ValueError(f"settings: the parts of {name!r} exclude each other")
        if "offload_all" in parts and "selective" not in parts:
            raise ValueError("settings: offload_all stores attention outputs: add +selective, or take offload")
        return cls(recompute="none" not in parts, selective="selective" in parts, every=max(every, default=1),
                   liger="liger" in parts, offload="".join(OFFLOAD[part] for part in offload),
                   backend=next(iter(backend), None))  # fmt: skip

    @classmethod
    def of(cls, settings: dict[str, Any]) -> StepConfig:
        """Read a recipe's settings, for a device that holds all weights."""
        selective, block = settings.get("selective_checkpointing"), parse_block(settings.get("seal"))
        offload = "inputs" if settings.get("activation_offloading") == "hidden_states" else ""
        if offload and isinstance(selective, dict) and selective.get("offload"):
            offload = "all"
        return cls(
            element=2 if any(settings.get(dtype) for dtype in ("bf16", "bfloat16", "fp16", "float16")) else 4,
            tf32=settings.get("tf32") is True,
            quantised=0.5 if settings.get("load_in_4bit") else 1.0 if settings.get("load_in_8bit") else None,
            recompute=bool(settings.get("gradient_checkpointing")),
            selective=bool(selective),
            every=(settings.get("gradient_checkpointing_kwargs") or {}).get("every_n_layers", 1),
            liger=bool(settings.get("liger_glu_activation")),
            offload=offload,
            low_rank=settings.get("adapter") in ("lora", "qlora"),
            placements=tuple(block.placements),
            context_parallel_size=block.context_parallel,
        )

    @property
    def name(self) -> str:
        """Name of what is recomputed, as ``recipes.bench --settings`` has it."""
        parts = {"none": not self.recompute, "selective": self.selective, "liger": self.liger,
                 f"every{self.every}": self.every > 1, **{part: self.offload == kept for part, kept in OFFLOAD.items()},
                 f"{self.backend}": self.backend is not None}  # fmt: skip
        return "+".join(part for part, used in parts.items() if used) or "full"

    def recomputed(self, layers: int) -> list[bool]:
        """Return for each layer whether it is recomputed."""
        return [self.recompute and layer % self.every == 0 for layer in range(layers)]


def layer_bytes(shape: Shape, step: StepConfig, recomputed: bool) -> float:
    """Return the bytes per token that a layer stores on the device from its forward to its backward pass.

    A recomputed layer stores its input, and its attention output under selective checkpointing. Any other stores the
    inputs of its norms (in 16 bits twice, as they compute in float32), queries, keys, values and attention output, and
    three products of its MLP; Liger's norms store their input once, its SwiGLU two products. Each of LoRA's four
    projections stores its input in float32; where that is its dtype, three share one. What is scaled is stored too, but
    for the attention output, which attention stores.
    """
    if recomputed:
        kept = 0 if step.offload else shape.hidden
        return step.element * (kept + (shape.attention if step.selective and step.offload != "all" else 0))
    norms = (4 if step.element == 2 and not step.liger else 2) * shape.hidden
    mlp = (2 if step.liger else 3) * shape.mlp
    low_rank = (8 if step.element == 2 else 1) * shape.hidden if step.low_rank else 0
    scaled = 0 if step.low_rank else shape.scaled(part for part in step.placements if part != "attention_output")
    return step.element * (norms + 2 * shape.attention + 2 * shape.shared + mlp + low_rank + scaled)


def training_bytes(shape: Shape, tokens: int, *, answer: int = 40, step: StepConfig = StepConfig()) -> float:
    """Compute the peak memory in bytes of one step on one device, with attention in linear memory.

    It is the sum of the weights, what the layers store, the working set of the layer in its backward pass, which a
    recomputed layer stores again, and temporaries: one tensor of each kind, and two gradients in the MLP. Layers above
    that layer have freed theirs. Two layers' inputs are on the device where inputs are in host memory. Where weights
    are sharded, a device also gathers one layer; where tokens are, all keys and values of one layer, their gradients,
    and those of a part of its queries.

    Args:
        shape: of the model.
        tokens: T.
        answer: tokens with a loss.
        step: settings of the step.
    """
    element = step.element
    embeddings = element * (shape.parameters - shape.linear)
    weights = ((step.quantised or element) * shape.linear + embeddings) / step.devices
    working = layer_bytes(shape, step, False)
    stored = peak = 0.0
    for recomputed in step.recomputed(shape.layers):
        stored += layer_bytes(shape, step, recomputed)
        peak = max(peak, stored + (working if recomputed else 0))
    peak += element * (shape.hidden + shape.attention + shape.shared + 2 * shape.mlp)
    if step.offload:
        peak += 2 * element * shape.hidden
    gathered = element * shape.linear / shape.layers if step.devices > 1 else 0.0
    gathered += element * 6 * tokens * shape.shared if step.context_parallel_size > 1 else 0.0
    return weights + tokens / step.context_parallel_size * peak + gathered + 12 * answer * shape.vocabulary


def host_bytes(shape: Shape, tokens: float, step: StepConfig) -> float:
    """Return the bytes of activations that one step stores in host memory."""
    sizes = {"": 0, "inputs": shape.hidden, "all": shape.hidden + shape.attention}
    return tokens * step.element * sizes[step.offload] * sum(step.recomputed(shape.layers))


def moved_bytes(shape: Shape, step: StepConfig) -> tuple[float, float]:
    """Return the bytes per token that a layer's elementwise operations read and write, forward and backward.

    They were counted on one layer in bfloat16 with and without Liger, those of LoRA fitted to its measured steps.
    """
    d, heads, m = shape.hidden, shape.attention + shape.shared, shape.mlp
    forward, backward = (
        (20 * d + 4 * heads + 6 * m, 42 * d + 4 * heads + 10 * m) if step.liger
        else (84 * d + 20 * heads + 10 * m, 198 * d + 32 * heads + 18 * m)
    )  # fmt: skip
    scaled = shape.scaled(step.placements)
    scale = (120 * d, 180 * d) if step.low_rank else (12 * scaled, 32 * scaled)
    return (forward + scale[0]) * step.element / 2, (backward + scale[1]) * step.element / 2


def step_seconds(shape: Shape, tokens: float, step: StepConfig, gpu: str = "h200") -> float:
    """Compute the seconds of one step on one sample of T tokens, logits and communication left out.

    Backprop ends at the first layer's scale. Recomputation leaves out a layer's last projection, whose output nothing
    needs, and attention under selective checkpointing. Copies to and from host memory are counted as if nothing ran
    beside them. A quantised base is taken for one in bfloat16.
    """
    card = GPUS[gpu]
    peak = card.bfloat16 if step.element == 2 else card.bfloat16 / 2 if step.tf32 else card.float32
    linear = 2 * tokens * shape.linear / shape.layers / (peak * LINEAR)
    attention = 2 * tokens**2 * shape.attention / peak
    forward, backward = (tokens * moved / (card.bandwidth * BANDWIDTH) for moved in moved_bytes(shape, step))
    products = shape.linear / shape.layers / shape.hidden  # weights of a layer, in d
    below = (shape.attention + 2 * shape.shared) / products  # the first layer's queries, keys and values
    total = shape.layers * (2 * linear + forward + backward + attention / FORWARD)
    total += (shape.layers - 1) * 2.5 * attention / BACKWARD - below * (linear + backward)
    again = linear * (1 - shape.mlp / products) + forward + (0 if step.selective else attention / FORWARD)
    total += sum(step.recomputed(shape.layers)) * again + 2 * host_bytes(shape, tokens, step) / card.host
    return total / step.context_parallel_size


def choices(step: StepConfig) -> Iterator[StepConfig]:
    """Yield the settings that ``fastest`` chooses from; LoRA's every layer is recomputed."""
    if not step.low_rank:
        yield replace(step, recompute=False, selective=False, every=1, offload="")
    for selective, every, offload in product((True, False), range(1, 2 if step.low_rank else 9), ("", "inputs", "all")):
        if selective or offload != "all":
            yield replace(step, recompute=True, selective=selective, every=every, offload=offload)


def fastest(shape: Shape, tokens: int, gib: float, step: StepConfig, gpu: str = "h200") -> StepConfig:
    """Choose the fastest setting that fits a card, the one that copies and takes the least if several are.

    The base is quantised to 8 bits only if nothing fits otherwise.

    Args:
        shape: of the model.
        tokens: of the longest sample.
        gib: the card's memory.
        step: dtype, method and kernels; what it recomputes does not matter.
        gpu: the card, a key of ``GPUS``.

    Raises:
        ValueError: nothing fits.
    """
    for quantised in dict.fromkeys((step.quantised, step.quantised or 1.0)):
        options = {choice: training_bytes(shape, tokens, step=choice)
                   for choice in choices(replace(step, quantised=quantised))}  # fmt: skip
        if fitting := [choice for choice, size in options.items() if size <= CARD_SHARE * gib * 2**30]:
            return min(fitting, key=lambda choice: (step_seconds(shape, tokens, choice, gpu), len(choice.offload),
                                                    options[choice]))  # fmt: skip
    raise ValueError(
        f"card: a sample of {tokens} tokens takes at least {min(options.values()) / 2**30:.0f} GiB even with the base "
        f"in 8 bits, more than {CARD_SHARE:.0%} of {gib:g}: take a larger card or shorter samples"
    )


def longest_sample(shape: Shape, gib: float, step: StepConfig) -> int:
    """Return the longest sample in tokens whose step fits into ``gib``, 0 if none does; memory is linear in tokens."""
    fixed, with_1000 = (training_bytes(shape, tokens, step=step) for tokens in (0, 1000))
    return max(0, int((gib * 2**30 - fixed) / (with_1000 - fixed) * 1000))


def cpu_gib(tensors: float) -> float:
    """Return the GiB of a process on a CPU that holds ``tensors`` bytes of tensors."""
    return CPU_LIBRARIES + CPU_HEAP * tensors / 2**30


@dataclass(frozen=True)
class Cost:
    """Memory and work of a recipe.

    Attributes:
        shape: of its model.
        step: settings of a step.
        steps: number of steps and tokens of a sample.
        tokens: of its longest sample.
    """

    shape: Shape
    step: StepConfig
    steps: tuple[tuple[float, float], ...]
    tokens: int

    @property
    def flop(self) -> float:
        """Useful work of all steps."""
        return sum(number * training_flop(self.shape, tokens) for number, tokens in self.steps)

    @property
    def gib(self) -> float:
        """Peak memory of a device in GiB."""
        return training_bytes(self.shape, self.tokens, step=self.step) / 2**30

    @property
    def cpu_gib(self) -> float:
        """Peak memory in GiB of the process on a CPU."""
        return cpu_gib(self.gib * 2**30)

    @property
    def cpu_minutes(self) -> int:
        """Minutes on two CPU cores at ``CPU_FLOPS``, at least 1."""
        recompute = self.step.recompute
        flop = sum(n * training_flop(self.shape, tokens, recompute=recompute) for n, tokens in self.steps)
        return max(1, round(flop / CPU_FLOPS / 60))

    def seconds(self, gpu: str) -> float:
        """Return the seconds of all steps on one of ``GPUS``, or on as many as share a sample."""
        return sum(number * step_seconds(self.shape, tokens, self.step, gpu) for number, tokens in self.steps)


def recipe_cost(settings: dict[str, Any], shape: Shape, lengths: Sequence[int] = ()) -> Cost:
    """Estimate a recipe's cost on one device, or with context parallelism on each.

    Args:
        settings: the recipe; its ``seal: data:`` declares number and lengths of samples.
        shape: of its model.
        lengths: of its samples in tokens, if it does not describe them.

    Raises:
        ValueError: the recipe does not describe its data in tokens.
    """
    from axolotl_plugins.seal.args import parse_block

    if lengths:
        epochs = settings.get("num_epochs", 1)
        return Cost(shape, StepConfig.of(settings), tuple((epochs, tokens) for tokens in lengths), max(lengths))
    block = parse_block(settings.get("seal"))
    if not block.data:
        raise ValueError("neither describes its data (`seal: data:`) nor names a local JSON lines file of chats")
    steps, longest = [], 0
    for data in block.data:
        if data.tokens is None:
            raise ValueError("seal.data counts lines, expected tokens")
        low, high = Request(data.task, data.tokens).token_range()
        longest = max(longest, high)
        samples = data.samples * settings.get("num_epochs", 1)
        # Simpson's rule: exact for lengths drawn uniformly, as work is quadratic in them.
        steps += [(samples * weight / 6, tokens) for tokens, weight in ((low, 1), ((low + high) / 2, 4), (high, 1))]
    return Cost(shape, StepConfig.of(settings), tuple(steps), longest)
