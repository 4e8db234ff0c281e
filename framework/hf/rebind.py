"""Copies of a module's methods in which some global names have other values: this instance alone is changed.

A forward of transformers finds the functions that mix tokens among the globals of its file. A copy of the method with
a copy of these globals calls ours instead; the class, the file and other instances stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

Replace = Callable[[str, Any], Any | None]
"""Of a global's name and value: what to put in its place, or None."""


def methods(module: nn.Module) -> Iterator[tuple[str, types.FunctionType]]:
    """The functions of the module's class, by name; not those of `torch.nn.Module`."""
    seen = set(dir(nn.Module)) - {"forward"}
    for base in type(module).__mro__:
        if base is nn.Module:
            return
        for name, value in vars(base).items():
            if name not in seen and isinstance(value, types.FunctionType):
                seen.add(name)
                yield name, value


def rebound(function: types.FunctionType, replace: Replace) -> types.FunctionType:
    """A copy of ``function``, and of the functions that its decorators wrap, with the globals that ``replace`` gives;
    ``function`` itself where it gives none.
    """
    return _Copies(replace).of(function)


class _Copies:
    def __init__(self, replace: Replace) -> None:
        self._replace = replace
        self._done: dict[int, types.FunctionType] = {}

    def of(self, function: types.FunctionType) -> types.FunctionType:
        if id(function) in self._done:
            return self._done[id(function)]
        self._done[id(function)] = function  # a function that refers to itself by a cell
        found = self._globals(function)
        cells = self._cells(function)
        if found or cells is not None:
            copy = types.FunctionType(
                function.__code__,
                {**function.__globals__, **found} if found else function.__globals__,
                function.__name__,
                function.__defaults__,
                cells if cells is not None else function.__closure__,
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            copy.__dict__.update(function.__dict__)
            copy.__qualname__, copy.__doc__, copy.__module__ = (
                function.__qualname__,
                function.__doc__,
                function.__module__,
            )
            copy.__annotations__ = dict(function.__annotations__)
            inner = function.__dict__.get("__wrapped__")
            if isinstance(inner, types.FunctionType):
                copy.__dict__["__wrapped__"] = self.of(inner)
            self._done[id(function)] = copy
        return self._done[id(function)]

    def _globals(self, function: types.FunctionType) -> Mapping[str, Any]:
        values = function.__globals__
        found = {name: self._replace(name, values[name]) for name in _names(function.__code__) if name in values}
        return {name: value for name, value in found.items() if value is not None}

    def _cells(self, function: types.FunctionType) -> tuple[types.CellType, ...] | None:
        """The closure with copies of the functions in it, or None where none of them changes."""
        changed, cells = False, []
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # empty
                value = None
            other = self.of(value) if isinstance(value, types.FunctionType) else value
            cells.append(cell if other is value else types.CellType(other))
            changed |= other is not value
        return tuple(cells) if changed else None


def _names(code: types.CodeType) -> set[str]:
    """Global names that the code or a function inside it reads."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*(_names(const) for const in inner))
