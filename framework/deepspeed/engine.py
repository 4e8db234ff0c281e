"""The one place that knows DeepSpeed: its settings, and an engine that behaves alike in every ZeRO stage.

All ranks, those of one sequence included, shard the optimizer; DeepSpeed is told of no other layout. What it then
does with gradients, unused numbers and checkpoints differs between its stages. `Engine` promises one behaviour:
the gradient is the true one, its norm is always known, a gradient that is not finite never reaches the weights,
and every rank can read its own piece of each tensor, and write any, under the name it has in the model.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import difflib
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...parallel.mesh import Mesh
from ...parallel.traffic import Stopwatch, timed
from .partition import FlatStore, PartitionedStore, WholeStore, share

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
    _import_deepspeed()
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
        raise InputError(f"{prefix}overlap_comm", True, "needs stage 2 or 3", "set it to false")
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


def avoid_compiling() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective, which takes a minute and needs a compiler.

    It builds the operator when it is first initialized on CPUs, if its table of possible operators says so, and
    uses it in inference only. The table is made on first use (by trying compilers); we make it, without that one.
    """
    import deepspeed.ops

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def disable_stage3_order_check() -> None:
    """Keep stage 3 from comparing its order of modules with ranks that are not there, in a plan."""
    _import_deepspeed()
    from deepspeed.runtime.zero import partitioned_param_coordinator

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None


def _import_deepspeed() -> Any:
    """DeepSpeed, imported when it is first needed (seconds) and without its remarks about the machine."""
    if "deepspeed" not in sys.modules:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            import deepspeed

            kind = deepspeed.accelerator.get_accelerator().device_name()
        except (ImportError, ValueError) as error:
            given = os.environ.get("DS_ACCELERATOR")
            if given is None:
                raise
            raise InputError("DS_ACCELERATOR", given, f"DeepSpeed cannot use it: {error}", "unset it") from None
        finally:
            logging.disable(before)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if kind != device:
            allowed = f"is what DeepSpeed takes, but torch computes on {device} here"
            raise InputError("DS_ACCELERATOR", kind, allowed, f"unset it, or set it to {device}")
    import deepspeed

    if not hasattr(deepspeed.DeepSpeedEngine, "managed_gradient_accumulation"):
        raise InputError("deepspeed", deepspeed.__version__, "is too old", "install deepspeed 0.19.8 or newer")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # torch 2.13 has new names for two collectives; DeepSpeed's calls by the old ones are not the user's concern.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _join_world(deepspeed: Any, mesh: Mesh) -> None:
    """Show DeepSpeed the world that was joined; make one of this rank alone if none was. Never asks MPI."""
    from deepspeed.utils import groups

    avoid_compiling()
    deepspeed.comm.comm.cdb = groups._WORLD_GROUP = None  # it would stay in a world that was left
    alone: dict[str, Any] = {}
    if mesh.world.group is None:
        directory = tempfile.mkdtemp(prefix="longreach-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        alone = {"init_method": f"file://{directory}/store", "rank": 0, "world_size": 1}
    backend = "gloo" if mesh.device.type == "cpu" else "cpu:gloo,cuda:nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, **alone)
    os.environ.setdefault("LOCAL_RANK", str(mesh.device.index or 0))  # DeepSpeed will not start without it


_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_base",
    "all_gather_coalesced",
    "all_to_all_single",
)


class Engine:
    """A model, its optimizer and DeepSpeed.

    A step is any number of ``backward`` calls and then one ``step``::

        for batch in micro_batches:
            engine.backward(engine(batch))
        norm = engine.step(lr)

    Every rank must make the same number of calls, and reach the same parameters in each.

    Args:
        model: its parameters are in fp32 and equal on all ranks. DeepSpeed converts it in place.
        optimizer: a ``torch.optim`` optimizer over parameters of the model.
        settings: from `deepspeed_settings`.
        mesh: of the world that was joined; that of a single process needs none.

    Attributes:
        waiting: runs while DeepSpeed reduces gradients and gathers weights. With ``overlap_comm`` on a GPU, what
            overlaps with other work counts too.

    Raises:
        InputError: this device cannot compute in the precision asked for.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], mesh: Mesh
    ) -> None:
        deepspeed = _import_deepspeed()
        self.waiting = Stopwatch(mesh.device)
        _join_world(deepspeed, mesh)
        self._backend = deepspeed.comm.comm.cdb
        for name in _COLLECTIVES:
            setattr(self._backend, name, timed(getattr(self._backend, name), self.waiting))
        _check_precision(settings, mesh)
        self.module, self.mesh = model, mesh
        self.num_parameters = sum(p.numel() for p in model.parameters())  # stage 3 leaves only a part of each
        trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()}
        # The step ends when the caller says so; DeepSpeed has no number of micro-batches to count or divide by.
        per_pass = settings["train_micro_batch_size_per_gpu"]
        config = {
            **copy.deepcopy(settings),
            "managed_gradient_accumulation": False,
            "gradient_accumulation_steps": 1,
            "train_batch_size": per_pass * mesh.world.size,
        }
        rates = [group["lr"] for group in optimizer.param_groups]
        _set_rates(optimizer, [0.0] * len(rates))  # some of its optimizers take a step to make their state
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints how much memory there is
            self._deepspeed = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
        stage = self._deepspeed.zero_optimization_stage()
        kind = WholeStore if stage == 0 else PartitionedStore if stage == 3 else FlatStore
        self._store = kind(self._deepspeed.optimizer, optimizer, trained, mesh.world)
        self._store.make_state()
        _set_rates(optimizer, rates)
        self._update_scale: Callable[[bool], None] | None = None
        self._overflows: list[bool] = []
        if self._deepspeed.fp16_enabled():  # it grows the scale of the loss before it divides the gradient by it
            self._update_scale = self._deepspeed.optimizer._update_scale
            self._deepspeed.optimizer._update_scale = self._overflows.append
        self._reduce_here = stage == 0
        if self._reduce_here:
            self._deepspeed.enable_backward_allreduce = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        return self._deepspeed(*args, **kwargs)

    def train(self) -> None:
        """Put the module into training mode."""
        self.module.train()

    def eval(self) -> None:
        """Put the module into evaluation mode."""
        self.module.eval()

    @property
    def gradient_scale(self) -> float:
        """How many times larger than true the gradients are that `backward` computes on this rank."""
        return self.mesh.world.size * float(getattr(self._deepspeed.optimizer, "loss_scale", 1.0))

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradient to that of the step.

        Args:
            loss: scalar; a summand of the loss of the whole optimizer step. Summed over the ranks and over the
                calls of the step, it is that loss.
        """
        optimizer = self._deepspeed.optimizer
        if hasattr(optimizer, "clear_backward_seen_flag"):  # else two calls after one forward would not add up
            optimizer.clear_backward_seen_flag()
        scale = float(self.mesh.world.size)  # DeepSpeed averages over all ranks
        if not hasattr(optimizer, "scale_if_loss"):  # and it forgets the scale of fp16 in stage 0
            scale = self.gradient_scale
        wide = loss.to(torch.promote_types(loss.dtype, torch.float32))
        self._deepspeed.backward(wide * scale, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Update the weights with the gradient added up since the last step, which ends it.

        Args:
            lr: learning rate of all parameter groups.

        Returns:
            The norm of the true gradient over all parameters, before clipping, the same on all ranks. Infinity if
            the gradient was not finite: then nothing was updated (in fp16, the scale of the loss was reduced).
        """
        engine, optimizer = self._deepspeed, self._deepspeed.optimizer
        _set_rates(optimizer, [lr] * len(optimizer.param_groups))
        norm = self._reduce() if self._reduce_here else math.nan
        if math.isinf(norm) and not hasattr(optimizer, "overflow"):  # a bare torch optimizer would go on
            engine.zero_grad()
            return math.inf
        engine.step()
        self._store.after_step()
        while self._overflows and self._update_scale is not None:
            self._update_scale(self._overflows.pop())
        if not engine.was_step_applied():
            return math.inf
        norm = norm if self._reduce_here else float(engine.get_global_grad_norm())
        return norm if math.isfinite(norm) and norm >= 0 else math.inf

    def _reduce(self) -> float:
        """Average the gradients of stage 0 and return the norm of the true gradient, or infinity."""
        scale = self.gradient_scale / self.mesh.world.size
        self._deepspeed.buffered_allreduce_fallback()
        norms = [p.grad.norm(dtype=torch.float32) for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.stack(norms).norm()) / scale if norms else 0.0
        return norm if math.isfinite(norm) else math.inf

    def pieces(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """This rank's pieces of the model and of its optimizer; together, the ranks have every value once.

        Yields:
            A name as in the model (a tied parameter has one); ``param`` (fp32; a persistent buffer in its own type)
            or, of what the optimizer trains, the name of what it keeps (for Adam ``exp_avg`` and ``exp_avg_sq``,
            fp32); where the piece begins in the flattened tensor; and its values ``[n]``, n >= 1, which the next step
            may change.
        """
        for name, param in self.module.named_parameters():
            start, stop = self._store.part(param)
            if start < stop:
                for key in ("param", *self._store.keys(param)):
                    yield name, key, start, self._store.read(param, key)
        for name, buffer in _buffers(self.module):
            start, stop = share(buffer.numel(), self.mesh.world)
            if start < stop:
                yield name, "param", start, buffer.detach().flatten()[start:stop]

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The names and keys that all ranks' `pieces` have, with the shape of each whole tensor."""
        shapes = {}
        for name, param in self.module.named_parameters():
            shape = tuple(getattr(param, "ds_shape", param.shape))  # in stage 3 a parameter has only a part
            shapes[name] = dict.fromkeys(("param", *self._store.keys(param)), shape)
        return shapes | {name: {"param": tuple(buffer.shape)} for name, buffer in _buffers(self.module)}

    @torch.no_grad()
    def load(self, read: Callable[[str, str, int, int], Tensor]) -> None:
        """Set every tensor of the model and of its optimizer; a collective.

        Args:
            read: called with a name and a key of `shapes` and with where to begin and to stop in the flattened tensor;
                returns those values, 1-D. Each rank asks for what it needs.
        """
        self._store.before_write()
        for name, param in self.module.named_parameters():
            for key in ("param", *self._store.keys(param)):
                self._store.write(param, key, partial(read, name, key))
        for name, buffer in _buffers(self.module):
            buffer.copy_(read(name, "param", 0, buffer.numel()).view_as(buffer))
        self._store.after_write()

    @property
    def optimizer_step_count(self) -> int:
        """Updates that the optimizer has made (Adam corrects its averages by it); skipped ones do not count."""
        counts = [int(state["step"]) for state in self._store.states() if "step" in state]
        return counts[0] if counts else 0

    @optimizer_step_count.setter
    def optimizer_step_count(self, count: int) -> None:
        for state in self._store.states():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(count)
            elif "step" in state:
                state["step"] = count

    @property
    def loss_scaler(self) -> dict[str, float]:
        """The numbers of fp16's dynamic loss scale, by name; empty in other precisions."""
        scaler = self._scaler()
        return {name: getattr(scaler, name) for name in _SCALER if getattr(scaler, name, None) is not None}

    @loss_scaler.setter
    def loss_scaler(self, numbers: Mapping[str, float]) -> None:
        scaler = self._scaler()
        for name, number in numbers.items():
            if name in _SCALER and hasattr(scaler, name):
                setattr(scaler, name, number)

    def _scaler(self) -> Any:
        optimizer = self._deepspeed.optimizer
        scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        return scaler if self._deepspeed.fp16_enabled() else None

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, and the stopwatch off its collectives."""
        self._deepspeed.destroy()
        for name in _COLLECTIVES:
            vars(self._backend).pop(name, None)


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _check_precision(settings: dict[str, Any], mesh: Mesh) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if settings.get("fp16", {}).get("enabled") and not accelerator.is_fp16_supported():
        raise InputError("train.precision", "fp16", f"is not possible on this {mesh.device.type}", "use bf16 or fp32")
    if settings.get("bf16", {}).get("enabled") and not accelerator.is_bf16_supported():
        raise InputError("train.precision", "bf16", f"is not possible on this {mesh.device.type}", "use fp32")


def _set_rates(optimizer: Any, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers, by name."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in module.state_dict(keep_vars=True).items():
        if name not in parameters and torch.is_tensor(value):
            yield name, value
