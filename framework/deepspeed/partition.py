"""Where each stage of ZeRO keeps the fp32 master weights and the optimizer state of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...parallel.mesh import Axis

ReadValues = Callable[[int, int], Tensor]  # values [start, stop) of a flattened tensor


def partition_bounds(count: int, axis: Axis) -> tuple[int, int]:
    """The bounds [start, stop) of this rank's partition of ``count`` values that all ranks have."""
    return count * axis.rank // axis.size, count * (axis.rank + 1) // axis.size


class ReplicatedStore:
    """Stage 0: nothing is partitioned. The master weight is the parameter itself or an fp32 copy of it.

    Args:
        wrapper: DeepSpeed's optimizer.
        optimizer: the torch optimizer in it.
        trained: ``id`` of the parameters that it trains.
        world: all ranks.
    """

    def __init__(self, wrapper: Any, optimizer: torch.optim.Optimizer, trained: set[int], world: Axis) -> None:
        self.wrapper, self.optimizer, self.trained, self.world = wrapper, optimizer, trained, world
        groups = zip(getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ()))
        self._copies = {id(low): high for lows, highs in groups for low, high in zip(lows, highs)}

    def master_tensors(self) -> list[tuple[int, Tensor]]:
        """The fp32 tensors that the torch optimizer updates, each with the number of its parameter group."""
        groups = enumerate(self.optimizer.param_groups)
        return [(i, p) for i, group in groups for p in group["params"] if p.requires_grad and p.numel()]

    def create_optimizer_state(self) -> None:
        """Make the optimizer allocate its state, which it does in its first step: take one with zero gradients."""
        masters = self.master_tensors()
        groups = self.optimizer.param_groups
        held = [group["params"] for group in groups]
        gradients = [tensor.grad for _, tensor in masters]
        for i, group in enumerate(groups):
            group["params"] = [tensor for j, tensor in masters if i == j]
        for _, tensor in masters:
            tensor.grad = torch.zeros_like(tensor)
        self.optimizer.step()
        for (_, tensor), gradient in zip(masters, gradients):
            tensor.grad = gradient
        for group, params in zip(groups, held):
            group["params"] = params
        for state in self.states():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0

    def states(self) -> list[dict[str, Any]]:
        """The state that the torch optimizer keeps for each of its tensors."""
        return [self.optimizer.state[tensor] for _, tensor in self.master_tensors()]

    def state_keys(self, param: nn.Parameter) -> tuple[str, ...]:
        """The names of the state tensors of a parameter, without the step count."""
        if id(param) not in self.trained:
            return ()
        _, master = self.master_tensors()[0]
        state = self.optimizer.state[master]
        return tuple(key for key, value in state.items() if key != "step" and torch.is_tensor(value))

    def partition(self, param: nn.Parameter) -> tuple[int, int]:
        """The bounds [start, stop) of this rank's partition of the flattened parameter."""
        return partition_bounds(param.numel(), self.world)

    def read(self, param: nn.Parameter, key: str) -> Tensor:
        """This rank's partition, fp32 and flat, of the parameter ("param") or of one of `state_keys`."""
        start, stop = self.partition(param)
        return self._full_tensor(param, key).detach().flatten()[start:stop].float()

    def write(self, param: nn.Parameter, key: str, read: ReadValues) -> None:
        """Set this rank's partition to values of ``read``, and the parameter that the model computes with."""
        value = read(0, param.numel()).view_as(param)
        self._full_tensor(param, key).data.copy_(value)
        if key == "param":
            param.data.copy_(value)

    def _full_tensor(self, param: nn.Parameter, key: str) -> Tensor:
        master = self._copies.get(id(param), param)
        value: Tensor = master if key == "param" else self.optimizer.state[master][key]
        return value

    def before_write(self) -> None:
        """Called before the first of a number of `write`; a collective."""

    def after_write(self) -> None:
        """Called after the last of them; a collective."""

    def after_step(self) -> None:
        """Called after each step."""


class FlatPartitionStore(ReplicatedStore):
    """Stages 1 and 2: parameters are replicated; their fp32 copies, concatenated, are partitioned."""

    def create_optimizer_state(self) -> None:
        super().create_optimizer_state()
        self.wrapper._lazy_init_hp_params_optimizer_state()

    def partition(self, param: nn.Parameter) -> tuple[int, int]:
        if id(param) not in self.trained:
            return super().partition(param)
        fragment = self._fragment(param)
        if fragment is None:
            return 0, 0
        address = fragment.lp_fragment_address
        return address.start, address.start + address.numel

    def read(self, param: nn.Parameter, key: str) -> Tensor:
        fragment = self._fragment(param)
        if fragment is None:
            return super().read(param, key)
        value: Tensor = fragment.get_hp_fragment(None if key == "param" else key)
        return value.detach().flatten().float()

    def write(self, param: nn.Parameter, key: str, read: ReadValues) -> None:
        if key == "param":
            param.data.copy_(read(0, param.numel()).view_as(param))
        fragment = self._fragment(param)
        if fragment is not None:
            fragment.get_hp_fragment(None if key == "param" else key).data.copy_(read(*self.partition(param)))

    def _fragment(self, param: nn.Parameter) -> Any:
        """DeepSpeed's record of this rank's partition; None if it is empty, or the parameter is not trained."""
        return getattr(param, "_hp_mapping", None)


class ParameterPartitionStore(ReplicatedStore):
    """Stage 3: each parameter and its fp32 copy are partitioned; the last partitions are padded with zeros."""

    def master_tensors(self) -> list[tuple[int, Tensor]]:
        flat = self.wrapper.fp32_partitioned_groups_flat
        return [(self.wrapper.sub_group_to_group_id[i], tensor) for i, tensor in enumerate(flat)]

    def partition(self, param: Any) -> tuple[int, int]:
        from deepspeed import comm

        size = param.ds_tensor.numel()
        start = min(size * comm.get_rank(group=param.ds_process_group), param.ds_numel)
        return start, min(start + size, param.ds_numel)

    def read(self, param: Any, key: str) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        start, stop = self.partition(param)
        if id(param) not in self.trained:
            value = param.ds_tensor
        elif key == "param":
            value = safe_get_local_fp32_param(param)
        else:
            value = safe_get_local_optimizer_state(param, key)
        part: Tensor = value.detach().flatten()[: stop - start].float()
        return part

    def write(self, param: Any, key: str, read: ReadValues) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        part = read(*self.partition(param))
        part = torch.cat([part, part.new_zeros(param.ds_tensor.numel() - part.numel())])
        if key != "param":
            safe_set_local_optimizer_state(param, part, key)
            return
        param.ds_tensor.data.copy_(part)
        if id(param) in self.trained:
            safe_set_local_fp32_param(param, part)

    def before_write(self) -> None:
        self.wrapper.checkpoint_event_prologue()  # also partitions the parameters that it keeps gathered

    def after_write(self) -> None:
        self.wrapper.checkpoint_event_epilogue()

    def after_step(self) -> None:
        # A parameter that a step does not reach would otherwise be given its gradient of the step before.
        self.wrapper.grad_partitions_flat_buffer.zero_()
