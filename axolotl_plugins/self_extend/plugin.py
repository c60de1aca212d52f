"""Axolotl's side of Self-Extend: ``plugins: [axolotl_plugins.self_extend.SelfExtendPlugin]``."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from axolotl_plugins.common.console import stop

from .attention import NAME


class SelfExtendPlugin(BasePlugin):
    """Makes ``model_config: rope_parameters: rope_type: self_extend`` work in a recipe; importing it is what does."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Refuse recipes that name the plugin and would run without it.

        Raises:
            SystemExit: with one line that says what is wrong.
        """
        rope = (cfg.get("model_config") or {}).get("rope_parameters") or {}
        if rope.get("rope_type") != NAME:
            error = ValueError(
                f"model_config.rope_parameters.rope_type: found {rope.get('rope_type')!r}, expected {NAME!r} with "
                "rope_theta, group_size and neighbor_window, or else no SelfExtendPlugin"
            )
            stop(NAME, error)
