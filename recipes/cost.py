"""What tuning costs in FLOP and memory, from a model's shape alone; docs/speed.md has the formulas checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_gen.generate import Request

# Dense bf16 FLOP per second, and GiB, as the makers print them.
GPUS = {
    "a100": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141), "rtx4090": (165e12, 24), "l40s": (362e12, 48),
}  # fmt: skip
# Share of that peak which tuning reached: the paper's own 40 minutes on an A100 come to 11 %; half is what a good
# attention kernel reaches at these lengths.
PAPER_SHARE, GOOD_SHARE = 0.11, 0.5


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


def training_flop(shape: Shape, tokens: int, *, answer: int = 40, recompute: bool = False) -> float:
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


def training_bytes(shape: Shape, tokens: int, *, answer: int = 40, recompute: bool = True) -> float:
    """Peak memory of one step in bfloat16 with attention in linear memory; not checked on a GPU yet.

    Weights; what enters every layer, 2 T d each; and the working set of a layer: its inputs and outputs, queries,
    keys, values, attention output, and the MLP's products with their gradients, half of which are kept for every
    layer where activations are not formed again.
    """
    boundaries = 2 * tokens * shape.hidden * shape.layers
    one_layer = 2 * tokens * (6 * shape.hidden + 4 * shape.attention + 4 * shape.shared + 6 * shape.mlp)
    logits = 12 * answer * shape.vocabulary
    kept = 0.0 if recompute else one_layer / 2 * (shape.layers - 1)
    return 2 * shape.parameters + boundaries + one_layer + kept + logits


@dataclass(frozen=True)
class Cost:
    """What a recipe costs.

    Attributes:
        flop: useful work of all steps.
        tokens: of its longest sample.
        bytes: peak memory.
        recompute: whether activations are formed again, which ``flop`` does not count.
    """

    flop: float
    tokens: int
    bytes: float
    recompute: bool

    @property
    def gib(self) -> float:
        """Peak memory in GiB."""
        return self.bytes / 2**30

    def minutes(self, gpu: str) -> tuple[float, float]:
        """Minutes on one of ``GPUS``: at ``GOOD_SHARE`` of its peak, and at ``PAPER_SHARE``."""
        peak = GPUS[gpu][0]
        return self.flop / (peak * GOOD_SHARE) / 60, self.flop / (peak * PAPER_SHARE) / 60


def recipe_cost(settings: dict[str, Any], shape: Shape) -> Cost:
    """What a recipe costs on one device, from shapes alone; what LoRA adds is not counted.

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
    recompute = bool(settings.get("gradient_checkpointing"))
    flop, longest = 0.0, 0
    for data in block.data:
        if data.tokens is None:
            raise ValueError("seal.data counts lines, expected tokens")
        low, high = Request(data.task, data.tokens).token_range()
        longest = max(longest, high)
        steps = data.samples * settings.get("num_epochs", 1)
        flop += steps * sum(training_flop(shape, n) for n in (low, (low + high) // 2, high)) / 3
    return Cost(flop, longest, training_bytes(shape, longest, recompute=recompute), recompute)
