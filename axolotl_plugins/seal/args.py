"""Schema of the ``seal:`` block of an Axolotl recipe; unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from axolotl_plugins.common.schema import Strict, first_error

from . import Granularity, Placement


class DataArgs(Strict):
    """What to generate into the recipe's dataset file if it does not exist; see ``data_gen.dataset.Request``."""

    task: str = Field(description="A task of `seal data`, such as `line`, or a file that describes one.")
    tokens: int | str | None = Field(
        default=None, description='Longest sample in tokens: N, or "N:M" to draw it uniformly from a range.'
    )
    lines: int | None = Field(default=None, description="Lines of a record, instead of `tokens`.")
    samples: int = Field(default=50, description="Number of samples; the paper uses 50.")
    seed: int = Field(default=0, description="Seed of the data; the recipe's own `seed` is that of training.")
    haystack: str | None = Field(default=None, description="niah: folder of text files, `essays` (hub) or `prose`.")
    needles: str | None = Field(default=None, description="niah: file of training needles; default: the paper's ten.")
    data: str | None = Field(default=None, description="longbench: a local file instead of the hub's.")
    ruler_version: int | None = Field(
        default=None, description="vt, cwe, fwe: 2024 (the paper's) or 2025, as NVIDIA's program was then."
    )


def as_list(value: Any) -> Any:
    """Return a single description or index as a list of length one."""
    return [value] if isinstance(value, dict) or type(value) is int else value


def name_as_list(value: Any) -> Any:
    """Return a single name as a list of length one."""
    return [value] if isinstance(value, str) else value


class SealBlock(Strict):
    """Settings of the adapter and of its training data."""

    granularity: Granularity | None = Field(
        default=None, description="`head` (SEAL-H) or `channel` (SEAL-C); required with `adapter: seal`."
    )
    placements: Annotated[list[Placement], BeforeValidator(name_as_list)] = Field(
        default=["attention_output"], description="What to scale: `attention_output` (the paper), `query`, `value`, "
        "`mlp` (the input of its output projection, per channel only).",
    )  # fmt: skip
    target_modules: list[str] | str | None = Field(
        default=None, description="Attention output projections: name suffixes or one regular expression; "
        "default: detected.",
    )  # fmt: skip
    exclude_modules: list[str] | str | None = Field(
        default=None, description="Modules not to scale: name suffixes or one regular expression."
    )
    layers_to_transform: Annotated[list[int], BeforeValidator(as_list)] | None = Field(
        default=None, description="Decoder layers to scale, as indices from 0; default: all. Former name: `layers`."
    )
    num_heads: int | None = Field(default=None, description="Query heads per layer; default: from the model.")
    context_parallel: int = Field(default=1, ge=1, description="Processes that share each sample, a part of it each.")
    data: Annotated[list[DataArgs], BeforeValidator(as_list)] | None = Field(
        default=None, description="Data to generate if the dataset file does not exist; a list has an entry per file."
    )

    @model_validator(mode="before")
    @classmethod
    def rename_layers(cls, block: Any) -> Any:
        """Accept ``layers``, the former name of ``layers_to_transform``; both together are an unknown key."""
        if isinstance(block, dict) and "layers" in block and "layers_to_transform" not in block:
            return {"layers_to_transform" if key == "layers" else key: value for key, value in block.items()}
        return block

    def adapter_settings(self) -> dict[str, Any]:
        """Return the block's part of the keyword arguments of ``SealConfig``."""
        return self.model_dump(exclude={"context_parallel", "data"})


class SealArgs(BaseModel):
    """Keys that the plugin adds to Axolotl's schema."""

    seal: SealBlock | None = Field(default=None, description="SEAL: learnable scales, on attention outputs by default.")


def parse_block(block: Any) -> SealBlock:
    """Validate a recipe's ``seal:`` block.

    Raises:
        ValueError: a key is unknown or a value invalid; the message is one line.
    """
    try:
        return SealArgs(seal=block).seal or SealBlock()
    except ValidationError as error:
        # Without the index of a single description, and without pydantic's names of a union's types.
        single = isinstance(block, dict) and isinstance(block.get("data"), dict)
        raise ValueError(first_error(error, {"str", "list[str]", *([0] if single else [])})) from None
