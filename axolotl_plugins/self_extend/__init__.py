"""Self-Extend as a RoPE type; importing this package registers it with Transformers."""

from .attention import register

__all__ = ["register"]

register()


def __getattr__(name: str) -> object:
    """Return ``SelfExtendPlugin``, imported on access because it needs Axolotl."""
    if name == "SelfExtendPlugin":
        from .plugin import SelfExtendPlugin

        return SelfExtendPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
