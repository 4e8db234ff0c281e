"""What each step of a run reads: sequences of ``data.seq_len`` tokens or, before, the shorter ones of
``data.curriculum``.

A stage is the same run with shorter sequences, and as many more of them in a batch: all steps have the same number of
tokens. The position in the data, ``consumed``, counts sequences of ``data.seq_len`` tokens in every stage. So a stage
reads on where the one before ended, and a resumed run as well, also with another curriculum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise

from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data import Batch, Batches, Sequences
from ..tasks import Task
from .memory import tokens_at_a_time
from .validation import batches_of


@dataclass(frozen=True)
class Stage:
    """Steps over sequences of one length.

    Attributes:
        config: of the run; lengths, batches and micro-batches are those of the stage.
        parts: how many of its sequences have as many tokens as one of the whole run's ``data.seq_len``.
        steps: numbers of its steps, from 0.
    """

    config: RunConfig
    parts: int
    steps: range

    def sequences(self, task: Task) -> Sequences:
        """The training sequences of the task, in the order of ``run.seed``.

        Raises:
            InputError: the task has none of this length.
        """
        seed = self.config.run.seed
        return task.sequences("train", seed) if self.parts == 1 else task.shorter(self.config.data.seq_len, seed)


@dataclass(frozen=True)
class StepInput:
    """What a step trains on.

    Attributes:
        config: of its stage.
        batch: the micro-batches of this data rank.
        position: the first of the step's sequences, over all ranks, in the dataset of ``batches``.
        batches: that they are read from.
    """

    config: RunConfig
    batch: list[Batch]
    position: int
    batches: Batches

    def windows(self) -> list[int]:
        """The numbers of the step's sequences, over all data ranks."""
        return self.batches.windows(self.position)


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of a run, the one of ``data.seq_len`` last."""
    lengths = [*(tokens for tokens, _ in config.data.curriculum), config.data.seq_len]
    ends = [*accumulate(steps for _, steps in config.data.curriculum), config.train.steps]
    return [
        Stage(_at_length(config, seq_len), config.data.seq_len // seq_len, range(start, stop))
        for seq_len, (start, stop) in zip(lengths, pairwise([0, *ends]), strict=True)
    ]


def _at_length(config: RunConfig, seq_len: int) -> RunConfig:
    """The same run with shorter sequences. A micro-batch has as many tokens or, where the longer sequences are
    streamed, as many as are processed at a time then: a stage takes no more memory than the last one.
    """
    if seq_len == config.data.seq_len:
        return config
    batch_size = config.data.batch_size * config.data.seq_len // seq_len
    data = replace(config.data, seq_len=seq_len, batch_size=batch_size, curriculum=[])
    shorter = replace(config, data=data, train=replace(config.train, micro_batch_size=1))
    share, most = batch_size // config.parallel.num_data_ranks, tokens_at_a_time(config) // tokens_at_a_time(shorter)
    shorter.train.micro_batch_size = next(rows for rows in range(most, 0, -1) if share % rows == 0)
    return shorter


def read_steps(config: RunConfig, mesh: Mesh, task: Task, step: int, consumed: int) -> Iterator[StepInput]:
    """Read for each step of a run what it trains on.

    Args:
        config: of the run.
        mesh: whose data ranks share a batch.
        task: the training data.
        step: steps done before.
        consumed: sequences of ``data.seq_len`` tokens read before, over all ranks.
    """
    for stage in stages_of(config):
        steps = range(max(step, stage.steps.start), stage.steps.stop)
        if steps:
            batches = batches_of(stage.config, mesh, stage.sequences(task))
            micro_batches = batches.iterate(consumed * stage.parts, len(steps))
            for _ in steps:
                batch = list(islice(micro_batches, batches.num_micro_batches))
                yield StepInput(stage.config, batch, consumed * stage.parts, batches)
                consumed += config.data.batch_size


def epochs_of(config: RunConfig, task: Task) -> dict[str, float]:
    """How often a whole run reads each source, by name; of a single one the name is empty."""
    total: dict[str, float] = {}
    for stage in stages_of(config):
        sequences, batch_size = stage.sequences(task), stage.config.data.batch_size
        before, after = (sequences.epochs(step * batch_size) for step in (stage.steps.start, stage.steps.stop))
        for name, epochs in after.items():
            total[name] = total.get(name, 0.0) + epochs - before[name]
    return total
