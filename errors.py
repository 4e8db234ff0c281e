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
        line = f"{_short(field)} = {_short(repr(value))}: {_short(allowed)}"
        super().__init__(f"{line}; {_short(fix)}" if fix else line)

    def __reduce__(self) -> tuple[type[InputError], tuple[object, ...]]:
        # An exception is pickled by its message alone, unless told how it is made.
        return type(self), (self.field, self.value, self.allowed, self.fix)


def _short(text: str, most: int = 400) -> str:
    """One line that a terminal can show: of a long text the beginning and the end, and no character that steers it."""
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 4 :]}"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
