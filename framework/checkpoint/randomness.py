"""The random states of a rank, as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .shards import Damaged


def states(device: torch.device) -> dict[str, str]:
    """``{device: its generator's state, hexadecimal}``, of the host and of this rank's device."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(state.tolist()).hex() for name, state in found.items()}


def restore(found: Mapping[str, str], device: torch.device, path: Path) -> None:
    """Set the generators to what `states` gave; one that is not in it stays as it is.

    Raises:
        Damaged: it is not a generator's state; ``path`` is where it was found.
    """
    try:
        for name, text in found.items():
            state = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
            if name == "cpu":
                torch.set_rng_state(state)
            elif name == "cuda" and device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise Damaged("checkpoint", str(path), f"is damaged: its random states are none ({error})") from None
