"""Scores a model on a split of a task, in training and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...parallel import streaming
from ...parallel.mesh import Mesh, gather_values, to_device
from ...parallel.span import Span
from ...parallel.traffic import Traffic
from ..config import RunConfig
from ..data import Batch, Batches, Mixture, Sequences
from ..model.heads import Head, labelled
from ..monitoring.probe import Probe
from ..tasks import DistanceBin, Score, Task

POSITION_BINS = 32  # of a sequence, for the loss by position
DISTANCE_BINS = 48  # of distances, each from a power of two to the next


def batches_of(config: RunConfig, mesh: Mesh, sequences: Sequences) -> Batches:
    """This data rank's micro-batches of a dataset. Without a seed it is read once, and a batch has no more sequences
    than there are.
    """
    data, micro_batch_size, seed = config.data, config.train.micro_batch_size, sequences.seed
    batch_size = data.batch_size
    if seed is None and 0 < len(sequences) < batch_size:
        micro_batch_size = min(micro_batch_size, -(-len(sequences) // mesh.data.size))
        unit = micro_batch_size * mesh.data.size
        batch_size = -(-len(sequences) // unit) * unit
    return Batches(
        sequences,
        batch_size,
        micro_batch_size=micro_batch_size,
        data_rank=mesh.data.rank,
        num_data_ranks=mesh.data.size,
        workers=data.workers if seed is not None else 0,
    )


def blocks_of(
    batch: Batch, config: RunConfig, mesh: Mesh, dropout_seeds: Tensor | None, traffic: Traffic
) -> list[Span]:
    """This rank's spans of a micro-batch of whole sequences: one a block, a single one where nothing is streamed."""
    length, block_len = batch.tokens.shape[1], config.parallel.block_len
    return streaming.blocks(
        mesh, length, block_len, segments=batch.segments, dropout_seeds=dropout_seeds, traffic=traffic
    )


@torch.no_grad()
def score(
    config: RunConfig,
    run: Callable[..., Any],
    head: Head,
    mesh: Mesh,
    task: Task,
    split: str,
    max_batches: int = 0,
    probe: Probe | None = None,
    progress: Callable[[int], None] | None = None,
) -> Score | None:
    """Losses and metrics of a model on a split, over all ranks; of several sources, the mean by their weights.

    Args:
        config: of the run.
        run: the model, or what runs it, in evaluation mode.
        head: the model's.
        mesh: whose ranks share the work.
        task, split: the examples.
        max_batches: stop after so many, of each source; 0 reads all.
        probe: inspects the first batch.
        progress: called with the number of tokens just read.

    Returns:
        None if the split holds no example, or none that was read has a label.
    """
    if split not in task.splits or not len(task.sequences(split, None)):
        return None
    sequences = task.sequences(split, None)
    if not isinstance(sequences, Mixture):
        return _score(config, run, head, mesh, task, sequences, max_batches, probe, progress)
    scores = dict[str, Score]()
    for name, part in sequences.parts.items():
        found = _score(config, run, head, mesh, task, part, max_batches, None if scores else probe, progress)
        if found is not None:
            scores[name] = found
    return _weighted_mean(scores, sequences.shares) if scores else None


def _weighted_mean(scores: dict[str, Score], weights: dict[str, float]) -> Score:
    """The mean of the losses of several sources, also at each position of those that have it."""

    def mean(losses: list[tuple[float, float]]) -> float:
        return sum(weight * loss for weight, loss in losses) / sum(weight for weight, _ in losses)

    bins: dict[int, list[tuple[float, float]]] = {}
    for name, score in scores.items():
        for position, loss in score.by_position:
            bins.setdefault(position, []).append((weights[name], loss))
    losses = {name: score.loss for name, score in scores.items()}
    return Score(
        mean([(weights[name], loss) for name, loss in losses.items()]),
        sum(score.num_labels for score in scores.values()),
        by_position=[(position, mean(bins[position])) for position in sorted(bins)],
        by_source=losses,
    )


def _score(
    config: RunConfig,
    run: Callable[..., Any],
    head: Head,
    mesh: Mesh,
    task: Task,
    sequences: Sequences,
    max_batches: int,
    probe: Probe | None,
    progress: Callable[[int], None] | None,
) -> Score | None:
    names = head.metrics if task.has_metrics else ()
    num_bins = POSITION_BINS + (DISTANCE_BINS if task.has_distances else 0)
    bins = torch.zeros(2 + len(names), num_bins, dtype=torch.float64, device=mesh.device)
    for micro in batches_of(config, mesh, sequences).iterate(num_steps=max_batches or None):
        distances = task.distances(micro.tokens, micro.labels) if task.has_distances else None

        def add(span: Span, micro: Batch = micro, distances: Tensor | None = distances) -> None:
            tokens, labels = (to_device(span.shard(x), mesh.device) for x in (micro.tokens, micro.labels))
            losses, _, *measured = run(tokens, span=span, labels=labels, measure=task.has_metrics)
            known = labelled(labels)
            position = torch.arange(span.position, span.position + known.shape[1], device=mesh.device)
            position_bin = (position * POSITION_BINS // config.data.seq_len).expand_as(known).flatten()
            rows = [losses, known, *(measured[0].unbind(-1) if measured else ())]
            places = [position_bin]
            if distances is not None:
                distance = to_device(span.shard(distances), mesh.device).double().clamp(min=1)  # no label adds nothing
                places.append(POSITION_BINS + distance.log2().long().flatten())
            for row, values in zip(bins, rows, strict=True):
                for place in places:
                    row.index_add_(0, place, values.double().flatten())
            if progress is not None:
                progress(known.numel())

        with probe or nullcontext():
            for _ in streaming.read(blocks_of(micro, config, mesh, dropout_seeds=None, traffic=Traffic()), add):
                pass
    totals = torch.tensor(gather_values(bins.flatten().tolist(), mesh.world), dtype=torch.float64).sum(0).view_as(bins)
    of_positions, of_distances = totals[:, :POSITION_BINS], totals[:, POSITION_BINS:]

    def means(sums: list[float]) -> tuple[int, float, dict[str, float]]:
        """Number of labels, their mean loss and metrics, of sums of losses, of labels, and of metrics."""
        loss, count, *measures = sums
        found = {name: total / count for name, total in zip(names, measures, strict=True)}
        return int(count), loss / count, task.metrics(found)

    sums = of_positions.sum(1).tolist()
    if not sums[1]:
        return None
    by_position = [
        (int((bin_number + 0.5) * config.data.seq_len / POSITION_BINS), nats / number)
        for bin_number, (nats, number, *_) in enumerate(of_positions.T.tolist())
        if number
    ]
    by_distance = [
        DistanceBin(2**bin_number, *means(column))
        for bin_number, column in enumerate(of_distances.T.tolist())
        if column[1]
    ]
    count, loss, metrics = means(sums)
    return Score(loss, count, metrics, by_position, by_distance=by_distance)
