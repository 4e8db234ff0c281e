"""The learning rate of each step."""

from __future__ import annotations

import math

from ..config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then a cosine down to ``min_lr_ratio * lr``."""
    warmup = warmup_steps(optim, num_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    total = (optim.schedule_steps or num_steps) - warmup
    progress = min(1.0, (step - warmup) / max(1, total))
    low = optim.min_lr_ratio
    return optim.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_steps(optim: OptimConfig, num_steps: int) -> int:
    """Steps of the warm-up: as configured, or half of a schedule that is no longer than that."""
    schedule = optim.schedule_steps or num_steps
    return optim.warmup_steps if optim.warmup_steps < schedule else schedule // 2


def shortened(optim: OptimConfig, num_steps: int) -> str:
    """One line where the warm-up is not as configured; else empty."""
    warmup, schedule = warmup_steps(optim, num_steps), optim.schedule_steps or num_steps
    if warmup == optim.warmup_steps:
        return ""
    return f"the schedule has {schedule} steps: optim.warmup_steps = {optim.warmup_steps} is shortened to {warmup}"
