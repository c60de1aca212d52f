"""The tasks, one module each; importing the package registers them all.

A new module in this folder that calls ``register`` is a new task everywhere: see ``docs/add-a-task.md``.
"""

from importlib import import_module
from pkgutil import iter_modules

from data_gen.fit_length import LengthBudget, largest
from data_gen.tasks.task import (
    TASKS,
    Request,
    Split,
    Task,
    TaskAttribute,
    in_split,
    register,
    resolve_task,
    tasks_of,
    tasks_with,
)

__all__ = [
    "TASKS", "LengthBudget", "Request", "Split", "Task", "TaskAttribute", "in_split", "largest", "register",
    "resolve_task", "tasks_of", "tasks_with",
]  # fmt: skip

ORDER = ("line_retrieval", "niah", "vt", "cwe", "fwe", "longbench")  # in lists; other modules follow by name

for module in dict.fromkeys((*ORDER, *sorted(info.name for info in iter_modules(__path__)))):
    import_module(f"{__name__}.{module}")
