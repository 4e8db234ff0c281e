"""How well a trained model predicts: bits per byte of held-out documents or of any file, by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..parallel import streaming
from ..parallel.mesh import Mesh
from ..parallel.span import Span
from .data import Index, packed_dir, validation_batches
from .data.progress import progress
from .generate import PROMPT_BLOCK, load_run
from .model import IGNORED, Model
from .monitor import BITS


@dataclass
class Score:
    """A mean loss.

    Attributes:
        loss: nats a token.
        num_tokens: tokens predicted.
        by_position: (first position, nats a token) of each stretch of positions.
    """

    loss: float
    num_tokens: int
    by_position: list[tuple[int, float]] = field(default_factory=list)

    @property
    def bits_per_token(self) -> float:
        return self.loss * BITS


def evaluate(run_dir: str | Path, source: str | Path | None = None, max_batches: int = 0) -> Score:
    """Score a run's newest model.

    Args:
        run_dir: of the run.
        source: a file to be read as one sequence of bytes, however long; None for the run's held-out documents.
        max_batches: stop after so many held-out batches; 0 reads all.

    Raises:
        InputError: run, corpus or file do not fit or cannot be read.
    """
    config, model = load_run(run_dir)
    if source is not None:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise InputError("source", str(source), f"cannot be read: {error.strerror}") from None
        if len(data) < 2:
            raise InputError("source", str(source), "at least two bytes")
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with progress(f"reading {source}", len(data) - 1) as advance:
            return score(model, [(tokens[:-1].unsqueeze(0), tokens[1:].unsqueeze(0), None)], progress=advance)
    index = Index.load(packed_dir(config.data), verify=config.data.verify, timeout=config.data.timeout)
    batches = validation_batches(index, config.data, micro_batch_size=1)
    sequences = batches.iterate(num_steps=max_batches or None)
    num_sequences = min(len(batches.dataset), max_batches * config.data.batch_size or len(batches.dataset))
    with progress(f"reading {index.name}", num_sequences * config.data.seq_len) as advance:
        return score(model, ((batch.tokens, batch.labels, batch.segments) for batch in sequences), progress=advance)


@torch.no_grad()
def score(
    model: Model,
    sequences: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    num_bins: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Mean loss over sequences, read block by block where the model is causal: memory does not grow with their length.

    Args:
        model: on the CPU or a device; sequences are moved there block by block.
        sequences: ``(tokens [B, L], labels [B, L], segments [B, L] or None)``; labels `IGNORED` do not count.
        num_bins: stretches of positions told apart.
        progress: called with the number of tokens just read.
    """
    mesh = Mesh(device=next(model.parameters()).device)
    total = torch.zeros(2, dtype=torch.float64)
    bins: dict[int, Tensor] = {}
    for tokens, labels, segments in sequences:
        length = tokens.shape[1]
        stretch = max(1, -(-length // num_bins))

        def losses(span: Span, tokens: Tensor = tokens, labels: Tensor = labels) -> Tensor:
            """Nats and labelled tokens ``[n, 2]`` at each position of a block."""
            ids, wanted = (span.take(x).to(device=mesh.device, dtype=torch.int64) for x in (tokens, labels))
            nll = model(ids, span, wanted)[0].double()
            return torch.stack([nll.sum(0), (wanted != IGNORED).double().sum(0)], dim=1).cpu()

        spans = streaming.blocks(mesh, length, PROMPT_BLOCK if model.config.causal else 0, segments=segments)
        for span, found in zip(spans, streaming.read(spans, losses), strict=True):
            total += found.sum(0)
            place = (span.position + torch.arange(len(found))) // stretch
            for number in place.unique().tolist():
                here = found[place == number].sum(0)
                bins[number * stretch] = bins.get(number * stretch, torch.zeros(2, dtype=torch.float64)) + here
            if progress is not None:
                progress(len(found) * len(tokens))
    if not total[1]:
        raise InputError("source", "no tokens", "at least one token with a next one")
    by_position = [(first, float(nll / count)) for first, (nll, count) in sorted(bins.items()) if count]
    return Score(float(total[0] / total[1]), int(total[1]), by_position)
