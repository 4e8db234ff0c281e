"""Steps that should not be: a loss or gradient that is not finite, and a loss far above the usual."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median

from ..config import TrainConfig

MAX_SKIPPED = 10  # steps in a row that may be skipped
RECENT = 32  # steps whose median is the usual loss
SPIKE = 2.0  # times the usual loss that are told


class Diverged(RuntimeError):
    """The loss or its gradient is not finite, and the run is not to go on."""


class LossGuard:
    """Looks at every step's loss and gradient; the same on all ranks."""

    def __init__(self, train: TrainConfig) -> None:
        self._skip = train.nonfinite == "skip"
        self._rescales = train.precision == "fp16"  # and then leaves out steps by itself
        self._skipped = 0
        self._losses: deque[float] = deque(maxlen=RECENT)

    def check(self, step: int, row: dict[str, float], sequences: Callable[[], list[int]]) -> str:
        """What to say of a step, if anything.

        Raises:
            Diverged: it is not finite, and is not to be skipped. The weights are those from before it.
        """
        loss, norm = row["loss"], row["grad_norm"]
        if not math.isfinite(loss) or not (math.isfinite(norm) or self._rescales):
            self._skipped += 1
            what = f"step {step}: loss {loss:g}, gradient norm {norm:g}, in the sequences {sequences()}"
            if not self._skip:
                raise Diverged(f"{what}; no weight was changed; train.nonfinite=skip would leave the step out")
            if self._skipped > MAX_SKIPPED:
                raise Diverged(f"{what}; the {MAX_SKIPPED} steps before were skipped too; try a smaller optim.lr")
            return f"{what}: skipped"
        self._skipped = 0
        usual = median(self._losses) if len(self._losses) == RECENT else math.inf
        self._losses.append(loss)
        if loss > SPIKE * usual:
            return f"step {step}: loss {loss:.4f}, usually {usual:.4f}, in the sequences {sequences()}"
        return ""
