"""Bounds of the values of a config, declared at the field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .errors import InputError


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The numbers that a field accepts; a bound of None does not apply, and NaN and infinity are never accepted.

    Attributes:
        minimum, maximum: inclusive.
        above, below: exclusive.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def violation(self, value: float) -> str:
        """What is allowed, if the value is not; else nothing."""
        if self.above is not None and not value > self.above:
            return f"must be more than {self.above}"
        if not math.isfinite(value) or (self.minimum is not None and value < self.minimum):
            return "must be a number" + (f" and at least {self.minimum}" if self.minimum is not None else "")
        if self.maximum is not None and value > self.maximum:
            return f"must be between {self.minimum} and {self.maximum}"
        if self.below is not None and value >= self.below:
            return f"must be less than {self.below}"
        return ""


def bounded(default: Any, **bounds: float) -> Any:
    """A dataclass field with a default and `Bounds`, as in ``width: int = bounded(128, minimum=1)``.

    Args:
        default: of the field.
        bounds: of `Bounds`, by name.
    """
    return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds)})


def check_bounds(config: Any, prefix: str = "") -> None:
    """Check the bounded fields of a dataclass and of the dataclasses in it; a value of None is not checked.

    Args:
        config: an instance of the dataclass.
        prefix: of the keys in messages, with a dot at its end.

    Raises:
        InputError: for the first value out of its bounds.
    """
    for item in dataclasses.fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
        bounds = item.metadata.get("bounds")
        if bounds is not None and value is not None and (allowed := bounds.violation(value)):
            raise InputError(key, value, allowed)
