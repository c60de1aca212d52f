"""What tuning costs in FLOP and memory, from a model's shape alone; docs/performance.md has the formulas checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_gen.dataset import Request

# Dense FLOP per second in bfloat16 and in plain float32, and GiB, as the makers print them; TF32 runs at half of
# bfloat16's rate on all of them.
GPUS = {
    "a100": (312e12, 19.5e12, 80), "h100": (989e12, 67e12, 80), "h200": (989e12, 67e12, 141),
    "rtx4090": (165e12, 82.6e12, 24), "l40s": (362e12, 91.6e12, 48),
}  # fmt: skip
# Share of that peak which tuning reached: the paper's own 40 minutes on an A100 come to 11 %; half is what a good
# attention kernel reaches at these lengths.
PAPER_SHARE, GOOD_SHARE = 0.11, 0.5
# GiB of common cards, and how much of it a step may take: the rest is the driver's and what fragments.
CARDS, CARD_SHARE = (24, 48, 80), 0.92
# FLOP per second of tuning in float32 on two idle CPU cores with AVX-512: 50 samples of 1,024 tokens, 5.7e11 FLOP each,
# in 5.3 minutes on SmolLM2-135M (November 2026).
CPU_FLOPS = 8.9e10
# GiB of a process on a CPU: the memory that recipes for CPUs must fit into, that of the libraries, and what glibc's
# fragmented heap takes per byte of tensors. SmolLM2-135M took 3.6, 6.1 and 11.0 GiB with 2,048, 4,096 and 7,680 tokens
# where `training_bytes` has 2.2, 3.9 and 7.0; with MALLOC_MMAP_THRESHOLD_=200000, 2.8 and 4.6 with the first two.
CPU_GIB, CPU_LIBRARIES, CPU_HEAP = 16, 0.6, 1.5


@dataclass(frozen=True)
class Shape:
    """What of a config costs depend on.

    Attributes:
        layers: L.
        hidden: d, channels of the residual stream.
        attention: C, channels of all query heads.
        shared: channels of all key heads.
        mlp: channels between the MLP's projections.
        vocabulary: V.
        tied: whether input and output embeddings are one.
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
        """The shape of a Llama-like ``config.json``."""
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

    @property
    def linear(self) -> int:
        """Weights of the layers' projections: q and o, k and v, three of the MLP."""
        return self.layers * self.hidden * (2 * self.attention + 2 * self.shared + 3 * self.mlp)

    @property
    def parameters(self) -> int:
        """All weights but the norms'."""
        return self.linear + self.vocabulary * self.hidden * (1 if self.tied else 2)


def training_flop(shape: Shape, tokens: float, *, answer: int = 40, recompute: bool = False) -> float:
    """FLOP of one step on one sample of T tokens.

    A projection costs 2 per weight and token forward and as much for the gradient of its input; frozen weights have
    none of their own. Causal attention costs 2 T C per token and layer forward, and 2.5 times that backward, scores
    being formed again. Logits are those of the answer.

    Args:
        shape: of the model.
        tokens: T.
        answer: tokens with a loss.
        recompute: activations are formed again in the backward pass (gradient checkpointing).
    """
    linear = 2 * shape.linear * tokens
    attention = 2 * tokens**2 * shape.attention * shape.layers
    logits = 2 * shape.vocabulary * shape.hidden * answer
    useful = 2 * linear + 3.5 * attention + 2 * logits
    return useful + (linear + attention if recompute else 0)


@dataclass(frozen=True)
class MemoryConfig:
    """How a step holds what it needs in memory.

    Attributes:
        element: bytes of a number: 2 in bfloat16, 4 in float32.
        quantised: bytes of a weight of the layers' projections where they are quantised.
        recompute: activations are formed again (gradient checkpointing), else every layer's are kept.
        offload: what enters a layer waits in host memory (``activation_offloading: hidden_states``).
        devices: that weights are spread over (ZeRO-3 or FSDP2).
        context_parallel_size: devices that a sample's tokens are spread over (``seal: context_parallel``).
    """

    element: int = 2
    quantised: float | None = None
    recompute: bool = True
    offload: bool = False
    devices: int = 1
    context_parallel_size: int = 1

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> MemoryConfig:
        """What a recipe's settings come to on a device that holds all weights."""
        element = 2 if any(recipe.get(kind) for kind in ("bf16", "bfloat16", "fp16", "float16")) else 4
        quantised = 0.5 if recipe.get("load_in_4bit") else 1.0 if recipe.get("load_in_8bit") else None
        offload = recipe.get("activation_offloading") == "hidden_states"
        context_parallel_size = (recipe.get("seal") or {}).get("context_parallel", 1)
        return cls(
            element,
            quantised,
            bool(recipe.get("gradient_checkpointing")),
            offload,
            context_parallel_size=context_parallel_size,
        )


def training_bytes(shape: Shape, tokens: int, *, answer: int = 40, held: MemoryConfig = MemoryConfig()) -> float:
    """Peak memory of one step on one device with attention in linear memory.

    Weights; what enters every layer, d each (two layers' alone where it waits in host memory); and the working set of a
    layer. For its backward pass it keeps what enters its norms (in 16 bits twice, as they work in float32), queries,
    keys, values and attention output, and three products of its MLP; what comes and goes beside is one of each, and two
    gradients in the MLP. Where weights are spread, each device also holds one layer's whole; where tokens are, all keys
    and values of one layer, their gradients, and those of a part of its queries.

    Args:
        shape: of the model.
        tokens: T.
        answer: tokens with a loss.
        held: how it is held.
    """
    element = held.element
    share = tokens / held.context_parallel_size
    embeddings = element * (shape.parameters - shape.linear)
    weights = ((held.quantised or element) * shape.linear + embeddings) / held.devices
    norms = (4 if element == 2 else 2) * shape.hidden
    kept = share * element * (norms + 2 * shape.attention + 2 * shape.shared + 3 * shape.mlp)
    passing = share * element * (shape.hidden + shape.attention + shape.shared + 2 * shape.mlp)
    boundaries = share * element * shape.hidden * (2 if held.offload else shape.layers)
    activations = boundaries + kept if held.recompute else shape.layers * kept
    gathered = element * shape.linear / shape.layers if held.devices > 1 else 0.0
    gathered += element * 6 * tokens * shape.shared if held.context_parallel_size > 1 else 0.0
    return weights + activations + passing + gathered + 12 * answer * shape.vocabulary


def longest_sample(shape: Shape, gib: float, held: MemoryConfig) -> int:
    """Most tokens of a sample whose step fits into so much memory; memory is linear in them, 0 if none fit."""
    fixed, one = training_bytes(shape, 0, held=held), training_bytes(shape, 1000, held=held)
    return max(0, int((gib * 2**30 - fixed) / (one - fixed) * 1000))


def needs_checkpointing(shape: Shape, tokens: int) -> bool:
    """Return whether a step in float32 fits into ``CPU_GIB`` only if activations are recomputed."""
    return cpu_gib(training_bytes(shape, tokens, held=MemoryConfig(element=4, recompute=False))) > CPU_GIB


def cpu_gib(tensors: float) -> float:
    """Return the GiB of a process on a CPU that holds so many bytes of tensors."""
    return CPU_LIBRARIES + CPU_HEAP * tensors / 2**30


@dataclass(frozen=True)
class Cost:
    """What a recipe costs.

    Attributes:
        flop: useful work of all steps.
        executed: the same with activations that are recomputed.
        tokens: of its longest sample.
        bytes: peak memory.
        held: how.
        tf32: whether float32 is multiplied as TF32.
    """

    flop: float
    executed: float
    tokens: int
    bytes: float
    held: MemoryConfig
    tf32: bool = False

    @property
    def gib(self) -> float:
        """Peak memory in GiB."""
        return self.bytes / 2**30

    @property
    def cpu_gib(self) -> float:
        """Peak memory in GiB of the process on a CPU."""
        return cpu_gib(self.bytes)

    @property
    def cpu_minutes(self) -> int:
        """Minutes on two CPU cores at ``CPU_FLOPS``, at least 1."""
        return max(1, round(self.executed / CPU_FLOPS / 60))

    def minutes(self, gpu: str) -> tuple[float, float]:
        """Minutes on one of ``GPUS``: at ``GOOD_SHARE`` of its peak, and at ``PAPER_SHARE``.

        Where devices share samples it is as many of them; what they say to each other is not counted.
        """
        half, plain, _ = GPUS[gpu]
        peak = half if self.held.element == 2 else half / 2 if self.tf32 else plain
        each = self.flop / self.held.context_parallel_size
        return each / (peak * GOOD_SHARE) / 60, each / (peak * PAPER_SHARE) / 60


def recipe_cost(settings: dict[str, Any], shape: Shape) -> Cost:
    """What a recipe costs on one device, or as many as share a sample, from shapes alone; LoRA's own is not counted.

    Args:
        settings: the recipe; its ``seal: data:`` says how many samples of what length there are.
        shape: of its model.

    Raises:
        ValueError: the recipe does not describe its data in tokens.
    """
    from axolotl_plugins.seal.args import parse_block

    block = parse_block(settings.get("seal"))
    if not block.data:
        raise ValueError("does not describe its data (`seal: data:`), so its length is not known")
    held = MemoryConfig.of(settings)
    flop, executed, longest = 0.0, 0.0, 0
    for data in block.data:
        if data.tokens is None:
            raise ValueError("seal.data counts lines, expected tokens")
        low, high = Request(data.task, data.tokens).token_range()
        longest = max(longest, high)
        steps = data.samples * settings.get("num_epochs", 1)
        # Simpson's rule: exact for lengths drawn uniformly, as work is quadratic in them.
        for tokens, weight in ((low, 1), ((low + high) / 2, 4), (high, 1)):
            flop += steps * training_flop(shape, tokens) * weight / 6
            executed += steps * training_flop(shape, tokens, recompute=held.recompute) * weight / 6
    return Cost(flop, executed, longest, training_bytes(shape, longest, held=held), held, settings.get("tf32") is True)
