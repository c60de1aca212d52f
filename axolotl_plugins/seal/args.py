"""The ``seal:`` block of an Axolotl recipe. A key that is not here is an error."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .config import Granularity


class DataArgs(BaseModel):
    """What to write into the recipe's dataset file when it is missing; see ``data_gen.dataset.Request``."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(description="A task of `python -m data_gen`, such as `line`.")
    tokens: int | str | None = Field(default=None, description='Longest sample: N, or "N:M" to draw it from a range.')
    lines: int | None = Field(default=None, description="Lines of a record, instead of tokens.")
    samples: int = Field(default=50, description="Number of samples; the paper uses 50.")
    seed: int = Field(default=0, description="Seed of the data; that of the training is the recipe's own `seed`.")
    haystack: str | None = Field(default=None, description="niah: folder of text files, `essays` (hub) or `prose`.")
    needles: str | None = Field(default=None, description="niah: training needles; left out, the paper's ten.")
    data: str | None = Field(default=None, description="longbench: a local file instead of the hub's.")


def as_list(data: Any) -> Any:
    """One description stands for a list of one."""
    return [data] if isinstance(data, dict) else data


class SealBlock(BaseModel):
    """Settings of the adapter and of its training data."""

    model_config = ConfigDict(extra="forbid")

    granularity: Granularity | None = Field(default=None, description="`head` (SEAL-H) or `channel` (SEAL-C).")
    target_modules: list[str] | None = Field(default=None, description="Attention outputs; left out, they are found.")
    layers: list[int] | None = Field(default=None, description="Decoder layers to scale; left out, all of them.")
    num_heads: int | None = Field(default=None, description="Query heads per layer; left out, the model's config says.")
    context_parallel: int = Field(default=1, ge=1, description="Processes that share a sample, each a part of it.")
    data: Annotated[list[DataArgs], BeforeValidator(as_list)] | None = Field(
        default=None, description="Makes the dataset file when it is missing; a list: one entry for each file."
    )


class SealArgs(BaseModel):
    """What the plugin adds to Axolotl's schema."""

    seal: SealBlock | None = Field(default=None, description="SEAL: learnable scales on attention outputs.")


def parse_block(block: Any) -> SealBlock:
    """The recipe's ``seal:`` block, checked.

    Raises:
        ValueError: a key or value in it has no meaning; the message is one line.
    """
    try:
        return SealArgs(seal=block).seal or SealBlock()
    except ValidationError as error:
        found = error.errors()[0]
        single = isinstance(block, dict) and isinstance(block.get("data"), dict)
        place = ".".join(str(part) for part in found["loc"] if not (single and part == 0))
        if found["type"] == "extra_forbidden":
            raise ValueError(f"{place}: no such setting; see `python -m axolotl_plugins.seal settings`") from error
        raise ValueError(f"{place}: found {found['input']!r}: {found['msg']}") from error
