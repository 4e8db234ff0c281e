"""Tasks: data sets with their labels and metrics, chosen by ``task.name``. Each module holds one kind of task."""

from __future__ import annotations

from ...errors import InputError
from ..data import DataConfig
from .description import TaskDescription
from .documents import Documents
from .forecast import Forecast
from .images import Images
from .language import Language
from .listops import ListOps
from .pathfinder import Pathfinder
from .retrieval import Retrieval
from .series import Series
from .synthetic import Adding, Needle, Recall
from .task import DistanceBin, Score, Task, TaskConfig, TaskName

TASKS: dict[TaskName, type[Task]] = {
    "language": Language,
    "documents": Documents,
    "series": Series,
    "forecast": Forecast,
    "images": Images,
    "retrieval": Retrieval,
    "listops": ListOps,
    "pathfinder": Pathfinder,
    "recall": Recall,
    "needle": Needle,
    "adding": Adding,
}


def kind_of(task: TaskConfig) -> type[Task]:
    """The class of the task ``task.name``.

    Raises:
        InputError: there is no task of that name.
    """
    if task.name not in TASKS:
        raise InputError("task.name", task.name, f"one of {', '.join(TASKS)}")
    return TASKS[task.name]


def open_task(task: TaskConfig, data: DataConfig) -> Task:
    """Open a task with its data. `Task.prepare` must have been called before, by one rank.

    Raises:
        InputError: there is no task of that name, or its data are missing or do not fit.
    """
    return kind_of(task)(task, data)


__all__ = ["TASKS", "DistanceBin", "Score", "Task", "TaskConfig", "TaskDescription", "TaskName", "kind_of", "open_task"]
