"""Where each stage of ZeRO keeps a parameter's fp32 value, and what the optimizer keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...parallel.mesh import Axis

Read = Callable[[int, int], Tensor]  # values [start, stop) of a flattened tensor


def share(count: int, axis: Axis) -> tuple[int, int]:
    """Where this rank's share of so many values begins and stops, if all ranks have them and share them out."""
    return count * axis.rank // axis.size, count * (axis.rank + 1) // axis.size


class WholeStore:
    """Stage 0: every rank has everything, in the parameter itself or in an fp32 copy of it.

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

    def masters(self) -> list[tuple[int, Tensor]]:
        """The fp32 tensors that the torch optimizer works on, each with the number of its group."""
        groups = enumerate(self.optimizer.param_groups)
        return [(i, p) for i, group in groups for p in group["params"] if p.requires_grad and p.numel()]

    def make_state(self) -> None:
        """Have the optimizer make its state, which it does at its first step: take one that changes nothing."""
        masters = self.masters()
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
        """What the torch optimizer keeps, for each of its tensors."""
        return [self.optimizer.state[tensor] for _, tensor in self.masters()]

    def keys(self, param: nn.Parameter) -> tuple[str, ...]:
        """The names of the tensors that the optimizer keeps of a parameter."""
        if id(param) not in self.trained:
            return ()
        _, master = self.masters()[0]
        state = self.optimizer.state[master]
        return tuple(key for key, value in state.items() if key != "step" and torch.is_tensor(value))

    def part(self, param: nn.Parameter) -> tuple[int, int]:
        """Where this rank's part of a flattened parameter begins and stops; all ranks' parts make it up."""
        return share(param.numel(), self.world)

    def read(self, param: nn.Parameter, key: str) -> Tensor:
        """This rank's part, fp32 and flat, of the parameter ("param") or of one of `keys`."""
        start, stop = self.part(param)
        return self._whole(param, key).detach().flatten()[start:stop].float()

    def write(self, param: nn.Parameter, key: str, read: Read) -> None:
        """Set this rank's part of what `read` reads, and the parameter that the model computes with."""
        value = read(0, param.numel()).view_as(param)
        self._whole(param, key).data.copy_(value)
        if key == "param":
            param.data.copy_(value)

    def _whole(self, param: nn.Parameter, key: str) -> Tensor:
        master = self._copies.get(id(param), param)
        value: Tensor = master if key == "param" else self.optimizer.state[master][key]
        return value

    def before_write(self) -> None:
        """Called before the first of a number of `write`; a collective."""

    def after_write(self) -> None:
        """Called after the last of them; a collective."""

    def after_step(self) -> None:
        """Called after each step."""


class FlatStore(WholeStore):
    """Stages 1 and 2: every rank has all parameters, and a part of the fp32 copy of all of them laid end to end."""

    def make_state(self) -> None:
        super().make_state()
        self.wrapper._lazy_init_hp_params_optimizer_state()

    def part(self, param: nn.Parameter) -> tuple[int, int]:
        if id(param) not in self.trained:
            return super().part(param)
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

    def write(self, param: nn.Parameter, key: str, read: Read) -> None:
        if key == "param":
            param.data.copy_(read(0, param.numel()).view_as(param))
        fragment = self._fragment(param)
        if fragment is not None:
            fragment.get_hp_fragment(None if key == "param" else key).data.copy_(read(*self.part(param)))

    def _fragment(self, param: nn.Parameter) -> Any:
        """What DeepSpeed has noted of this rank's part of a parameter; None if it has no part, or nobody trains it."""
        return getattr(param, "_hp_mapping", None)


class PartitionedStore(WholeStore):
    """Stage 3: every rank has a part of each parameter, and of its fp32 copy; the last ones are padded with zeros."""

    def masters(self) -> list[tuple[int, Tensor]]:
        flat = self.wrapper.fp32_partitioned_groups_flat
        return [(self.wrapper.sub_group_to_group_id[i], tensor) for i, tensor in enumerate(flat)]

    def part(self, param: Any) -> tuple[int, int]:
        from deepspeed import comm

        size = param.ds_tensor.numel()
        start = min(size * comm.get_rank(group=param.ds_process_group), param.ds_numel)
        return start, min(start + size, param.ds_numel)

    def read(self, param: Any, key: str) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        start, stop = self.part(param)
        if id(param) not in self.trained:
            value = param.ds_tensor
        elif key == "param":
            value = safe_get_local_fp32_param(param)
        else:
            value = safe_get_local_optimizer_state(param, key)
        part: Tensor = value.detach().flatten()[: stop - start].float()
        return part

    def write(self, param: Any, key: str, read: Read) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        part = read(*self.part(param))
        part = torch.cat([part, part.new_zeros(param.ds_tensor.numel() - part.numel())])
        if key != "param":
            safe_set_local_optimizer_state(param, part, key)
            return
        param.ds_tensor.data.copy_(part)
        if id(param) in self.trained:
            safe_set_local_fp32_param(param, part)

    def before_write(self) -> None:
        self.wrapper.checkpoint_event_prologue()  # also those that stay whole are parted

    def after_write(self) -> None:
        self.wrapper.checkpoint_event_epilogue()

    def after_step(self) -> None:
        # A parameter that a step does not reach would otherwise be given its gradient of the step before.
        self.wrapper.grad_partitions_flat_buffer.zero_()
