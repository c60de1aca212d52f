"""Metrics by task; each is defined in its task's module in ``data_gen/tasks``."""

from __future__ import annotations

from data_gen.tasks import TaskAttribute

# task -> score of a response in [0, 1], from the response and the references
METRICS = TaskAttribute("metric")
