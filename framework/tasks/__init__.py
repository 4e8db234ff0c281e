"""What is learned and how it is scored, by name: each file holds one kind of task."""

from __future__ import annotations

from ...errors import InputError
from ..data import DataConfig
from .forecast import Forecast
from .images import Images
from .language import Language
from .retrieval import Retrieval
from .series import Series
from .synthetic import Adding, ListOps, Needle, Recall
from .task import Score, Task, TaskConfig

TASKS: dict[str, type[Task]] = {
    "language": Language,
    "series": Series,
    "forecast": Forecast,
    "images": Images,
    "retrieval": Retrieval,
    "listops": ListOps,
    "recall": Recall,
    "needle": Needle,
    "adding": Adding,
}


def kind_of(task: TaskConfig) -> type[Task]:
    """The class of a task.

    Raises:
        InputError: there is none of that name.
    """
    if task.name not in TASKS:
        raise InputError("task.name", task.name, f"one of {', '.join(TASKS)}")
    return TASKS[task.name]


def open_task(task: TaskConfig, data: DataConfig) -> Task:
    """The task with its examples; `Task.prepare` was called before, on one rank.

    Raises:
        InputError: there is none of that name, or its data are missing or do not fit.
    """
    return kind_of(task)(task, data)


__all__ = ["TASKS", "Score", "Task", "TaskConfig", "kind_of", "open_task"]
