"""DeepSpeed's settings: read from a JSON file or from the config, completed from the config, and checked."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from .workarounds import import_deepspeed

MAX_BYTES = 1 << 18
SETTINGS = Path(__file__).parent.parent.parent / "configs" / "deepspeed"

_SECTIONS = frozenset(
    [
        "fp16",
        "bf16",
        "bfloat16",
        "zero_optimization",
        "data_types",
        "activation_checkpointing",
        "comms_logger",
        "flops_profiler",
        "timers",
        "aio",
        "checkpoint",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
    ]
)
_SWITCHES = frozenset(
    [
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "disable_python_gc",
        "disable_allgather",
    ]
)
_ALLOWED_KEYS = (
    _SECTIONS
    | _SWITCHES
    | frozenset(
        [
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "communication_data_type",
            "steps_per_print",
            "log_level",
        ]
    )
)
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

# Keys that DeepSpeed knows and that would fight with us: the value that changes nothing, and what to do instead.
_FOREIGN_KEYS: dict[str, tuple[Any, str]] = {
    "optimizer": (None, "set optim.* in the configuration instead"),
    "scheduler": (None, "set optim.* in the configuration instead"),
    "torch_autocast": ({"enabled": False}, "set train.precision instead"),
    "sequence_parallel_size": (1, "set parallel.sequence instead"),
    "data_parallel_size": (None, "set parallel.ranks and parallel.sequence instead"),
    "managed_gradient_accumulation": (False, "remove it: gradients are accumulated until the step"),
    "gradient_allreduce_op": ("mean", "remove it: gradients are scaled so that they come out true"),
    "gradient_predivide_factor": (1.0, "remove it: gradients are scaled so that they come out true"),
    "prescale_gradients": (False, "remove it: gradients are scaled so that they come out true"),
    "compile": ({"deepcompile": False}, "remove it: it is not supported"),
    "data_efficiency": ({"enabled": False}, "remove it: it is not supported"),
    "autotuning": ({"enabled": False}, "remove it: it is not supported"),
    "hybrid_engine": ({"enabled": False}, "remove it: it is not supported"),
    "pipeline": (None, "remove it: it is not supported"),
    "tensor_parallel": (None, "remove it: it is not supported"),
    "expert_parallel": (None, "remove it: it is not supported"),
}


def deepspeed_settings(
    choice: str | Mapping[str, Any],
    *,
    precision: str,
    batch_size: int,
    micro_batch_size: int,
    accumulation: int,
    clip: float,
    world_size: int,
) -> dict[str, Any]:
    """Complete DeepSpeed settings from what the user chose and what the configuration says.

    Args:
        choice: the name of a file in ``configs/deepspeed/``, the path of a DeepSpeed JSON, or its keys.
        precision: fp32, bf16 or fp16 (``train.precision``).
        batch_size: sequences per optimizer step over all ranks (``data.batch_size``).
        micro_batch_size: sequences that a data rank processes at once.
        accumulation: micro-batches that a data rank processes per optimizer step.
        clip: limit of the gradient's norm; 0 does not limit it (``optim.clip``).
        world_size: all ranks; DeepSpeed counts each of them as a data rank.

    Returns:
        Keys for `Engine`. "auto" has been filled in, or removed where DeepSpeed's own default holds.

    Raises:
        InputError: a file that cannot be read, a key that DeepSpeed does not know, or one that says something
            else than the configuration does.
    """
    given, where = _read_settings(choice)
    _check_keys(given, where)
    ours = {
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": float(clip),
    }
    _check_batch(given, where, ours, batch_size, world_size)
    if given.get("gradient_clipping", clip) != clip:
        raise _contradiction(where, "gradient_clipping", given["gradient_clipping"], "optim.clip", clip)
    if "bfloat16" in given:
        given["bf16"] = given.pop("bfloat16")
    for name in ("fp16", "bf16"):
        section = given.setdefault(name, {})
        if section.get("enabled", precision == name) != (precision == name):
            raise _contradiction(where, f"{name}.enabled", section["enabled"], "train.precision", precision)
        section["enabled"] = precision == name
    _check_sections(given, where, precision)
    defaults: dict[str, Any] = {"steps_per_print": None, "zero_force_ds_cpu_optimizer": False}
    defaults["timers"] = {"throughput": {"enabled": False}}
    if precision != "fp32":  # many micro-batches and ranks add up: sums in low precision would lose the small ones
        defaults["communication_data_type"] = "fp32"
        if given.get("zero_optimization", {}).get("stage", 0):
            defaults["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**defaults, **given, **ours}


def _read_settings(choice: str | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The user's keys without what is "auto", and how messages call their origin."""
    if isinstance(choice, Mapping):
        return _without_auto(choice), "deepspeed."
    names = sorted(item.stem for item in SETTINGS.glob("*.json"))
    file = SETTINGS / f"{choice}.json" if choice in names else Path(choice)
    if not os.path.isfile(file):  # which no name is too long for
        near = difflib.get_close_matches(choice, names, 1)
        fix = f"did you mean {near[0]}?" if near else f"names: {', '.join(names)}"
        raise InputError("deepspeed", choice, "is neither a name in configs/deepspeed/ nor a JSON file", fix)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError("deepspeed", str(file), f"must be at most {MAX_BYTES} bytes")
        keys = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_duplicates)
        if not isinstance(keys, dict):
            raise InputError("deepspeed", str(file), "must hold a JSON object")
        return _without_auto(keys), f"{file.name}: "
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError("deepspeed", str(file), f"cannot be read as JSON: {error}") from None
    except RecursionError:
        raise InputError("deepspeed", str(file), "is nested too deeply") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise ValueError(f"{key!r} is given twice")
        keys[key] = value
    return keys


def _without_auto(tree: Mapping[str, Any]) -> dict[str, Any]:
    items = {key: value for key, value in tree.items() if value != "auto"}
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for key, value in items.items()
    }


def _check_keys(given: dict[str, Any], where: str) -> None:
    """Refuse keys that DeepSpeed would ignore, and drop or refuse those that would fight with us."""
    for key in list(given):
        if key in _FOREIGN_KEYS:
            harmless, instead = _FOREIGN_KEYS[key]
            value = given.pop(key)
            all_auto = isinstance(value, dict) and "type" in value and not value.get("params")
            if value != harmless and not all_auto:
                raise InputError(f"{where}{key}", value, "cannot be chosen here", instead)
        elif key not in _ALLOWED_KEYS:
            near = difflib.get_close_matches(key, _ALLOWED_KEYS, 1)
            fix = f"did you mean {near[0]}?" if near else "remove it"
            raise InputError(f"{where}{key}", given[key], "is not a key that DeepSpeed knows", fix)
        elif key in _SECTIONS and not isinstance(given[key], dict):
            raise InputError(f"{where}{key}", given[key], "must hold keys of its own")
        elif key in _SWITCHES and not isinstance(given[key], bool):
            raise InputError(f"{where}{key}", given[key], "must be true or false")
        elif key == "log_level" and given[key] not in _LOG_LEVELS:
            raise InputError(f"{where}{key}", given[key], f"must be one of {', '.join(_LOG_LEVELS)}")
        elif key == "steps_per_print" and (type(given[key]) is not int or given[key] < 1):
            raise InputError(f"{where}{key}", given[key], "must be a whole number and at least 1")


def _check_batch(given: dict[str, Any], where: str, ours: dict[str, Any], batch_size: int, world_size: int) -> None:
    """Compare batch keys. A user's ``train_batch_size`` counts sequences; DeepSpeed's counts a part of one as one."""
    micro, accumulation = ours["train_micro_batch_size_per_gpu"], ours["gradient_accumulation_steps"]
    assert batch_size % (micro * accumulation) == 0
    equation = (
        f"data.batch_size {batch_size} = train.micro_batch_size {micro} x {accumulation} accumulated x "
        f"{batch_size // (micro * accumulation)} data ranks (of {world_size} ranks)"
    )
    right = {"train_batch_size": {batch_size, ours["train_batch_size"]}}
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        allowed = right.get(key, {ours[key]})
        value = given.get(key, ours[key])
        if type(value) is not int or value not in allowed:
            wanted = " or ".join(str(number) for number in sorted(allowed))
            raise InputError(f"{where}{key}", value, f"must be {wanted}, for {equation}", 'or write "auto"')


def _contradiction(where: str, key: str, value: object, ours: str, our_value: object) -> InputError:
    allowed = f"contradicts {ours} = {our_value} of the configuration"
    return InputError(f"{where}{key}", value, allowed, 'make them equal, or write "auto" in DeepSpeed\'s keys')


def _check_sections(given: dict[str, Any], where: str, precision: str) -> None:
    """Let DeepSpeed check the sections that it has types for, and refuse what its stages cannot do with us."""
    import_deepspeed()
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    zero = given.setdefault("zero_optimization", {})
    kinds = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    for name, kind in kinds.items():
        try:
            kind(**given[name])
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in (name, *first["loc"]))
            known = [field.alias or label for label, field in kind.model_fields.items()]
            near = difflib.get_close_matches(key.rpartition(".")[2], known, 1)
            fix = f"did you mean {near[0]}?" if near and first["type"] == "extra_forbidden" else ""
            raise InputError(f"{where}{key}", first["input"], first["msg"], fix) from None
    _check_one_by_one(given, where)
    if not given["bf16"].setdefault("check_grad_overflow", True):
        allowed = "must be true, so that a gradient that is not finite never reaches the weights"
        raise InputError(f"{where}bf16.check_grad_overflow", False, allowed)
    stage = zero.get("stage", 0)
    prefix = f"{where}zero_optimization."
    if zero.get("overlap_comm") and stage == 1:
        raise InputError(f"{prefix}overlap_comm", True, "needs stage 0, 2 or 3", "set it to false")
    if zero.get("round_robin_gradients"):  # DeepSpeed then takes one parameter's fp32 values for another's
        raise InputError(f"{prefix}round_robin_gradients", True, "makes wrong checkpoints", "remove it")
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device == "nvme":
            raise InputError(f"{prefix}{name}.device", device, "must be cpu or none")
    accumulate = given.get("data_types", {}).get("grad_accum_dtype")
    if stage == 0 and accumulate not in (None, precision):
        allowed = f"must be {precision} in stage 0, like the weights"
        raise InputError(f"{where}data_types.grad_accum_dtype", accumulate, allowed, "choose stage 1, 2 or 3")


def _check_one_by_one(given: dict[str, Any], where: str) -> None:
    """Have DeepSpeed read each key as it will when it starts, where a mistake would be a traceback on every rank."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    for key, value in given.items():
        try:
            DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params({key: copy.deepcopy(value)})
        except ValidationError as error:
            first = error.errors()[0]
            place = [str(part) for part in first["loc"]]
            place = place if place[:1] == [key] else [key, *place]
            raise InputError(f"{where}{'.'.join(place)}", first["input"], first["msg"]) from None
        except Exception as error:  # whatever its readers stumble over
            raise InputError(f"{where}{key}", value, f"DeepSpeed cannot read it: {error}") from None
