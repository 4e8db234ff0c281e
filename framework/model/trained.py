"""What of a model is trained: low-rank adapters of its linear layers, and all parameters that are not frozen."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...bounds import bounded
from ...errors import InputError
from .directory import ADAPTER_CONFIG, CONFIG


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) of a model of transformers, alone trained.

    Attributes:
        rank: of the product that is added to a matrix; 0 for no adapters.
        alpha: the product is scaled by ``alpha / rank``.
        targets: names of the linear layers that get one, as in ``[q_proj, v_proj]``; empty for all but the output.
    """

    rank: int = bounded(0, minimum=0)
    alpha: int = bounded(16, minimum=1)
    targets: list[str] = field(default_factory=list)


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Give a model of transformers its adapters, by peft, and freeze all else of it.

    Raises:
        InputError: peft is not installed, or takes none of the targets.
    """
    try:
        import peft
    except ImportError:
        raise InputError("model.lora.rank", config.rank, "needs peft", "pip install 'longreach[peft]'") from None
    targets = config.targets or "all-linear"
    options = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        model.add_adapter(options)
    except (ValueError, TypeError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise InputError("model.lora.targets", targets, f"peft cannot adapt them: {why}") from None


def adapted_model(place: Path) -> str:
    """The directory of the model that adapters belong to.

    Args:
        place: directory of the adapters.

    Raises:
        InputError: it does not name one that is there.
    """
    try:
        base = json.loads((place / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"]
        if (Path(base) / CONFIG).is_file():
            return str(base)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("model", str(place / ADAPTER_CONFIG), f"cannot be read: {error}") from None
    allowed = "is of adapters, and its base_model_name_or_path must be a local directory"
    raise InputError("model", str(place / ADAPTER_CONFIG), f"{allowed}, not {base!r}", "write the right one there")


def load_adapters(model: Any, place: Path) -> None:
    """Give a model of transformers the adapters that peft saved in a directory.

    Raises:
        InputError: peft is not installed, or they do not fit the model.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("model", str(place), "needs peft", "pip install 'longreach[peft]'") from None
    try:
        model.load_adapter(str(place))
    except Exception as error:  # whatever peft and transformers stumble over
        why = (str(error).splitlines() or [""])[0]
        raise InputError("model", str(place), f"holds no adapters of this model: {why}") from None


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names, or the rest of a name after a dot, match one of ``patterns``, as in
    ``layers.0.*``; they get no gradient.

    Raises:
        InputError: a pattern matches nothing, or nothing is left to be trained.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [*fnmatch.filter(named, pattern), *fnmatch.filter(named, f"*.{pattern}")]
        if not found:
            some = ", ".join(list(named)[:: max(1, len(named) // 3)][:3])
            raise InputError("train.freeze", pattern, "matches no parameter", f"their names are such as {some}")
        for name in found:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise InputError("train.freeze", [*patterns], "leaves no parameter to be trained")
