"""Estimate the FLOP and memory of tuning from a model's shape alone; docs/performance.md compares with measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_gen.dataset import Request

# Dense FLOP per second in bfloat16 and in plain float32, and GiB, from the makers' data sheets; TF32 runs at half of
# bfloat16's rate on all of them.
GPUS = {
    "a100": (312e12, 19.5e12, 80), "h100": (989e12, 67e12, 80), "h200": (989e12, 67e12, 141),
    "rtx4090": (165e12, 82.6e12, 24), "l40s": (362e12, 91.6e12, 48),
}  # fmt: skip
# Share of that peak that tuning reaches: the paper's own 40 minutes on an A100 come to 11 %; good attention kernels
# reach half at these lengths (an H200 measured 38 to 58 %).
PAPER_SHARE, GOOD_SHARE = 0.11, 0.5
# GiB of common cards, and the share that a step may take: the rest is lost to the driver and to fragmentation.
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
class MemoryConfig:
    """Settings that the memory of a step depends on.

    Attributes:
        element: bytes of a number: 2 in bfloat16, 4 in float32.
        quantised: bytes of a weight of the layers' projections; None if they are not quantised.
        recompute: whether activations are recomputed (gradient checkpointing) rather than stored in every layer.
        offload: whether layer inputs are stored in host memory (``activation_offloading: hidden_states``).
        devices: that weights are sharded across (ZeRO-3 or FSDP2).
        context_parallel_size: devices that a sample's tokens are sharded across (``seal: context_parallel``).
    """

    element: int = 2
    quantised: float | None = None
    recompute: bool = True
    offload: bool = False
    devices: int = 1
    context_parallel_size: int = 1

    @classmethod
    def of(cls, settings: dict[str, Any]) -> MemoryConfig:
        """Read a recipe's settings, for a device that holds all weights."""
        return cls(
            element=2 if any(settings.get(dtype) for dtype in ("bf16", "bfloat16", "fp16", "float16")) else 4,
            quantised=0.5 if settings.get("load_in_4bit") else 1.0 if settings.get("load_in_8bit") else None,
            recompute=bool(settings.get("gradient_checkpointing")),
            offload=settings.get("activation_offloading") == "hidden_states",
            context_parallel_size=(settings.get("seal") or {}).get("context_parallel", 1),
        )


def training_bytes(shape: Shape, tokens: int, *, answer: int = 40, memory: MemoryConfig = MemoryConfig()) -> float:
    """Compute the peak memory in bytes of one step on one device, with attention in linear memory.

    It is the sum of the weights, the input of every layer, d each (only two layers' where they are offloaded), and the
    working set of one layer. For its backward pass a layer stores the inputs of its norms (in 16 bits twice, as they
    compute in float32), queries, keys, values and attention output, and three products of its MLP; temporaries are one
    tensor of each kind, and two gradients in the MLP. Where weights are sharded, a device also gathers one layer; where
    tokens are, all keys and values of one layer, their gradients, and those of a part of its queries.

    Args:
        shape: of the model.
        tokens: T.
        answer: tokens with a loss.
        memory: settings of the step.
    """
    element = memory.element
    tokens_here = tokens / memory.context_parallel_size
    embeddings = element * (shape.parameters - shape.linear)
    weights = ((memory.quantised or element) * shape.linear + embeddings) / memory.devices
    norms = (4 if element == 2 else 2) * shape.hidden
    stored = tokens_here * element * (norms + 2 * shape.attention + 2 * shape.shared + 3 * shape.mlp)
    temporary = tokens_here * element * (shape.hidden + shape.attention + shape.shared + 2 * shape.mlp)
    layer_inputs = tokens_here * element * shape.hidden * (2 if memory.offload else shape.layers)
    activations = layer_inputs + stored if memory.recompute else shape.layers * stored
    gathered = element * shape.linear / shape.layers if memory.devices > 1 else 0.0
    gathered += element * 6 * tokens * shape.shared if memory.context_parallel_size > 1 else 0.0
    return weights + activations + temporary + gathered + 12 * answer * shape.vocabulary


def longest_sample(shape: Shape, gib: float, memory: MemoryConfig) -> int:
    """Return the longest sample in tokens whose step fits into ``gib``, 0 if none does; memory is linear in tokens."""
    fixed, with_1000 = (training_bytes(shape, tokens, memory=memory) for tokens in (0, 1000))
    return max(0, int((gib * 2**30 - fixed) / (with_1000 - fixed) * 1000))


def needs_checkpointing(shape: Shape, tokens: int) -> bool:
    """Return whether a step in float32 fits into ``CPU_GIB`` only if activations are recomputed."""
    return cpu_gib(training_bytes(shape, tokens, memory=MemoryConfig(element=4, recompute=False))) > CPU_GIB


def cpu_gib(tensors: float) -> float:
    """Return the GiB of a process on a CPU that holds ``tensors`` bytes of tensors."""
    return CPU_LIBRARIES + CPU_HEAP * tensors / 2**30


@dataclass(frozen=True)
class Cost:
    """Memory and work of a recipe.

    Attributes:
        flop: useful work of all steps.
        executed: the same with recomputed activations.
        tokens: of its longest sample.
        bytes: peak memory.
        memory: settings that the peak depends on.
        tf32: whether float32 is multiplied as TF32.
    """

    flop: float
    executed: float
    tokens: int
    bytes: float
    memory: MemoryConfig
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
        """Return the minutes on one of ``GPUS``: at ``GOOD_SHARE`` of its peak, and at ``PAPER_SHARE``.

        Context parallelism uses several of them; communication between them is not counted.
        """
        half, plain, _ = GPUS[gpu]
        peak = half if self.memory.element == 2 else half / 2 if self.tf32 else plain
        flop = self.flop / self.memory.context_parallel_size
        return flop / (peak * GOOD_SHARE) / 60, flop / (peak * PAPER_SHARE) / 60


def recipe_cost(settings: dict[str, Any], shape: Shape) -> Cost:
    """Estimate a recipe's cost on one device, or with context parallelism on each; LoRA's own work is not counted.

    Args:
        settings: the recipe; its ``seal: data:`` declares number and lengths of samples.
        shape: of its model.

    Raises:
        ValueError: the recipe does not describe its data in tokens.
    """
    from axolotl_plugins.seal.args import parse_block

    block = parse_block(settings.get("seal"))
    if not block.data:
        raise ValueError("does not describe its data (`seal: data:`), so its length is unknown")
    memory = MemoryConfig.of(settings)
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
            executed += steps * training_flop(shape, tokens, recompute=memory.recompute) * weight / 6
    peak = training_bytes(shape, longest, memory=memory)
    return Cost(flop, executed, longest, peak, memory, settings.get("tf32") is True)
