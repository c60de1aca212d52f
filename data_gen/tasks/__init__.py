"""The tasks, one module or description each; importing the package registers them all.

A new module in this folder that calls ``register`` is a new task everywhere: see ``docs/add-a-task.md``.
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from data_gen.described_task import built_in
from data_gen.fit_length import LengthBudget
from data_gen.split import Split, in_split
from data_gen.tasks.task import TASKS, Request, Task, TaskAttribute, register, resolve_task, tasks_of, tasks_with

__all__ = [
    "TASKS", "LengthBudget", "Request", "Split", "Task", "TaskAttribute", "in_split", "register", "resolve_task",
    "tasks_of", "tasks_with",
]  # fmt: skip

ORDER = ("niah", "vt", "cwe", "fwe", "longbench")  # in lists, after line; other modules follow by name

line = built_in(Path(__file__).parent / "line.yml", shortest=300)
# Manifests of earlier versions have no hash of it; its bytes are fixed by tests.
register(replace(line, sources=lambda request: {}, identity={}))

for module in dict.fromkeys((*ORDER, *sorted(info.name for info in iter_modules(__path__)))):
    import_module(f"{__name__}.{module}")
