"""An engine over DeepSpeed that behaves alike in every ZeRO stage.

The optimizer is sharded over all ranks, those of one sequence included: DeepSpeed sees every rank as a data-parallel
rank. What it then does with gradients, unused parameters and checkpoints differs between its stages. `Engine` promises
one behaviour: the gradient is the true one, its norm is always known, a gradient that is not finite never reaches the
weights, and every rank can read its own partition of each tensor, and write any, under the name it has in the model.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...parallel.mesh import Mesh
from ...parallel.traffic import Stopwatch, timed
from .partition import FlatPartitionStore, ParameterPartitionStore, ReplicatedStore, partition_bounds
from .reduction import GradientReduction
from .workarounds import import_deepspeed, join_world, read_norm_once, take_norm

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
        comm_timer: runs while gradients are reduced and weights gathered. With ``overlap_comm`` on a GPU in stages 2
            and 3, what overlaps with other work counts too.
        step_timer: runs in `step`.

    Raises:
        InputError: this device cannot compute in the precision asked for.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], mesh: Mesh
    ) -> None:
        deepspeed = import_deepspeed()
        self.comm_timer, self.step_timer = Stopwatch(mesh.device), Stopwatch(mesh.device)
        join_world(deepspeed, mesh)
        self._backend = deepspeed.comm.comm.cdb
        for name in _COLLECTIVES:
            setattr(self._backend, name, timed(getattr(self._backend, name), self.comm_timer))
        _check_precision(settings, mesh)
        self.module, self.mesh = model, mesh
        self.num_parameters = sum(p.numel() for p in model.parameters())  # stage 3 leaves only a partition of each
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()}
        # The step ends when the caller says so; DeepSpeed has no number of micro-batches to count or divide by.
        per_pass = settings["train_micro_batch_size_per_gpu"]
        config = {
            **copy.deepcopy(settings),
            "managed_gradient_accumulation": False,
            "gradient_accumulation_steps": 1,
            "train_batch_size": per_pass * mesh.world.size,
        }
        zero = config["zero_optimization"]
        overlap = zero.get("stage", 0) == 0 and bool(zero.pop("overlap_comm", False))  # of stage 0, we do it ourselves
        rates = [group["lr"] for group in optimizer.param_groups]
        _set_learning_rates(optimizer, [0.0] * len(rates))  # some of its optimizers take a step to make their state
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints how much memory there is
            self._deepspeed = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
        stage = self._deepspeed.zero_optimization_stage()
        kind = ReplicatedStore if stage == 0 else ParameterPartitionStore if stage == 3 else FlatPartitionStore
        self._store = kind(self._deepspeed.optimizer, optimizer, trained, mesh.world)
        self._store.create_optimizer_state()
        read_norm_once(self._deepspeed.optimizer)
        _set_learning_rates(optimizer, rates)
        self._update_scale: Callable[[bool], None] | None = None
        self._overflows: list[bool] = []
        if self._deepspeed.fp16_enabled():  # it grows the scale of the loss before it divides the gradient by it
            self._update_scale = self._deepspeed.optimizer._update_scale
            self._deepspeed.optimizer._update_scale = self._overflows.append
        self._reduction: GradientReduction | None = None
        if stage == 0:
            self._deepspeed.enable_backward_allreduce = False
            self._is_finite, self._clip = True, 0.0
            parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
            for param in parameters:
                param.grad_dtype = torch.float32  # micro-batches add up in it, whatever the parameter's dtype
            size, dtype = self._deepspeed.zero_reduce_bucket_size(), self._deepspeed.communication_data_type
            self._reduction = GradientReduction(parameters, int(size), dtype, mesh.world.size, overlap)
            if hasattr(self._deepspeed.optimizer, "overflow_checker"):
                self._clip = settings.get("gradient_clipping", 0.0)
                take_norm(self._deepspeed.optimizer, lambda: self._is_finite)

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

    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        """Add this loss's gradient to that of the step.

        Args:
            loss: scalar; a summand of the loss of the whole optimizer step. Summed over the ranks and over the
                calls of the step, it is that loss.
            is_last: whether no other call follows before `step`, on any rank: with ``overlap_comm`` in stage 0,
                gradients are then reduced while this call computes others.
        """
        if is_last and self._reduction is not None:
            self._reduction.begin()
        optimizer = self._deepspeed.optimizer
        if hasattr(optimizer, "clear_backward_seen_flag"):  # else two calls after one forward would not add up
            optimizer.clear_backward_seen_flag()
        scale = float(self.mesh.world.size)  # DeepSpeed averages over all ranks
        if not hasattr(optimizer, "scale_if_loss"):  # and it forgets the scale of fp16 in stage 0
            scale = self.gradient_scale
        wide = loss.to(torch.promote_types(loss.dtype, torch.float32))
        self._deepspeed.backward(wide * scale, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        """Update the weights with the gradient added up since the last step, which ends it.

        Args:
            lr: learning rate of all parameter groups.

        Returns:
            The norm of the true gradient over all parameters, before clipping, the same on all ranks; a scalar in
            main memory or on the device. Infinity if the gradient was not finite: then nothing was updated (in fp16,
            the scale of the loss was reduced).
        """
        with self.step_timer:
            norm = self._step(lr)
        return torch.where(norm.isfinite() & (norm >= 0), norm, math.inf)

    def _step(self, lr: float) -> Tensor:
        engine, optimizer = self._deepspeed, self._deepspeed.optimizer
        _set_learning_rates(optimizer, [lr] * len(optimizer.param_groups))
        norm = None if self._reduction is None else self._reduce(self._reduction)
        if norm is not None and not self._is_finite and not hasattr(optimizer, "overflow"):
            engine.zero_grad()  # a bare torch optimizer would go on
            return norm
        engine.step()
        self._store.after_step()
        while self._overflows and self._update_scale is not None:
            self._update_scale(self._overflows.pop())
        if not engine.was_step_applied():
            return torch.tensor(math.inf)
        return norm if norm is not None else torch.as_tensor(engine.get_global_grad_norm())

    def _reduce(self, reduction: GradientReduction) -> Tensor:
        """Average the gradients of stage 0 and return the norm of the true gradient."""
        scale = self.gradient_scale / self.mesh.world.size
        gradients = reduction.finish()
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        norm = torch.stack(norms).norm() / scale if norms else torch.zeros(())
        self._is_finite = bool(norm.isfinite())
        if self._clip:
            share = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, share)
        return norm

    def partitions(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """This rank's partitions of the model and of the optimizer state; over all ranks, every value is there once.

        Yields:
            A name as in the model (a tied parameter has one); ``param`` (fp32; a persistent buffer in its own type)
            or, for trained parameters, the name of a state tensor (for Adam ``exp_avg`` and ``exp_avg_sq``, fp32); the
            start of the partition in the flattened tensor; and its values ``[n]``, n >= 1, which the next step may
            change.
        """
        for name, param in self.module.named_parameters():
            start, stop = self._store.partition(param)
            if start < stop:
                for key in ("param", *self._store.state_keys(param)):
                    yield name, key, start, self._store.read(param, key)
        for name, buffer in _buffers(self.module):
            start, stop = partition_bounds(buffer.numel(), self.mesh.world)
            if start < stop:
                yield name, "param", start, buffer.detach().flatten()[start:stop]

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The names and keys that all ranks' `partitions` have, with the shape of each whole tensor."""
        shapes = {}
        for name, param in self.module.named_parameters():
            shape = tuple(getattr(param, "ds_shape", param.shape))  # in stage 3 a parameter holds only its partition
            shapes[name] = dict.fromkeys(("param", *self._store.state_keys(param)), shape)
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
            for key in ("param", *self._store.state_keys(param)):
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
        if self._reduction is not None:
            self._reduction.remove()
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


def _set_learning_rates(optimizer: Any, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers, by name."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in module.state_dict(keep_vars=True).items():
        if name not in parameters and torch.is_tensor(value):
            yield name, value
