"""Axolotl plugin of Self-Extend: ``plugins: [axolotl_plugins.self_extend.SelfExtendPlugin]``."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from axolotl_plugins.common.console import stop

from .attention import NAME


class SelfExtendPlugin(BasePlugin):
    """Enable ``model_config: rope_parameters: rope_type: self_extend`` in a recipe, by being imported."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Raise if a recipe lists the plugin but does not set its RoPE type.

        Raises:
            SystemExit: see above; the message is one line.
        """
        rope = (cfg.get("model_config") or {}).get("rope_parameters") or {}
        if rope.get("rope_type") != NAME:
            error = ValueError(
                f"model_config.rope_parameters.rope_type: found {rope.get('rope_type')!r}, expected {NAME!r} with "
                "rope_theta, group_size and neighbor_window; or remove SelfExtendPlugin"
            )
            stop(error)
