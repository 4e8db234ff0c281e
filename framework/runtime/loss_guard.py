"""Guards against bad steps: a loss or gradient that is not finite, and a spike of the loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median

from ..config import TrainConfig

MAX_SKIPPED = 10  # steps in a row that may be skipped
RECENT = 32  # steps of the running median
SPIKE = 2.0  # times the running median is a spike of the loss


class Diverged(RuntimeError):
    """The loss or its gradient is not finite, and the run must end."""


class LossGuard:
    """Checks the loss and the gradient norm of every step, which are the same on all ranks."""

    def __init__(self, train: TrainConfig) -> None:
        self._skip = train.nonfinite == "skip"
        self._rescales = train.precision == "fp16"  # its dynamic loss scale skips steps by itself
        self._skipped = 0
        self._losses: deque[float] = deque(maxlen=RECENT)

    def check(self, step: int, row: dict[str, float], sequences: Callable[[], list[int]]) -> str:
        """Check one step.

        Args:
            step: counted from 1.
            row: has ``loss`` and ``grad_norm``.
            sequences: gives the numbers of the step's sequences, for messages.

        Returns:
            A warning, or nothing.

        Raises:
            Diverged: they are not finite, and the step must not be skipped. The weights are those from before it.
        """
        loss, norm = row["loss"], row["grad_norm"]
        if not math.isfinite(loss) or not (math.isfinite(norm) or self._rescales):
            self._skipped += 1
            what = f"step {step}: loss {loss:g}, gradient norm {norm:g}, in the sequences {sequences()}"
            if not self._skip:
                raise Diverged(f"{what}; no weight was changed; train.nonfinite=skip would skip the step")
            if self._skipped > MAX_SKIPPED:
                raise Diverged(f"{what}; the {MAX_SKIPPED} steps before were skipped too; try a smaller optim.lr")
            return f"{what}: skipped"
        self._skipped = 0
        running_median = median(self._losses) if len(self._losses) == RECENT else math.inf
        self._losses.append(loss)
        if loss > SPIKE * running_median:
            spike = f"loss spike, {loss:.4f} over a running median of {running_median:.4f}"
            return f"step {step}: {spike}, in the sequences {sequences()}"
        return ""
