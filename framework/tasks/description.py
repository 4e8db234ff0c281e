"""What predictions need of a task besides the model. A run and its exports keep it: the training data may be gone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..runtime.files import replace_text

FILE_NAME = "task.json"  # in a run's directory; an export has it in its config.json


@dataclass
class TaskDescription:
    """The form of a task's inputs, and the names and units of its outputs.

    Attributes:
        name: ``task.name``.
        seq_len: tokens of a sequence in training.
        classes: their names, by number.
        columns: names of the channels of a time series.
        mean, deviation: by which inputs are standardized: of each channel, or one for all pixels.
        targets: names of predicted numbers.
        target_mean, target_deviation: by which these are standardized; empty where they are not.
        horizon: forecast: number of future values of each channel.
        time_column: forecast: name of the column of times; empty if there is none.
        time_step: forecast: seconds from line to line, their median; 0 if there are no dates.
        missing: forecast: ``data.missing``.
        size: images: height and width in pixels.
        colors: images: channels of a pixel.
        field: documents: ``data.field``; empty for its default.
        keep_case: documents: whether lower-case letters of FASTA are kept.
    """

    name: str = ""
    seq_len: int = 0
    classes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    target_mean: list[float] = field(default_factory=list)
    target_deviation: list[float] = field(default_factory=list)
    horizon: int = 0
    time_column: str = ""
    time_step: float = 0.0
    missing: str = "error"
    size: int = 0
    colors: int = 1
    field: str = ""
    keep_case: bool = False

    def as_json(self) -> dict[str, Any]:
        """The attributes that differ from their defaults."""
        defaults = TaskDescription()
        return {name: value for name, value in asdict(self).items() if value != getattr(defaults, name)}

    @classmethod
    def from_json(cls, tree: Any, source: str) -> TaskDescription:
        """The description that `as_json` returned, with all types checked; unknown keys are ignored.

        Raises:
            InputError: it is no such description; ``source`` names it.
        """
        found = cls()
        known = tree if isinstance(tree, dict) else {}
        for one in fields(cls):
            value = known.get(one.name, getattr(found, one.name))
            if not _is_of(value, str(one.type)):
                raise InputError("task", source, f"has {one.name} = {value!r}, which is no {one.type}")
            setattr(found, one.name, value)
        if not found.name:
            raise InputError("task", source, "describes no task")
        return found

    def save(self, directory: Path) -> None:
        """Write it into a run's directory; OSError if that is not possible."""
        replace_text(directory / FILE_NAME, json.dumps(self.as_json(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> TaskDescription | None:
        """Read what `save` wrote; None if there is nothing.

        Raises:
            InputError: it is damaged, or cannot be read.
        """
        path = directory / FILE_NAME
        try:
            return cls.from_json(json.loads(path.read_bytes()), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError("task", str(path), f"cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("task", str(path), "is not JSON") from None


def _is_of(value: Any, annotation: str) -> bool:
    """Whether a value of JSON has one of the types of `TaskDescription`."""
    if annotation.startswith("list["):
        return isinstance(value, list) and all(_is_of(one, annotation[5:-1]) for one in value)
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
    return isinstance(value, kinds[annotation]) and isinstance(value, bool) == (annotation == "bool")
