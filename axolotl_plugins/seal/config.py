"""What a SEAL adapter is: which attention outputs it scales, and how finely."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import PeftConfig
from peft.utils.peft_types import PeftType

Granularity = Literal["head", "channel"]


def peft_type() -> PeftType:
    """The member ``SEAL`` of PEFT's enumeration of methods, added on first use (PEFT offers no way to add one)."""
    if "SEAL" not in PeftType.__members__:
        member = str.__new__(PeftType, "SEAL")
        member._name_, member._value_ = "SEAL", "SEAL"
        type.__setattr__(PeftType, "SEAL", member)
        PeftType._member_map_["SEAL"] = member
        PeftType._member_names_.append("SEAL")
        PeftType._value2member_map_["SEAL"] = member
    return PeftType("SEAL")


@dataclass
class SealConfig(PeftConfig):
    """Configuration of SEAL (arXiv 2501.15225, section 4.2).

    Attributes:
        granularity: ``"head"`` learns one scalar per query head (SEAL-H), ``"channel"`` one per channel of the
            concatenated heads (SEAL-C).
        target_modules: name endings of the attention output projections, whose *input* is scaled; ``None`` finds them.
        layers: indices of the decoder layers to scale; ``None`` means all.
        num_heads: query heads per layer; ``None`` reads it from the model's config.

    Raises:
        ValueError: a field has no meaning.
    """

    granularity: Granularity = field(default="channel", metadata={"help": "`head` (SEAL-H) or `channel` (SEAL-C)."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Name endings of the attention output projections; None finds them."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Decoder layers to scale; None means all."})
    num_heads: int | None = field(default=None, metadata={"help": "Query heads per layer; None reads the config."})

    def __post_init__(self) -> None:
        """Check the fields and normalise their types."""
        super().__post_init__()
        self.peft_type = peft_type()
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity: found {self.granularity!r}, expected 'head' (SEAL-H) or 'channel' (SEAL-C)")
        if isinstance(self.target_modules, str):
            raise ValueError(f"target_modules: found the string {self.target_modules!r}, expected a list of names")
        if self.target_modules is not None:
            self.target_modules = sorted(self.target_modules)
        if self.layers is not None:
            if not self.layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.layers):
                raise ValueError(f"layers: found {self.layers!r}, expected a non-empty list of indices from 0, or None")
            self.layers = sorted(set(self.layers))
