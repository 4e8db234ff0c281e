"""DeepSpeed behind one behaviour: true gradients and norms, whole tensors, in every stage and on any ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import SmallModel, batches, run_world, whole
from torch import Tensor

from longreach.errors import InputError
from longreach.framework.deepspeed import reduction
from longreach.framework.deepspeed.engine import Engine
from longreach.framework.deepspeed.settings import deepspeed_settings
from longreach.framework.deepspeed.workarounds import avoid_compiling
from longreach.parallel.mesh import init_mesh
from longreach.parallel.recorder import Recorder

STAGES = [0, 1, 2, 3]
RATE = 0.01


def settings(choice: Any = "zero1", **changes: Any) -> dict[str, Any]:
    numbers = {"batch_size": 8, "micro_batch_size": 2, "accumulation": 2, "world_size": 4}
    return deepspeed_settings(choice, **{"precision": "fp32", "clip": 1.0, **numbers, **changes})


def engine_of(choice: Any, precision: str = "fp32", clip: float = 0.0) -> Engine:
    """An engine over `SmallModel` in the world of this process, whose step is two micro-batches."""
    mesh = init_mesh()
    torch.manual_seed(0)
    model = SmallModel()
    size = mesh.world.size
    numbers = {"batch_size": 2 * size, "micro_batch_size": 1, "accumulation": 2, "world_size": size}
    return Engine(model, model.optimizer(), settings(choice, precision=precision, clip=clip, **numbers), mesh)


def reference(
    ranks: int, clip: float = 0.0, steps: int = 3
) -> list[tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """Norm, gradients (clipped) and new parameters of each step of a single process without DeepSpeed."""
    torch.manual_seed(0)
    model = SmallModel()
    optimizer = model.optimizer()
    rows = []
    for number, batch in enumerate(batches(steps, 2, ranks)):
        optimizer.zero_grad()
        (model(batch.flatten(0, 2)).sum() / 100).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf))
        for group in optimizer.param_groups:
            group["lr"] = RATE * (number + 1)
        optimizer.step()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        rows.append((norm, gradients, {name: p.detach().clone() for name, p in model.named_parameters()}))
    return rows


def run(
    rank: int, engine: Engine, steps: int = 3, is_last: bool = False
) -> list[tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """The same as `reference`, from an engine: Adam's first average grows by (1 - beta) of the gradient."""
    rows = []
    before: dict[str, Tensor] = {}
    for number, batch in enumerate(batches(steps, 2, engine.mesh.world.size)):
        engine.eval()
        with torch.no_grad():
            assert not engine(batch[0, rank]).requires_grad
        engine.train()
        for left, micro in zip((1, 0), batch[:, rank], strict=True):
            engine.backward(engine(micro).sum() / 100, is_last=is_last and not left)
        norm = engine.step(RATE * (number + 1))
        parts = whole(engine)
        average = {name: part["exp_avg"] for name, part in parts.items() if "exp_avg" in part}
        gradients = {name: (average[name] - 0.9 * before.get(name, torch.zeros(()))) / 0.1 for name in average}
        rows.append((norm, gradients, {name: part["param"] for name, part in parts.items() if name != "kept"}))
        before = average
        assert engine.optimizer_step_count == number + 1
    return rows


def compare(found: Any, expected: Any, gradient: float, parameter: float) -> None:
    for (norm, gradients, parameters), (true_norm, true_gradients, true_parameters) in zip(
        found, expected, strict=True
    ):
        assert norm == pytest.approx(true_norm, rel=gradient)
        assert gradients.keys() == true_gradients.keys()
        for name, true in true_gradients.items():
            assert float(gradients[name].norm() / true.norm()) == pytest.approx(1.0, abs=gradient), name
            torch.testing.assert_close(gradients[name], true, rtol=0, atol=gradient * float(true.abs().max()))
        assert list(parameters) == list(true_parameters)
        for name, true in true_parameters.items():
            torch.testing.assert_close(parameters[name], true, rtol=0, atol=parameter)


def stages_agree(rank: int, ranks: int) -> None:
    for clip in (0.0, 0.5):
        expected = reference(ranks, clip)
        for stage in STAGES:
            engine = engine_of(f"zero{stage}", clip=clip)
            compare(run(rank, engine), expected, gradient=1e-5, parameter=1e-6)
            engine.close()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gradients_norms_and_updates_are_true_in_every_stage(ranks: int) -> None:
    """Catches every wrong factor: of ranks, of micro-batches, of a stage; and a norm taken after clipping."""
    run_world(stages_agree, ranks, ranks)


def low_precision(rank: int, precision: str) -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU
    tolerance = 0.03 if precision == "bf16" else 0.005
    for stage in STAGES:
        scale = {"initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}  # grows in the third step
        engine = engine_of({"zero_optimization": {"stage": stage}, "fp16": scale}, precision=precision)
        compare(run(rank, engine), reference(2), gradient=tolerance, parameter=0.02)
        if precision == "fp16":
            assert engine.gradient_scale == 2 * engine.loss_scaler["cur_scale"] == 1024.0
            engine.backward(engine(batches(1, 1, 2)[0, 0, rank]).sum() * 1e4)
            assert engine.step(RATE) == math.inf
            assert engine.gradient_scale == 512.0
        engine.close()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_near(precision: str) -> None:
    """Catches what DeepSpeed does to fp16 and Adam would hide: no scale in stage 0, half a gradient when the scale
    grows; and a step of its own that counts."""
    run_world(low_precision, 2, precision)


def exchanged(work: Callable[[], Any]) -> list[tuple[str, int]]:
    """Kind and bytes of each exchange that ``work`` starts."""
    with Recorder() as recorder:
        work()
    return [(event.kind, event.num_bytes) for event in recorder.events if event.kind != "barrier"]


def overlaps(rank: int, ranks: int) -> None:
    reduction.LEAST_BUCKET = 1  # so that a small model has several buckets
    overlapped = {"zero_optimization": {"stage": 0, "overlap_comm": True}}
    engine, whole_step = engine_of(overlapped), engine_of("zero0")
    compare(run(rank, engine, is_last=True), reference(ranks), gradient=1e-5, parameter=1e-6)
    run(rank, whole_step)
    first, second = batches(1, 2, ranks)[0, :, rank]
    sent = []
    for one in (engine, whole_step):
        passes = (
            lambda one=one: one.backward(one(first).sum() / 100),
            lambda one=one: one.backward(one(second).sum() / 100, is_last=True),
            lambda one=one: one.step(RATE),
        )
        sent.append([exchanged(work) for work in passes])
    early, late = sent
    assert early[0] == late[0] == late[1] == [] and early[2] == []
    assert len(early[1]) > 3 and len(late[2]) == 1
    assert {kind for kind, _ in early[1] + late[2]} == {"all_reduce"}
    assert sum(size for _, size in early[1]) == late[2][0][1] == 4 * engine.num_trained

    # A parameter that no rank reaches holds up its bucket and those after it; its gradient is zero.
    norms = []
    for one in (engine, whole_step):
        one.backward(one(first, reach_odd=False).sum() / 100, is_last=True)
        norms.append(float(one.step(RATE)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    engine.close()
    whole_step.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_reduced_while_others_are_computed(ranks: int) -> None:
    """Catches an exchange that starts before all micro-batches have added to a gradient, or in another order."""
    run_world(overlaps, ranks, ranks)


def low_precision_exchanges(rank: int) -> None:
    for stage in STAGES:
        sent = []
        for name, tolerance in (("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 0.02)):
            engine = engine_of({"zero_optimization": {"stage": stage}, "communication_data_type": name})
            compare(run(rank, engine), reference(2), gradient=tolerance, parameter=0.02)
            batch = batches(1, 2, 2)[0, :, rank]

            def step(number: int, engine: Engine = engine, batch: Tensor = batch) -> None:
                for _ in range(number):
                    engine.backward(engine(batch[0]).sum() / 100)
                engine.step(RATE)

            kinds = ("all_reduce", "reduce_scatter", "reduce")
            once, twice = (
                sum(size for kind, size in exchanged(partial(step, number)) if kind.rstrip("_") in kinds and size > 8)
                for number in (1, 2)
            )
            # With stages 2 and 3 no rank has all gradients, to which the next micro-batch could add.
            assert twice == (once if stage < 2 else 2 * once), (stage, once, twice)
            sent.append(once)
            engine.close()
        assert sent[1] == sent[2] and 1.9 * sent[1] <= sent[0] <= 2 * sent[1], (stage, sent)


def test_gradients_are_exchanged_in_16_bits_and_once_a_step() -> None:
    run_world(low_precision_exchanges, 2)


def offloads(rank: int) -> None:
    for stage in (1, 2, 3):
        engine = engine_of({"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}})
        compare(run(rank, engine), reference(2), gradient=1e-5, parameter=1e-6)
        engine.close()


def test_an_optimizer_on_the_host_needs_no_compiler() -> None:
    run_world(offloads, 2)


def skips_infinite_gradients(rank: int, precision: str) -> None:
    for stage in STAGES:
        engine = engine_of(f"zero{stage}", precision=precision, clip=1.0)
        batch = batches(1, 1, 2)[0, 0, rank]
        engine.backward(engine(batch).sum() / 100)
        assert math.isfinite(engine.step(RATE))
        before = whole(engine)
        for bad in (math.nan, math.inf):
            loss = engine(batch).sum()
            engine.backward(loss * bad if rank == 1 else loss)
            assert engine.step(RATE) == math.inf
        after = whole(engine)
        for name, parts in before.items():
            for key, value in parts.items():
                assert torch.equal(value, after[name][key]), (stage, name, key)
        assert engine.optimizer_step_count == 1
        engine.backward(engine(batch).sum() / 100)
        assert math.isfinite(engine.step(RATE))
        assert not torch.equal(before["up.bias"]["param"], whole(engine)["up.bias"]["param"])
        engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_updates_nothing(precision: str) -> None:
    """One rank's NaN reaches no weight and no average on any rank, and the next step is a normal one."""
    run_world(skips_infinite_gradients, 2, precision)


def adds_up(rank: int) -> None:
    batch = batches(1, 1, 2)[0, 0, rank]
    for stage in STAGES:
        engine = engine_of(f"zero{stage}")
        engine.backward(engine(batch).sum() / 100)
        engine.step(RATE)
        at_once = whole(engine)
        engine.close()

        engine = engine_of(f"zero{stage}")
        engine.backward(engine(batch)[:5].sum() / 100)
        second, third = engine(batch)[5:9].sum() / 100, engine(batch)[9:].sum() / 100
        engine.backward(second)
        engine.backward(third)
        engine.step(RATE)
        added = whole(engine)
        for name, parts in at_once.items():
            for key, value in parts.items():
                torch.testing.assert_close(added[name][key], value, rtol=1e-5, atol=1e-6)

        engine.backward(engine(batch, reach_odd=False).sum() / 100)
        engine.step(RATE)
        torch.testing.assert_close(whole(engine)["odd"]["exp_avg"], 0.9 * added["odd"]["exp_avg"])
        engine.close()


def test_backward_calls_add_up_and_leave_nothing_for_the_next_step() -> None:
    """Any number of calls makes a step, and a parameter that a step does not reach gets no gradient of an older one."""
    run_world(adds_up, 2)


def without_a_compiler(rank: int, directory: str) -> list[str]:
    os.environ["TORCH_EXTENSIONS_DIR"] = directory
    os.environ["PATH"] = directory
    engine = engine_of("zero2")
    engine.backward(engine(batches(1, 1, 1)[0, 0, 0]).sum())
    assert math.isfinite(engine.step(RATE))
    return os.listdir(directory)


def test_no_compiler_is_needed(tmp_path: Path) -> None:
    assert run_world(without_a_compiler, 1, str(tmp_path)) == [[]]


ALONE = """
import torch
from longreach.framework.deepspeed.engine import Engine
from longreach.framework.deepspeed.settings import deepspeed_settings
from longreach.parallel.mesh import init_mesh, leave_world
settings = deepspeed_settings(
    "zero1", precision="bf16", batch_size=1, micro_batch_size=1, accumulation=1, clip=1.0, world_size=1
)
for _ in range(2):
    model = torch.nn.Linear(4, 4)
    engine = Engine(model, torch.optim.AdamW(model.parameters()), settings, init_mesh())
    engine.backward(engine(torch.ones(2, 4, dtype=torch.bfloat16)).sum())
    assert engine.step(0.1) > 0
    leave_world()
"""


def test_one_process_needs_no_launcher_builds_nothing_and_is_quiet(tmp_path: Path) -> None:
    """As a newcomer starts it: with a compiler at hand, which must not be put to work, and nothing set. Twice."""
    unset = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def compiled_operator(rank: int) -> tuple[str, bool]:
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    avoid_compiling()
    return ShareMemCommBuilder.NAME, deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME]


def test_the_operator_that_is_not_compiled_has_its_name() -> None:
    assert run_world(compiled_operator, 1) == [("deepspeed_shm_comm", False)]


def refuses_fp16(rank: int) -> str:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False
    with pytest.raises(InputError) as caught:
        engine_of("zero1", precision="fp16")
    return str(caught.value)


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    assert run_world(refuses_fp16, 1) == ["train.precision = 'fp16': is not possible on this cpu; use bf16 or fp32"]


# Settings


@pytest.mark.parametrize("stage", STAGES)
def test_every_name_is_complete(stage: int) -> None:
    found = settings(f"zero{stage}", precision="bf16", clip=0.5)
    assert found["zero_optimization"]["stage"] == stage
    assert "auto" not in json.dumps(found)
    assert (found["bf16"]["enabled"], found["fp16"]["enabled"], found["gradient_clipping"]) == (True, False, 0.5)
    sizes = [found[f"{key}"] for key in ("train_batch_size", "train_micro_batch_size_per_gpu")]
    assert [*sizes, found["gradient_accumulation_steps"]] == [16, 2, 2]


def test_a_path_and_a_mapping_are_settings_too(tmp_path: Path) -> None:
    keys = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "bf16": "auto", "gradient_clipping": 1}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(keys))
    assert settings(str(file)) == settings(keys)
    assert settings(keys)["zero_optimization"] == {"stage": 2}


def test_equal_values_and_harmless_keys_are_fine() -> None:
    keys = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bfloat16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "prescale_gradients": False,
    }
    found = settings(keys, precision="bf16")
    assert found["train_batch_size"] == 16
    assert "optimizer" not in found and "bfloat16" not in found


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (
        "zero11",
        {},
        "deepspeed = 'zero11': is neither a name in configs/deepspeed/ nor a JSON file; did you mean zero1?",
    ),
    (
        {"gradient_clipp1ng": 1.0},
        {},
        "deepspeed.gradient_clipp1ng = 1.0: is not a key that DeepSpeed knows; did you mean gradient_clipping?",
    ),
    (
        {"train_batch_size": 32},
        {},
        "deepspeed.train_batch_size = 32: must be 8 or 16, for data.batch_size 8 = train.micro_batch_size 2 x "
        '2 accumulated x 2 data ranks (of 4 ranks); or write "auto"',
    ),
    ({"gradient_accumulation_steps": 1}, {}, "deepspeed.gradient_accumulation_steps = 1: must be 2"),
    (
        {"gradient_clipping": 0.5},
        {},
        "deepspeed.gradient_clipping = 0.5: contradicts optim.clip = 1.0 of the configuration",
    ),
    ({"bf16": {"enabled": True}}, {}, "deepspeed.bf16.enabled = True: contradicts train.precision = fp32"),
    (
        {"fp16": {"enabled": False}},
        {"precision": "fp16"},
        "deepspeed.fp16.enabled = False: contradicts train.precision",
    ),
    (
        {"optimizer": {"type": "Adam", "params": {"lr": 1.0}}},
        {},
        "cannot be chosen here; set optim.* in the configuration",
    ),
    ({"gradient_allreduce_op": "sum"}, {}, "deepspeed.gradient_allreduce_op = 'sum': cannot be chosen here"),
    (
        {"zero_optimization": {"stag": 1}},
        {},
        "deepspeed.zero_optimization.stag = 1: Extra inputs are not permitted; did you mean stage?",
    ),
    ({"zero_optimization": {"round_robin_gradients": True}}, {}, "makes wrong checkpoints; remove it"),
    ({"zero_optimization": {"stage": 7}}, {}, "deepspeed.zero_optimization.stage = 7: "),
    ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, {}, "needs stage 0, 2 or 3; set it to false"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "must be cpu or none"),
    ({"data_types": {"grad_accum_dtype": "fp32"}}, {"precision": "bf16"}, "must be bf16 in stage 0"),
]


@pytest.mark.parametrize("choice, changes, message", WRONG)
def test_wrong_settings_are_told_in_one_line(choice: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        settings(choice, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read as JSON: Expecting property name"),
        ('{"fp16": {}, "fp16": {}}', "'fp16' is given twice"),
        ("[]", "must hold a JSON object"),
        ('{"gradient_clipping": 2}', "zero.json: gradient_clipping = 2: contradicts optim.clip = 1.0"),
    ],
)
def test_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "zero.json"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        settings(str(file))
    assert message in str(caught.value)
