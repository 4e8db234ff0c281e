"""What DeepSpeed needs before an engine starts: a quiet import, the world that was joined, and no compiler."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...parallel.mesh import Mesh


def import_deepspeed() -> Any:
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


def join_world(deepspeed: Any, mesh: Mesh) -> None:
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


def avoid_compiling() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective, which takes a minute and needs a compiler.

    It builds the operator when it is first initialized on CPUs, if its table of possible operators says so, and
    uses it in inference only. The table is made on first use (by trying compilers); we make it, without that one.
    """
    import deepspeed.ops

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def disable_stage3_order_check() -> None:
    """Keep stage 3 from comparing its order of modules with other ranks, which a dry run does not have."""
    import_deepspeed()
    from deepspeed.runtime.zero import partitioned_param_coordinator

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None


def read_norm_once(optimizer: Any) -> None:
    """Let DeepSpeed's optimizer of stages 1 and 2 read the gradient's norm from the device, once, and nothing else.

    It would look for what is not finite in all gradients first, though their norm tells, and read the norm twice.
    """
    from deepspeed.runtime import bf16_optimizer

    def in_main_memory(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: torch.tensor(float(norm(*args, **options)))

    if hasattr(optimizer, "scaled_global_norm"):
        optimizer.check_overflow = lambda partition_gradients=True: None
        optimizer.scaled_global_norm = in_main_memory(optimizer.scaled_global_norm)
    elif isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        if not hasattr(bf16_optimizer, "_norm_on_device"):
            bf16_optimizer._norm_on_device = bf16_optimizer.get_global_norm_of_tensors
        bf16_optimizer.get_global_norm_of_tensors = in_main_memory(bf16_optimizer._norm_on_device)


def take_norm(optimizer: Any, is_finite: Callable[[], bool]) -> None:
    """Let DeepSpeed's optimizer of stage 0 in 16 bits take our word on the gradient: it would read every one of them.

    Args:
        optimizer: clips nothing from now on.
        is_finite: whether the gradient of the step is.
    """
    from deepspeed.runtime.fp16 import unfused_optimizer

    optimizer.overflow_checker.check = lambda: not is_finite()
    optimizer.clip_grad = 0.0
    unfused_optimizer.get_weight_norm = lambda gradients, mpu=None: 0.0  # is looked at for what is not finite
