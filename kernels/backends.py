"""Which implementation of an operator runs: chosen once per operator and kind of input, and said once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import InputError

T = TypeVar("T")
log = logging.getLogger("longreach.kernels")


@dataclass(frozen=True)
class Option(Generic[T]):
    """One implementation.

    Attributes:
        load: imports and returns it; called when it is first chosen.
        unsupported_reason: what it lacks to run, given the device's type and the operator's case; "" if it runs.
    """

    load: Callable[[], T]
    unsupported_reason: Callable[..., str] = lambda *case: ""


class Backends(Generic[T]):
    """The implementations of one operator by name, the preferred first.

    Args:
        operator: its name, for messages.
        options: implementations by name.
    """

    def __init__(self, operator: str, options: Mapping[str, Option[T]]) -> None:
        self.operator, self.options = operator, dict(options)
        self._chosen: dict[Hashable, T] = {}
        self._said: set[tuple[str, str]] = set()

    def choose(self, backend: str, device: torch.device, *case: Hashable) -> T:
        """The implementation named ``backend``, or for "auto" the first that runs.

        Args:
            backend: "auto" or a name.
            device: where the tensors are.
            case: what else decides, such as the dtype; the same for every call of an operator.

        Raises:
            InputError: there is no such backend, or it cannot run here. Never falls back silently.
        """
        key = (backend, device.type, case)
        if key not in self._chosen:
            self._chosen[key] = self._choose(backend, device.type, case)
        return self._chosen[key]

    def automatic(self, device: str, *case: Hashable) -> tuple[str, dict[str, str]]:
        """What "auto" takes on such a device, and what each that is preferred to it lacks, by name."""
        missing = {}
        for name, option in self.options.items():
            if lack := option.unsupported_reason(device, *case):
                missing[name] = lack
            else:
                return name, missing
        raise AssertionError(f"{self.operator}: no implementation runs everywhere")

    def _choose(self, backend: str, device: str, case: tuple[Hashable, ...]) -> T:
        field = f"{self.operator}: backend"
        if backend == "auto":
            backend = self.automatic(device, *case)[0]
            if (device, backend) not in self._said and not torch.compiler.is_dynamo_compiling():  # no logging there
                self._said.add((device, backend))
                log.info("%s on %s: backend %s", self.operator, device, backend)
        elif backend not in self.options:
            raise InputError(field, backend, f"one of auto, {', '.join(self.options)}")
        elif lack := self.options[backend].unsupported_reason(device, *case):
            raise InputError(field, backend, lack, "pass backend='auto'")
        return self.options[backend].load()


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` has a shape but no data, because `torch.compile` asks for the shapes of an operator's results.

    Implementations then allocate as ever, and launch nothing.
    """
    return isinstance(x, FakeTensor)
