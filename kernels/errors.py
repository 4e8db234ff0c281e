"""The one way a user's mistake is told: field, value, what is allowed, how to fix it."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake, in one line.

    Args:
        field: what is wrong: a config key, an argument, a file.
        value: what was given; shown with ``repr`` unless it is a string that already reads well.
        allowed: what would have been accepted.
        fix: what to type or change next.
    """

    def __init__(self, field: str, value: object, allowed: str, fix: str = "") -> None:
        self.field, self.value, self.allowed, self.fix = field, value, allowed, fix
        line = f"{field} = {value!r}: {allowed}"
        super().__init__(f"{line}; {fix}" if fix else line)

    def __reduce__(self) -> tuple[type[InputError], tuple[object, ...]]:
        # An exception is pickled by its message alone, unless told how it is made.
        return type(self), (self.field, self.value, self.allowed, self.fix)
